"""The work directory: one live run at a time, signals that ask it to stop, and the record of its metrics."""

import fcntl
import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import jax

from ig_jax.errors import UserError


def prepare(workdir: str) -> Path:
    """The directory, made and proved writable.  Raises: UserError naming it."""
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"workdir={workdir!r} must be a writable directory ({error.strerror}); "
                        "choose another --workdir") from error
    return path


class Lease:
    """Held by the one process that may write a work directory; the system drops it when that process dies."""

    def __init__(self, workdir: Path):
        self._path = workdir / ".lease"

    def __enter__(self) -> "Lease":
        self._file = open(self._path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"workdir={str(self._path.parent)!r} is in use by {holder}; wait for it, stop it, "
                            "or choose another --workdir") from error
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        self._file.flush()
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and leave; asking twice changes nothing."""

    def __init__(self):
        self.name = ""

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.name = signal.Signals(number).name


class MetricsFile:
    """metrics.jsonl: one line for each logged step, each step once, however often the run was cut off."""

    def __init__(self, workdir: Path, resumed_at: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in self._lines() if self._step(line) <= resumed_at]
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text("".join(f"{line}\n" for line in kept))
        os.replace(fresh, self._path)

    def _lines(self) -> list[str]:
        """Whole lines; a process killed while writing leaves at most one torn line, the last."""
        if not self._path.exists():
            return []
        return self._path.read_text(errors="replace").split("\n")[:-1]

    @staticmethod
    def _step(line: str) -> float:
        """Infinity for a line that is none, as a machine that lost its power may leave."""
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, LookupError):
            return math.inf

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; float32 values are written so that they read back to the same bits."""
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def as_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Scalars on the host."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
