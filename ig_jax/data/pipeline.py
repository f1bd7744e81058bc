"""Batches whose order is a function of (seed, step) alone, for any number of processes."""

import zlib

import grain
import numpy as np

from ig_jax.data.sources import ImageSource
from ig_jax.errors import UserError, check

_ROWS = 2**52  # as good as endless; grain's own endless length overflows when a batch holds one image


class Batches:
    """Endless iterator over the local batches of consecutive steps; close it, or use it in a `with`."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._iterator)
        except BaseException:
            # After a failed read grain would go on with the next batch under the failed one's number.
            self.close()
            raise

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reading threads; a closed iterator gives no more batches."""
        self._iterator.close()


def batches(source: ImageSource, *, seed: int, global_batch: int, start_step: int, process_index: int,
            process_count: int, prefetch: int = 4, threads: int = 2) -> Batches:
    """This process's share of the global batch of steps `start_step`, `start_step` + 1, ...

    A share is {"image": uint8 (local_batch, H, W, C), "label": int32 (local_batch,)}; the shares of
    processes 0, 1, ... laid end to end are the global batch (`global_batch` images). Every epoch is a new
    permutation; a batch may span two epochs. `prefetch` counts batches read ahead by `threads` threads.
    Raises: UserError at once on impossible numbers, and later whatever reading the source raises.
    """
    _check_order(source, seed, global_batch)
    check(_is_count(process_count, 1), "process_count", process_count, "a whole number, 1 or more")
    check(_is_count(process_index, 0) and process_index < process_count,
          "process_index", process_index, f"in [0, {process_count})")
    check(global_batch % process_count == 0, "global_batch", global_batch,
          f"divisible by the {process_count} processes", "choose a multiple")
    check(_is_count(start_step, 0), "start_step", start_step, "a whole number of steps, 0 or more")
    check(_is_count(prefetch, 1), "prefetch", prefetch, "a whole number of batches, 1 or more")
    check(_is_count(threads, 1), "threads", threads, "a whole number, 1 or more")

    rows = _order(len(source), seed).batch(global_batch // process_count, batch_fn=np.asarray)
    # Reading a whole batch of rows at once spares grain's per-element work in Python.
    local = rows[process_index::process_count].map(source.gather)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(local.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return Batches(iterator)


def fingerprint(source: ImageSource, seed: int, global_batch: int) -> dict[str, int | str]:
    """What must be equal for a resumed run to see the same batches, as JSON scalars by name."""
    _check_order(source, seed, global_batch)
    order = _order(len(source), seed)
    first_rows = np.asarray([order[i] for i in range(min(len(source), 256))], "<i8")
    return {
        "source": source.identity,
        "examples": len(source),
        "image_shape": "x".join(map(str, source.image_shape)),
        "num_classes": source.num_classes,
        "seed": seed,
        "global_batch": global_batch,
        "order": f"{zlib.crc32(first_rows.tobytes()):08x}",  # another grain version may shuffle otherwise
    }


def check_fingerprint(saved: dict[str, int | str], current: dict[str, int | str]) -> None:
    """Raise UserError naming the first field in which this run's data differ from a checkpoint's."""
    for field in [*current, *(saved.keys() - current.keys())]:
        stored, wanted = saved.get(field, "nothing"), current.get(field, "nothing")
        if stored != wanted:
            raise UserError(f"data {field}: the checkpoint was trained with {stored!r} and this run has "
                            f"{wanted!r}; set it back, or start in an empty workdir")


def _order(length: int, seed: int) -> grain.MapDataset:
    """Endless rows of a source: one permutation of 0..length-1 after another, a new one every epoch."""
    return grain.MapDataset.range(length).seed(seed).shuffle().repeat(_ROWS // length)


def _check_order(source: ImageSource, seed: int, global_batch: int) -> None:
    check(_is_count(seed, 0) and seed < 2**32, "seed", seed, "a whole number in [0, 2**32)")
    check(_is_count(global_batch, 1) and global_batch <= len(source), "global_batch", global_batch,
          f"in [1, {len(source)}], the number of images of {source!r}")


def _is_count(value, least: int) -> bool:
    """Whether `value` is an int of at least `least`; True and False are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
