"""The work directory of a run: its lease, and metrics.jsonl."""

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError
from ig_jax.base.files import atomic_file, lock, run_path

METRICS = "metrics.jsonl"


def prepare(workdir: str) -> Path:
    """The directory, created and checked to be writable.  Raises: UserError naming it."""
    path = run_path(workdir, "workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            name="workdir",
            value=workdir,
            expected=f"a writable directory ({error.strerror})",
            fix="choose another --workdir",
        ) from error
    return path


class Lease:
    """A lock held by the one process that may write to a work directory; the system frees it when that process dies."""

    def __init__(self, workdir: Path):
        self._path = workdir / ".lease"

    def __enter__(self) -> "Lease":
        if is_remote(self._path):
            warning = f"{self._path.parent} cannot be locked, as no bucket can; use it from one run at a time"
            print(f"ig_jax: warning: {warning}", file=sys.stderr, flush=True)
            self._file: IO = io.StringIO()
            return self
        self._file = open(self._path, "a+")
        if not lock(self._file, self._path.parent):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            workdir = str(self._path.parent)
            raise UserError(
                f"workdir={workdir!r} is in use by {holder}",
                name="workdir",
                value=workdir,
                expected="used by no other process",
                fix="wait for it, stop it, or choose another --workdir",
            )
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        self._file.flush()
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold metrics of a step, in order."""
    return list(_metrics(_lines(workdir / METRICS)))


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []


def _metrics(lines: Iterable[str]) -> Iterator[dict]:
    for line in lines:
        with contextlib.suppress(ValueError):  # torn
            found = json.loads(line)
            if isinstance(found, dict) and "step" in found:
                yield found


def last_sign_of_life(workdir: Path) -> tuple[float, float]:
    """(seconds after the first start of the run, the time) of the last line of metrics.jsonl, (0, 0) for none."""
    latest = _metrics(reversed(_lines(workdir / METRICS)))
    alive = next((line["seconds/total"] for line in latest if "seconds/total" in line), 0.0)
    # An object in a bucket has no time that its library gives alike everywhere: then no time between is known.
    at = time.time() if is_remote(workdir) else (workdir / METRICS).stat().st_mtime if alive else 0.0
    return alive, at


class MetricsFile:
    """metrics.jsonl: a line for each logged step, once, however often the run was interrupted, and for each start."""

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS

    def cut(self, step: int) -> None:
        """Leave out the lines after `step`, from which a run goes on, and what a kill has left of the last one."""
        kept = [line for line in _lines(self._path)[:-1] if self._step(line) <= step]
        self._replace("".join(f"{line}\n" for line in kept))

    def _replace(self, text: str) -> None:
        with atomic_file(self._path) as file:
            file.write(text.encode())

    @staticmethod
    def _step(line: str) -> float:
        """The step of a line, 0 for a start; infinity where it is no JSON, as a power failure may leave it."""
        try:
            found = json.loads(line)
            return 0 if {"start", "ready"} & found.keys() else found["step"]
        except (ValueError, TypeError, LookupError, AttributeError):
            return math.inf

    def write(self, step: int, metrics: Mapping[str, float | dict]) -> None:
        """Append the line of a step; float32 values read back bitwise identical."""
        self.add({"step": step, **metrics})

    def add(self, record: dict) -> None:
        """Append one line."""
        line = json.dumps(record) + "\n"
        if is_remote(self._path):  # whose objects cannot be appended to
            return self._replace(self._path.read_text() + line)
        with open(self._path, "a") as file:
            file.write(line)
