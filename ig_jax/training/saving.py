"""Checkpoints by the clock."""

import time


class SaveClock:
    """When the last checkpoint was begun."""

    def __init__(self, minutes: float):
        self._seconds, self._last = minutes * 60, time.monotonic()

    def begin(self) -> None:
        """A checkpoint is begun."""
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last one is older than allowed."""
        return self._seconds > 0 and time.monotonic() - self._last > self._seconds
