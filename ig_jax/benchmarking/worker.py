"""Programs in processes of their own, timed in turns A B A B.

Each process has its own peak memory, device count and thread pools, and may run the code of another checkout. The
process that drives them touches no device. A program is an object with `report` (dict), `run(calls)` and
`finish()` -> dict; `serve` answers requests about it, each one line of JSON.
"""

import contextlib
import dataclasses
import json
import math
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any, NamedTuple

from ig_jax.base.cli import collect_less_often, platform_problem
from ig_jax.base.errors import UserError, one_line

THIS = "ig_jax"
SERVE = [sys.executable, "-m", "ig_jax.benchmarking.worker"]
MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "bad_alloc", "MemoryError", "ended with -9")
END_TIMEOUT = 20  # seconds that a worker has to end by itself
TURN_SECONDS = 0.2  # the least time of a turn, in whole calls


class Failed(RuntimeError):
    """A program failed: a message of one line, with the traceback in `detail`."""

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.detail = detail

    @property
    def is_memory(self) -> bool:
        """Whether the program did not fit into memory."""
        return any(word in str(self) + self.detail for word in MEMORY_WORDS)


class Turn(NamedTuple):
    """One measurement, in seconds per call."""

    wall: float
    cpu: float  # of the worker's process, all threads together


class Worker:
    """A process that serves one program; `report` is its first answer.

    request: [what to make, "module:class", and its argument]; directory: of another checkout, whose code it runs.
    Raises: UserError from the program as it is, anything else as Failed.
    """

    def __init__(
        self, request: list, variables: dict[str, str], command: list[str] = SERVE, directory: Path | None = None
    ):
        environment = os.environ | variables
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=directory, env=environment)
        try:
            self.report: dict[str, Any] = self.ask(*request)
        except BaseException:
            self.close()
            raise

    def ask(self, *request: Any) -> Any:
        """The answer to the name of a request and its arguments.  Raises: UserError or Failed as there."""
        assert self._process.stdin and self._process.stdout
        line = ""
        with contextlib.suppress(OSError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:  # the kernel kills what needs more memory than there is
            raise Failed(f"the worker ended with {self._process.wait(END_TIMEOUT)}")
        try:
            kind, answer = json.loads(line)
        except ValueError:
            raise Failed(f"the worker answered {line[:80]!r}, not a line of JSON") from None
        if kind == "refused":
            raise UserError(**answer)
        if kind == "failed":
            raise Failed(*answer)
        return answer

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=END_TIMEOUT)
        except TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def serve(make: Callable[[str], Callable[[dict], Any]] = pkgutil.resolve_name) -> None:
    """Answer the requests on standard input about the program make(name)(values); an exception is the last answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(kind: str, value: Any) -> None:
        print(json.dumps([kind, value], default=str), file=answers, flush=True)

    try:
        name, values = json.loads(sys.stdin.readline())
        program = make(name)(values)
        answer("report", program.report)
        for line in sys.stdin:
            request, *arguments = json.loads(line)
            answer(request, REQUESTS[request](program, *arguments))
    except UserError as error:
        problem, parts = str(error).removesuffix(f"; {error.fix}"), ("name", "value", "expected", "fix")
        answer("refused", {"problem": problem} | {part: getattr(error, part) for part in parts})
    except KeyboardInterrupt:
        return  # the driver has it too
    except Exception as error:
        detail = traceback.format_exc()
        answer("failed", [str(platform_problem() or f"{type(error).__name__}: {one_line(error)}"), detail])


def _turn(program: Any, calls: int) -> Turn:
    cpu, wall = time.process_time(), time.perf_counter()
    program.run(calls)
    return Turn((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


def _profile(program: Any, directory: str) -> None:
    import jax  # late: a peer need not have it

    with jax.profiler.trace(directory):
        program.run(3)


REQUESTS: dict[str, Callable] = {"turn": _turn, "profile": _profile, "finish": lambda program: program.finish()}


@dataclasses.dataclass
class Variant:
    """One program of a group, and its measurements."""

    label: str
    case: Any
    open: Callable[[], Worker]
    framework: str = THIS  # or the peer
    worker: Worker | None = None
    calls: int = 1  # in one turn
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: Failed | UserError | None = None

    def ask(self, *request: Any) -> Any:
        """The answer of the worker, which is started if there is none; None once it has failed."""
        if self.failure is not None:
            return None
        try:
            self.worker = self.worker or self.open()
            self.report = self.report or self.worker.report
            return self.worker.ask(*request)
        except (Failed, UserError) as error:
            self.failure = error
            self.close()

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure(
    variants: list[Variant], repeats: int, warmup: int, profile: str, notify: Callable[[Variant, str], None]
) -> None:
    """Fill in reports, turns and extras of all variants, and call notify(variant, progress).

    On a CPU all of them stay in memory and take single turns. An accelerator holds one at a time: each takes half of
    its turns at once, twice. A variant that fails keeps its failure; the others go on.
    """

    def warm_up(variant: Variant) -> None:
        first = not variant.report
        if variant.worker is None and (found := [variant.ask("turn", 1) for _ in range(warmup)][-1]):
            variant.calls = math.ceil(TURN_SECONDS / max(found[0], 1e-3))
            if first:
                notify(variant, "ready")

    try:
        warm_up(variants[0])
        alone = len(variants) > 1 and variants[0].report.get("hardware", {}).get("platform") != "cpu"
        rounds = [math.ceil(repeats / 2), repeats // 2] if alone else [1] * repeats
        for variant in variants[1:] if not alone else ():
            warm_up(variant)
        for number, count in enumerate(rounds):
            for variant in variants:
                warm_up(variant)
                for _ in range(count):
                    if turn := variant.ask("turn", variant.calls):
                        variant.turns.append(Turn(*turn))
                        notify(variant, f"{1e3 * turn[0]:,.1f} ms")
                if number == len(rounds) - 1 and variant.failure is None:
                    if profile and variant.framework == THIS:
                        variant.ask("profile", f"{profile}/{variant.label.replace(' ', '_').replace('/', '-')}")
                    variant.extras = variant.ask("finish") or {}
                    notify(variant, "measured")
                if alone:
                    variant.close()
    finally:
        for variant in variants:
            variant.close()


if __name__ == "__main__":
    collect_less_often()
    serve()
