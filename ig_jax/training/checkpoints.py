"""Checkpoints that are whole or not there: Orbax for the arrays, a digest of each for what Orbax cannot see.

workdir/checkpoints/<step>/ holds the items `params`, `optimizer`, one `ema_<decay>` for each EMA and `meta`
(JSON: step, config, data position, and shape, dtype and digest of every array). A directory is enough to
sample from it. Orbax commits a step atomically but restores a flipped bit silently, so every restore
compares digests, and a damaged step is passed over, by name, for the one before; a run that goes on from there
moves it to workdir/checkpoints/damaged/.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from ig_jax.errors import UserError, second_to
from ig_jax.parallel.storage import abandoned_unheard, describe, first_line, leaf_names
from ig_jax.training.state import TrainState

FORMAT = 1  # of `meta`
_WRITTEN_AT_ONCE = 128_000_000  # bytes, of all arrays that `write_step` has in flight
_COMMITTED = "commit_success.txt"  # Orbax writes it last, in either way of committing
_DAMAGED = "damaged"  # where steps that were passed over end up
_TRASH = "trash"  # Orbax deletes file by file; renaming first keeps a half-deleted step out of the list


def find(directory: str | os.PathLike) -> tuple[Path, int | None]:
    """(checkpoint directory, step or None for the newest) from a workdir, its checkpoints/, or one step.

    Raises: UserError when there is no such directory.
    """
    path = Path(directory).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"checkpoint={str(directory)!r} must be an existing directory; give the --workdir of a run")
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    if path.name.isdigit() and (path / "meta").is_dir():
        return path.parent, int(path.name)
    return path, None


class Damaged(UserError):
    """A committed step whose files no longer hold what was saved."""


# How TensorStore and XLA begin what says nothing of the files: the same step may be read tomorrow.
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _unreadable(step: int, error: Exception, what: str = "") -> UserError:
    """Damaged, unless what came of reading a step is the machine's fault and no reason to go back to an older one."""
    gone = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    if isinstance(error, MemoryError) or isinstance(error, OSError) and not gone or str(error).startswith(_PASSING):
        return UserError(f"checkpoint step {step} could not be read: {what}{first_line(error)}; mend that, or move "
                         "the step away to go on from the one before")
    return Damaged(f"checkpoint step {step} is damaged: {what}{first_line(error)}")


class Checkpoints:
    """The checkpoints of one run; a context manager, because leaving early would lose an unfinished save."""

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = None, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self._read_only = read_only
        self._empty_trash()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            todelete_subdir=None if read_only else _TRASH,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            # Written under another name and renamed when whole: what a kill leaves is never taken for a step.
            atomicity_options=AtomicityOptions(mode=AtomicityMode.ATOMIC_RENAME),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._unheard, self._failed = abandoned_unheard(), False

    def __enter__(self) -> "Checkpoints":
        self._unheard.__enter__()
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            with second_to(kind):
                self.wait()
        finally:
            self._manager.close()
            self._empty_trash()
        if not kind and not self._failed:  # otherwise reports may still follow
            self._unheard.__exit__(None, None, None)

    def _empty_trash(self) -> None:
        if not self._read_only:
            shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def steps(self) -> list[int]:
        """Committed steps, newest first; files, links and empty directories named like one are left out."""
        listed = (step for step in self._manager.all_steps() if self._is_whole(self.directory / str(step)))
        return sorted(listed, reverse=True)

    @staticmethod
    def _is_whole(path: Path) -> bool:
        return not path.is_symlink() and (path / "meta").is_dir() and (path / _COMMITTED).is_file()

    def _put_aside_after(self, step: int) -> None:
        """Move away what is called a later step and is none: it would be in the way of the one that will be saved
        under its number, and be kept in place of an older one.
        """
        later = [found for found in self._manager.all_steps() if found > step]
        for found in later:
            aside = self.directory / _DAMAGED / f"{found}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.directory / str(found), aside)
        if later:
            self._manager.reload()

    def save(self, state: TrainState, meta: dict) -> None:
        """Start writing `state` in the background; `meta` is JSON and gains step and array descriptions.

        Raises: UserError when this or the previous save could not be written.
        """
        step, items = int(state.step), _items(state)
        meta = {"format": FORMAT, "step": step, **meta, "arrays": {k: describe(v) for k, v in items.items()}}
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saves), force=True)
        except (OSError, ValueError) as error:  # ValueError: how a full disk comes back from the background
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Block until every started save is committed.  Raises: UserError when one could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        self._failed = True
        return UserError(
            f"checkpoint directory {str(self.directory)!r} could not be written: {first_line(error)}; "
            "committed steps are intact, free space or choose another --workdir"
        )

    def restore_newest(
        self, wanted: Callable[[dict], dict[str, object]], step: int | None = None, *, as_readers: bool = False,
        before_reading: Callable[[dict], None] = lambda meta: None,
    ) -> tuple[dict[str, object], dict] | None:
        """(items, meta) of `step`, or of the newest whole step; None where nothing was ever saved.

        `wanted(meta)` gives the shapes, dtypes and shardings of the items to read; others are not read.
        as_readers: in place of each array of an item {name: array}, a function that reads it from the disk;
        all were read and checked, but they are never in memory together.
        before_reading(meta) is called for each step tried, once its shapes and dtypes are known to be those wanted.
        Raises: UserError when steps exist but all are damaged, or when shapes or dtypes differ.
        """
        damage: list[str] = []
        for candidate in self.steps() if step is None else [step]:
            try:
                meta = self._meta(candidate)
                layout = wanted(meta)
                _check_layout(layout, meta)
                before_reading(meta)
                items = (self._readers if as_readers else self._restore)(candidate, layout, meta)
            except Damaged as error:
                damage.append(str(error))
                self._failed = True
                continue
            for line in damage:
                print(f"ig_jax: warning: {line}; taking step {candidate}", file=sys.stderr, flush=True)
            if not self._read_only:
                self._put_aside_after(candidate)
            return items, meta
        remains = sorted(p.name for p in self.directory.glob("[0-9]*") if p.name.isdigit() and _has_files(p))
        if damage or remains:
            why = damage[0] if damage else f"{', '.join(remains)} never committed"
            raise UserError(f"checkpoint directory {str(self.directory)!r} holds no whole step ({why}); "
                            "restore a copy or move it away")
        return None

    def _meta(self, step: int) -> dict:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            if (meta["format"], meta["step"]) != (FORMAT, step):
                raise ValueError(f"format {meta['format']} step {meta['step']}, expected {FORMAT} and {step}")
        except Exception as error:  # Orbax raises bare Exception, KeyError or JSONDecodeError for torn files
            raise _unreadable(step, error, "meta: ") from error
        return meta

    def _restore(self, step: int, layout: dict[str, object], meta: dict) -> dict[str, object]:
        if not layout:
            return {}  # Orbax takes an empty request for everything
        try:
            args = {item: ocp.args.StandardRestore(want) for item, want in layout.items()}
            restored = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except Exception as error:  # as in _meta
            raise _unreadable(step, error) from error
        for item, tree in restored.items():
            _check_digests(step, item, tree, meta)
        return restored

    def _readers(self, step: int, layout: dict[str, dict], meta: dict) -> dict[str, dict[str, Callable]]:
        """Functions that read and check one array each; every one has been called once."""
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def read(item: str, name: str) -> jax.Array:
            want = {name: layout[item][name]}
            placed = ocp.checkpoint_utils.construct_restore_args(want)
            args = ocp.args.PyTreeRestore(item=want, restore_args=placed, partial_restore=True)
            try:
                tree = reader.restore(self.directory / str(step) / item, args=args)
            except Exception as error:  # as in _meta
                raise _unreadable(step, error) from error
            _check_digests(step, item, tree, meta)
            return tree[name]

        readers = {item: {name: partial(read, item, name) for name in want} for item, want in layout.items()}
        for item in readers.values():
            for call in item.values():
                call()
        return readers


