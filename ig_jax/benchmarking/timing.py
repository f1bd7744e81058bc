"""Two clocks and what others did meanwhile: turns, and what a series of them says."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence

QUIET = 0.08  # share of the machine that others may use while it counts as idle


@dataclasses.dataclass(frozen=True)
class Turn:
    """One measurement, per call: seconds by the wall, CPU seconds of this process, and the share of the
    machine's cores that others used meanwhile (None where the system does not say).
    """

    wall: float
    cpu: float
    foreign: float | None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(run: Callable[[int], None], calls: int) -> Turn:
    """A turn of `calls` calls; run(calls) returns when the last of them is finished."""
    busy, cpu, wall = _busy(), time.process_time(), time.perf_counter()
    run(calls)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = _busy()
    foreign = None
    if busy is not None and after is not None:  # counted in ticks, so a short turn may seem to have more than all
        foreign = min(max(0.0, after - busy - cpu) / (wall * (os.cpu_count() or 1)), 1.0)
    return Turn(wall / calls, cpu / calls, foreign)


def wait_until_quiet(patience: float) -> None:
    """Return when others use less than QUIET of the machine, or after `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if (timed(lambda calls: time.sleep(0.2), 1).foreign or 0.0) < QUIET:
            return


def _busy() -> float | None:
    """CPU seconds that all processes of the machine have used so far (steal included)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest of a series."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratio of the medians, and the least and greatest ratio of two neighbouring turns."""
    paired = [a / b for a, b in zip(ours, others)]
    return Spread(statistics.median(ours) / statistics.median(others), min(paired), max(paired))
