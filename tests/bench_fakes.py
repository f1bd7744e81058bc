"""Runners and workers that do nothing, for tests of what surrounds them; a module, so that a worker can import it."""

import dataclasses
import os
import time

from ig_jax import benchmark
from ig_jax.base.errors import UserError
from ig_jax.benchmarking import cases
from ig_jax.benchmarking.worker import Failed

TINY = (  # flags of a network of one narrow block
    *("--model=SiT-S/2", "--width=64", "--depth=1", "--latent=8"),
    *("--batch=2", "--devices=1", "--repeats=1", "--warmup=1"),
)


def case(**changes) -> cases.Case:
    """SiT of one narrow block on one device."""
    made = cases.published("SiT-XL/2")
    small = {"width": 72, "depth": 1, "latent": 8, "batch": 2, "devices": 1, "dtype": "float32"}
    for name, value in (small | changes).items():
        made = cases.changed(made, benchmark.AXES.get(name, [f"sample.{name}"])[0], value)
    return made


class Runner:
    """In a worker: fails in the way its values say, or sleeps."""

    def __init__(self, values: dict):
        name = values["name"]
        print("what libraries print is no answer")
        if name == "user":
            raise UserError(name="x", value=1, expected="2", fix="do so")
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
    """A worker without a process that logs what it is asked for."""

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

    def ask(self, request: str, *arguments):
        self._did(request)
        return [self.seconds, self.seconds / 2] if request == "turn" else {"answer": 42}

    def close(self) -> None:
        self.log.append(f"{self.name}:close")
