"""What a run writes of its steps: metrics.jsonl and TensorBoard, and the means between two lines of them."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.config.experiment import Experiment
from ig_jax.diffusion import curves
from ig_jax.parallel import processes
from ig_jax.training.goodput import Goodput
from ig_jax.training.resume import flat
from ig_jax.training.tensorboard import TensorBoard
from ig_jax.training.waiting import Waiting
from ig_jax.training.workdir import MetricsFile


class Records:
    """metrics.jsonl and TensorBoard of a run from step `start` on, each step once; the first process writes."""

    def __init__(self, e: Experiment, file: MetricsFile, tensorboard: TensorBoard, goodput: Goodput, start: int):
        self._file, self._tensorboard, self._goodput = file, tensorboard, goodput
        if processes.is_first():
            tensorboard.begin(start, flat(e.as_dict()))

    def write(self, step: int, values: Mapping[str, float | dict]) -> None:
        """A line of numbers and curves by name, with the time and what it went to; TensorBoard gets the numbers."""
        if processes.is_first():
            line = {**values, "time": round(time.time(), 3), **self._goodput.metrics()}
            self._file.write(step, line)
            self._tensorboard.scalars(step, {name: v for name, v in line.items() if not isinstance(v, dict)})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture uint8 (H, W, 3), for TensorBoard."""
        if processes.is_first():
            self._tensorboard.image(step, name, picture)


class Window:
    """The steps since the last line: means of their metrics, their speed, and their waiting for data.

    Time that evaluation took between them is none of theirs.
    """

    def __init__(self, waiting: Waiting, goodput: Goodput):
        self._waiting, self._goodput = waiting, goodput
        self._sums: Any = None  # of the finite values and of their number, stacked, on the devices
        self._last: dict[str, Any] = {}
        self._steps, self._began = 0, self._now()

    def add(self, metrics: dict[str, Any]) -> None:
        """Count the metrics of a step; nothing is fetched."""
        self._sums = _added(self._sums, metrics)
        self._steps, self._last = self._steps + 1, metrics

    def close(self) -> dict[str, Any]:
        """The values of this window by name, and begin the next; without what was finite in no step."""
        values: dict[str, Any] = {}
        sums, rate = jax.device_get((self._sums or {}, self._last.get("learning_rate")))
        with np.errstate(invalid="ignore"):  # 0 of 0
            means = jax.tree.map(lambda total: total[0] / total[1], sums)
        for name, mean in means.items():
            if isinstance(mean, curves.Curve):
                values |= curves.plain(name, mean)
            elif np.isfinite(mean):
                values[name] = float(mean)
        if rate is not None:
            values["learning_rate"] = float(rate)  # where the schedule is, not where it was
        now = self._now()
        speed = self._steps / max(now - self._began, 1e-9)
        self._sums, self._steps, self._began = None, 0, now
        return values | {"steps_per_second": speed, "data_wait": self._waiting.share()}

    def _now(self) -> float:
        return time.perf_counter() - self._goodput.metrics()["seconds/evaluation"]


@functools.partial(jax.jit, donate_argnums=0)
def _added(sums, metrics):
    """The sums with one step more; None before the first."""
    finite = lambda value: jnp.stack([jnp.where(jnp.isfinite(value), value, 0), jnp.isfinite(value)])
    found = jax.tree.map(finite, metrics)
    return found if sums is None else jax.tree.map(jnp.add, sums, found)
