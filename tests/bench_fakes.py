"""Runners and workers that do nothing, for tests of what is around them; a module, so that a worker can import it."""

import dataclasses
import os
import time

from ig_jax.benchmarking import cases
from ig_jax.benchmarking.timing import Turn
from ig_jax.benchmarking.worker import Failed
from ig_jax.errors import UserError


def case(**changes) -> cases.Case:
    """SiT of one narrow block on one device."""
    made = cases.changed(cases.published("SiT-S/2"), "width", 64)
    for axis, value in {"depth": 1, "latent": 8, "batch": 2, "devices": 1, **changes}.items():
        made = cases.changed(made, axis, value)
    return made


class Runner:
    """In a worker: fails in the way its name says, or sleeps."""

    def __init__(self, name: str):
        if name == "user":
            raise UserError("x=1 must be 2")
        if name == "memory":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
        if name == "killed":
            os.kill(os.getpid(), 9)
        self.report = {"threads": os.environ.get("OMP_WAIT_POLICY"), "pid": os.getpid()}

    def run(self, calls: int) -> None:
        time.sleep(0.01 * calls)

    def finish(self) -> dict:
        return {"answer": 42}


@dataclasses.dataclass
class FakeWorker:
    """Instead of a process: writes down what is asked of it."""

    name: str
    log: list[str]
    platform: str = "cpu"
    seconds: float = 1.0
    fails_at: str = ""
    error: type = Failed

    def __post_init__(self):
        self._did("open")
        self.report = {"hardware": {"platform": self.platform}}

    def _did(self, what: str) -> None:
        self.log.append(f"{self.name}:{what}")
        if what == self.fails_at:
            raise self.error(f"{what} went wrong")

    def turn(self, calls: int, patience: float = 0.0) -> Turn:
        self._did("turn")
        return Turn(self.seconds, self.seconds / 2, 0.0)

    def finish(self) -> dict:
        self._did("finish")
        return {"memory": {}}

    def close(self) -> None:
        self.log.append(f"{self.name}:close")