def _items(state: TrainState) -> dict[str, object]:
    averages = {f"ema_{name}": average for name, average in state.ema.items()}
    return {"params": state.params, "optimizer": state.opt_state, **averages}


def restore_state(
    checkpoints: Checkpoints, layout: TrainState, before_reading: Callable[[dict], None] = lambda meta: None
) -> tuple[TrainState, dict] | None:
    """The newest whole state in the given layout and its meta, or None for a fresh run; see `restore_newest`."""
    found = checkpoints.restore_newest(lambda meta: _items(layout), before_reading=before_reading)
    if found is None:
        return None
    items, meta = found
    step = jax.device_put(jnp.int32(meta["step"]), layout.step.sharding)
    averages = {name: items[f"ema_{name}"] for name in layout.ema}
    return TrainState(step, items["params"], averages, items["optimizer"]), meta


def write_step(directory: str | os.PathLike, step: int, items: dict[str, dict], meta: dict) -> None:
    """One committed step of `items` {item: {leaf: jax.Array}} in the new checkpoint directory `directory`.

    Unlike `save` it keeps no second copy of the arrays: what is being written at a time is bounded.
    Raises: UserError when it cannot be written.
    """
    meta = {"format": FORMAT, "step": step, **meta, "arrays": {k: describe(v) for k, v in items.items()}}
    largest = max(leaf.nbytes for item in items.values() for leaf in item.values())
    limit = max(_WRITTEN_AT_ONCE, largest) / 1e9  # Orbax refuses an array that is larger
    handlers = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=limit) for name in items}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False,
        atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE),
    )
    saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    try:
        path = Path(directory).absolute()
        manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        with abandoned_unheard(), manager:
            manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saves))
    except (OSError, ValueError) as error:  # ValueError: how a full disk comes back
        raise UserError(f"the checkpoint could not be written: {first_line(error)}; "
                        "free space or write elsewhere") from error


def _check_layout(layout: dict[str, object], meta: dict) -> None:
    for item, want in layout.items():
        _check_arrays(item, want, meta["arrays"])


def _check_digests(step: int, item: str, tree, meta: dict) -> None:
    for name, found in describe(tree).items():
        if found != meta["arrays"][item][name]:
            raise Damaged(f"checkpoint step {step} is damaged: {item}/{name} does not match its digest")


def _check_arrays(item: str, want, stored: dict) -> None:
    """The first difference between what is asked for and what is stored, in one line."""
    if item not in stored:
        raise UserError(f"checkpoint holds no {item}; it has {', '.join(stored)}")
    wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaf_names(want).items()}
    for name in sorted(wanted.keys() | stored[item].keys()):
        shape, dtype = wanted.get(name, (None, None))
        stored_shape, stored_dtype = stored[item].get(name, (None, None, None))[:2]
        if (shape, dtype) != (stored_shape, stored_dtype):
            raise UserError(
                f"checkpoint array {item}/{name} is {stored_dtype or 'absent'} {stored_shape or ''} but the config "
                f"wants {dtype or 'none'} {shape or ''}; use the config it was trained with or another --workdir"
            )


def _has_files(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and any(path.iterdir())
