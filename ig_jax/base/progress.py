"""Progress with a rate and the time left: a live bar on a terminal, plain lines in a log."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


def duration(seconds: float) -> str:
    """1:02:03 or 2:03, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts finished units of work, with a rate and the time left."""

    def __init__(self, total: int, unit: str, *, start: int = 0, stream=None):
        self._total, self._unit, self._start, self.done = total, unit, start, start
        stream = sys.stderr if stream is None else stream
        self._stream = stream
        self._began = time.monotonic()
        self._bar = _bar(total, start, unit, stream) if stream.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()

    def restart(self, done: int) -> None:
        """Begin anew after `done` units, which do not count for the rate."""
        self._start = self.done = done
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.n = self._bar.initial = done
            self._bar.refresh()

    def advance(self, count: int = 1) -> None:
        """Count `count` more finished units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def count(self, text: str) -> None:
        """Count one finished unit, and show `text` after each quarter of all."""
        self.advance()
        if self.done % -(-self._total // 4) == 0 or self.done == self._total:
            self.show(text)

    def rate(self) -> float:
        """Units per second since the start, compilation included."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def show(self, text: str) -> None:
        """Print `text` next to the bar, or on a line with the count and the time left."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        left = duration((self._total - self.done) / max(self.rate(), 1e-9))
        print(f"{self.done}/{self._total} {self._unit}  {text}  left {left}", file=self._stream, flush=True)


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


def _bar(total: int, start: int, unit: str, stream):
    from tqdm import tqdm  # late: only a terminal needs it, and a machine with nothing but JAX lacks it

    return tqdm(total=total, initial=start, unit=f" {unit}", file=stream)
