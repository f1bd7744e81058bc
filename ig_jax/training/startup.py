"""The start of a run: what it was started with, and how long it took to its first step; two lines of metrics.jsonl."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from ig_jax.base.versions import versions
from ig_jax.parallel import processes
from ig_jax.training.hooks import Moment
from ig_jax.training.workdir import MetricsFile

_EVENTS = {"/jax/compilation_cache/cache_hits": "cached", "/jax/compilation_cache/cache_misses": "compiled"}


class Startup:
    """The record of a start and stopwatches of its parts; a context manager, which counts compiled programs."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._programs: list[tuple[str, int]] = []  # how each was made, and the thread that asked for it
        self._step_cached = self._ready = False

    def __enter__(self) -> "Startup":
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *exception) -> None:
        jax.monitoring.unregister_event_listener(self._count)

    def _count(self, event: str, **details: Any) -> None:
        if event in _EVENTS:
            self._programs.append((_EVENTS[event], threading.get_ident()))

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Around a part of the start: "state", or "compile", which is done in a thread of its own."""
        began, before = time.perf_counter(), len(self._programs)
        yield
        self._seconds[part] = time.perf_counter() - began
        if part == "compile":
            self._step_cached = ("cached", threading.get_ident()) in self._programs[before:]

    def begin(self, file: MetricsFile, step: int, changed: dict[str, tuple]) -> None:
        """Write what this start sets otherwise than the checkpoint that it goes on from, and what it runs on."""
        self._file = file
        found = {
            "step": step,
            "time": round(time.time(), 3),
            "changed": {name: list(values) for name, values in changed.items()},
            "versions": versions(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
        }
        file.add({"start": found})

    def stepping(self) -> None:
        """The first step begins."""
        self._began = time.perf_counter()

    def ready(self, moment: Moment) -> None:
        """Wait for the first step; print and write how long the parts of the start took."""
        if self._ready or not processes.is_first():
            return
        jax.block_until_ready(moment.metrics)
        self._seconds["first_step"], self._ready = time.perf_counter() - self._began, True
        s = {name: round(seconds, 2) for name, seconds in self._seconds.items()}
        counts = {how: sum(how == made for made, _ in self._programs) for how in _EVENTS.values()}
        how = f"{'from the cache' if self._step_cached else 'compiled'} in {s['compile']} s"
        print(
            f"ready       state in {s['state']} s; step {how}; first step {s['first_step']} s; "
            f"{counts['cached']} programs from the cache, {counts['compiled']} compiled",
            flush=True,
        )
        found = {"step": moment.step, "seconds": s, "step_cached": self._step_cached, "programs": counts}
        self._file.add({"ready": found})
