"""The end of a run that has stopped moving: every stack on stderr, one line, and exit 75 in all processes."""

import collections
import faulthandler
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from ig_jax.base.errors import RESUMABLE
from ig_jax.base.signals import AGAIN
from ig_jax.parallel import peers

Batch = dict
STARTING = 3600.0  # seconds to restore and compile
LEAST, FACTOR = 120.0, 10  # the deadline of a step where none is given: so many times the median, and at least this
BACKSTOP = 30.0  # seconds later Python's own timer ends a process whose lock a library holds


class Watchdog:
    """Ends the process where the loop does not come back in time; a context manager.

    deadline: seconds for a step and for each hook, 0 for 10 times the median step and at least 120.
    """

    def __init__(self, deadline: float):
        self._deadline = deadline
        self._steps: collections.deque[float] = collections.deque(maxlen=100)
        self._began, self._limit, self._what = time.monotonic(), STARTING, "the start"
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def timed(self, batches: Iterable[Batch], done: int) -> Iterator[Batch]:
        """The batches of the steps after `done`, each step timed from the reading of its batch on."""
        feed = iter(batches)
        for step in itertools.count(done + 1):
            began = time.monotonic()
            # The first ones load programs and open files.
            self.expect(f"step {step}", 1 if self._steps else 5)
            faulthandler.dump_traceback_later(self._limit * FACTOR + BACKSTOP, exit=True, file=2)
            yield next(feed)
            self._steps.append(time.monotonic() - began)

    def expect(self, what: str, patience: float = 1) -> None:
        """`what` begins, and may take `patience` times as long as a step."""
        least = max(LEAST, FACTOR * statistics.median(self._steps)) if self._steps else LEAST
        self._limit, self._what = patience * (self._deadline or least), what
        self._began = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            if time.monotonic() - self._began > self._limit:
                peers.LEAVING.acquire()
                line = f"{self._what} took more than {self._limit:.0f} s; every stack is above, {AGAIN}"
                faulthandler.dump_traceback(2)
                print(f"ig_jax: stopped: {line}", file=sys.stderr, flush=True)
                peers.leave(line, RESUMABLE, stacks=True)
