"""Checkpoints by the clock, and what they cost."""

import contextlib
import time
from collections.abc import Iterator


class SaveClock:
    """When the last checkpoint was begun, and what checkpoints cost."""

    def __init__(self, minutes: float):
        self._seconds, self._last, self._spent, self._began = minutes * 60, time.monotonic(), 0.0, time.monotonic()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save."""
        self._last = time.monotonic()
        yield
        self._spent += time.monotonic() - self._last

    def is_due(self) -> bool:
        """Whether the last one is older than allowed."""
        return self._seconds > 0 and time.monotonic() - self._last > self._seconds

    def share(self) -> float:
        """The share of the time since the last call that steps waited for saves, 0 to 1."""
        now = time.monotonic()
        share, self._spent, self._began = self._spent / max(now - self._began, 1e-9), 0.0, now
        return share
