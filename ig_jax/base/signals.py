"""Signals that ask a command to stop."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from ig_jax.base.errors import RESUMABLE, Preempted

AGAIN = "rerun the same command to resume"
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

# Told of the last line and the exit code by a process that leaves at once: how its peers hear of it.
farewells: list[Callable[[str, int], None]] = []


def heeded() -> list[signal.Signals]:
    """The signals that ask to stop; SIGHUP is none where it is ignored, as under nohup."""
    return [n for n in NUMBERS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def stop_on_signals() -> None:
    """Let each of these signals end a command where it stands, by raising Preempted."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{signal.Signals(number).name}; {AGAIN}")

    for number in heeded():
        signal.signal(number, stop)


def leave_at_once() -> None:
    """Let each of these signals end the process with RESUMABLE, in the middle of a compilation too.

    For a command that has nothing to save yet. Python would run its handlers only once a library returns, so a thread
    reads the numbers of the signals. A StopRequest takes over.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in heeded():
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(write)
    threading.Thread(target=_leave, args=(read,), daemon=True).start()


def _leave(read: int) -> None:
    line = f"{signal.Signals(os.read(read, 1)[0]).name} before the first step; {AGAIN}"
    print(f"ig_jax: stopped: {line}", file=sys.stderr, flush=True)
    for farewell in farewells:
        farewell(line, RESUMABLE)
    os._exit(RESUMABLE)


def ignore() -> None:
    """Let none of them change the exit code of a command that is done: Python's own end would give them back."""
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Inside this context the signals only set `name`, for a loop that saves and then leaves."""

    def __init__(self) -> None:
        self.name = ""  # of the last signal received

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in heeded()}
        self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
