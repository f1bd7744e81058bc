"""`ig_jax.train` with a fault on purpose:  python tests/faulty.py KIND@STEP:PROCESS --config=... --workdir=...

KIND: raise an exception; hang in Python; gil, hang while holding Python's lock; save, hang in place of a save; skip,
go on without it; torn, kill the process while the save is written.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from ig_jax import train
from ig_jax.base import cli, signals
from ig_jax.checkpoints.steps import Checkpoints
from ig_jax.training import hooks, loop

FOREVER = 600  # seconds; the test would fail long before


def main(kind: str, step: int, process: int) -> None:
    def due(now: int) -> bool:
        return now == step and jax.process_index() == process

    def fault(moment) -> None:
        if due(moment.step):
            if kind == "raise":
                raise RuntimeError("boom")
            if kind == "hang":
                time.sleep(FOREVER)
            if kind == "gil":
                ctypes.PyDLL(None).sleep(FOREVER)  # PyDLL, unlike CDLL, keeps the lock

    save, sound = Checkpoints.save, loop.train

    def faulty_save(self, now, *rest) -> None:
        if kind == "save" and due(now):
            time.sleep(FOREVER)
        if kind != "skip" or not due(now):
            save(self, now, *rest)
        if kind == "torn" and due(now):
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = faulty_save
    hook = hooks.Hook(1, fault)
    loop.train = lambda experiment, workdir, **more: sound(experiment, workdir, [hook], **more)
    signals.leave_at_once()
    cli.run(train.main, train.FLAGS, train.__doc__)


if __name__ == "__main__":
    kind, _, place = sys.argv.pop(1).partition("@")
    main(kind, *map(int, place.split(":")))
