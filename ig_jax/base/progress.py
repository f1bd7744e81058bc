"""Progress with a rate and the time left: a live bar on a terminal, plain lines in a log."""

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator

LINE = 10.0  # seconds between two plain lines of what counts often
REDRAW = 0.1  # seconds between two drawings of a live line


def duration(seconds: float) -> str:
    """1:02:03 or 2:03, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts finished units of work, with a rate and the time left."""

    def __init__(self, total: int, unit: str, *, start: int = 0, stream=None):
        self._total, self._unit = total, unit
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = -math.inf
        self.restart(start)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._live and self._drawn > 0:
            self._draw()
            print(file=self._stream, flush=True)

    def restart(self, done: int) -> None:
        """Begin anew after `done` units, which do not count for the rate."""
        self.done, self._rate = done, 0.0
        self._texts: tuple[str, ...] = ()
        self._marks = [(done, time.monotonic())]  # the start, and the ends of the first three counts

    def advance(self, count: int = 1) -> None:
        """Count `count` more finished units."""
        self.done += count
        if len(self._marks) <= 3:
            self._marks.append((self.done, time.monotonic()))
        if self._live and time.monotonic() - self._drawn > REDRAW:
            self._draw()

    def count(self, text: str) -> None:
        """Count one finished unit, and show `text` after each quarter of all."""
        self.advance()
        if self.done % -(-self._total // 4) == 0 or self.done == self._total:
            self.show(text)

    def rate(self) -> float:
        """Units per second, without the first ones, which wait for a compilation; with them until two others followed.

        The second ones alone may have been computed meanwhile.
        """
        done, began = self._marks[1 if len(self._marks) > 3 else 0]
        return (self.done - done) / max(time.monotonic() - began, 1e-9)

    def show(self, *texts: str, rate: float = 0.0, every: float = 0.0) -> None:
        """Show the count, the rate (by default the mean of all), the time left and `texts`.

        every: seconds between two plain lines; the last one is always shown.
        """
        self._texts, self._rate, now = texts, rate, time.monotonic()
        if self._live:
            self._draw()
        elif now - self._drawn >= every or self.done >= self._total:
            self._drawn = now
            print("  ".join(self._parts()), file=self._stream, flush=True)

    def _parts(self) -> list[str]:
        rate = self._rate or self.rate()
        left = duration((self._total - self.done) / max(rate, 1e-9))
        count = f"{self.done}/{self._total} {self._unit}"
        return [count, f"{rate:{',.0f' if rate >= 100 else '.3g'}} {self._unit}/s", f"left {left}", *self._texts]

    def _draw(self) -> None:
        """One line in place: the parts that fit."""
        width, line = shutil.get_terminal_size().columns - 1, ""
        for part in self._parts():
            longer = f"{line}  {part}" if line else part
            line = longer if len(longer) <= width else line
        self._drawn = time.monotonic()
        print(f"\r{line[:width]}\x1b[K", end="", file=self._stream, flush=True)


@contextlib.contextmanager
def waiting(what: str, every: float = 10.0, stream=None) -> Iterator[None]:
    """Print every `every` seconds how long something of unknown length has taken."""
    stream, done, began = stream or sys.stderr, threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every):
            print(f"{what}, {duration(time.monotonic() - began)}", file=stream, flush=True)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
