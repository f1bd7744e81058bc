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
    """Counts done units of work; `show` adds what else is worth reading."""

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

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def rate(self) -> float:
        """Units a second since the start, compilation included."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def show(self, text: str) -> None:
        """`text` beside the bar, or as one line with the count, the rate and the time left."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        left = duration((self._total - self.done) / max(self.rate(), 1e-9))
        print(f"{self.done}/{self._total} {self._unit}  {text}  left {left}", file=self._stream, flush=True)


@contextlib.contextmanager
def waiting(what: str, every: float = 10.0, stream=None) -> Iterator[None]:
    """Say every `every` seconds how long something of unknown length has taken."""
    stream, done, began = stream or sys.stderr, threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"{what}, {duration(time.monotonic() - began)}", file=stream, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _bar(total: int, start: int, unit: str, stream):
    from tqdm import tqdm  # late: only a terminal needs it, and a machine with nothing but JAX lacks it

    return tqdm(total=total, initial=start, unit=f" {unit}", file=stream)
