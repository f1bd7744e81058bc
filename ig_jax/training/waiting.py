"""Waiting for data: the share of the wall time in which the devices had nothing to do."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

Batch = dict


class Waiting:
    """Measures how long steps wait for their batches.

    The host runs ahead of the devices. Reading a batch costs them nothing as long as the step before it has not
    finished; the time counts where that step is done when the batch arrives, and then all of it.
    """

    def __init__(self, tell: Callable[[float], None] = lambda seconds: None):
        self._began, self._lost = time.perf_counter(), 0.0
        self._tell = tell  # of the seconds of each wait
        self._running: Any = None  # an array of the last step, whose `is_ready` no type declares

    def batches(self, feed: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of `feed`, timed."""
        source = iter(feed)
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            if self._running is not None and self._running.is_ready():
                seconds = time.perf_counter() - began
                self._lost += seconds
                self._tell(seconds)
            yield batch

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """A step has been given to the devices; it is done when its metrics are there."""
        self._running = jax.tree.leaves(metrics)[0]

    def share(self) -> float:
        """The share of the wall time since the last call, 0 to 1."""
        now = time.perf_counter()
        share = self._lost / max(now - self._began, 1e-9)
        self._began, self._lost = now, 0.0
        return share
