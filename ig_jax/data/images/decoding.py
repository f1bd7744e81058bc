"""Decoding of images in worker processes, ahead of what consumes them."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ig_jax.base.errors import UserError
from ig_jax.data import crop
from ig_jax.data.images.listing import Images

AHEAD = 3  # parts in the hands of each worker, decoded ones included


class Part(NamedTuple):
    """Some images of a source, decoded."""

    rows: range  # in the source
    pixels: np.ndarray  # uint8 (len(rows), size, size, channels); zeros for a broken image
    broken: dict[int, str]  # row -> why it cannot be decoded


class Decoder:
    """Worker processes that decode parts of a source; use it in a `with`."""

    def __init__(self, images: Images, size: int, workers: int, channels: int = 3):
        self._images, self._size, self._channels, self._workers = images, size, channels, workers
        # Spawned, not forked: a fork of a process with the threads of JAX may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def parts(self, rows: Iterable[range]) -> Iterator[Part]:
        """The decoded images of each range of rows, in order.

        Raises: UserError when a file cannot be read, or a worker was killed.
        """
        pending: collections.deque[tuple[range, concurrent.futures.Future]] = collections.deque()
        try:
            for part in rows:
                places = [self._images.places[row] for row in part]
                arguments = (self._images.read, places, self._size, self._channels)
                pending.append((part, self._pool.submit(decode_all, *arguments)))
                if len(pending) >= AHEAD * self._workers:
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        except concurrent.futures.process.BrokenProcessPool as error:
            problem = "a decoding process was killed, perhaps for want of memory"
            raise UserError(problem, name="--workers", value=self._workers, fix="use fewer --workers") from error
        finally:
            for _, future in pending:
                future.cancel()


def decode_all(
    read: Callable[[Any], list[bytes]], places: list, size: int, channels: int
) -> tuple[np.ndarray, dict[int, str]]:
    """(pixels uint8 (N, size, size, channels), why an image is broken by its number) of the images at some places."""
    pixels, broken = np.zeros((len(places), size, size, channels), np.uint8), {}
    for number, data in enumerate(read(places)):
        try:
            pixels[number] = crop.decode(data, size, channels)
        except ValueError as error:
            broken[number] = str(error)
    return pixels, broken


def _finished(rows: range, future: concurrent.futures.Future) -> Part:
    pixels, broken = future.result()
    return Part(rows, pixels, {rows[number]: reason for number, reason in broken.items()})


def _begin() -> None:
    """Prepare a worker: it leaves Ctrl-C to its parent, and ends when the parent has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF data, which are ignored anyway
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
