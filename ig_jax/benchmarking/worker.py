"""Each case in a process of its own, so that peaks of memory, device counts and thread pools are its own too.

The driver never touches a device. A worker builds one runner, then takes turns on request and is idle between
them; two frameworks that take turns therefore never run at the same moment.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable

from ig_jax.benchmarking.timing import Turn, timed, wait_until_quiet
from ig_jax.cli import collect_less_often
from ig_jax.errors import UserError

MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "bad_alloc", "MemoryError")
END_TIMEOUT = 20  # seconds that a worker has to leave by itself


class Failed(RuntimeError):
    """A worker could not do what it was asked; the message is one line, the traceback is in `detail`."""

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.detail = detail

    @property
    def is_memory(self) -> bool:
        """Whether the case did not fit into memory."""
        return any(word in str(self) + self.detail for word in MEMORY_WORDS)


class Worker:
    """A process around make(*arguments), an object with `report` (dict), `run(calls)` and `finish()` -> dict."""

    def __init__(self, make: Callable, *arguments, environment: dict[str, str] | None = None):
        """Raises: what `make` raises, UserError as it is and everything else as Failed."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        with _environment(environment or {}):
            self._process.start()
        theirs.close()
        try:
            self.report: dict = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, calls: int, patience: float = 0.0) -> Turn:
        """Time `calls` calls, having waited up to `patience` seconds for an idle machine."""
        return self._ask("turn", calls, patience)

    def finish(self) -> dict:
        """What the runner measures besides, once."""
        return self._ask("finish")

    def profile(self, directory: str, calls: int) -> None:
        """Write a trace of `calls` calls that TensorBoard opens."""
        self._ask("profile", directory, calls)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(END_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _ask(self, *request):
        try:
            self._pipe.send(request)
        except OSError as error:
            raise Failed(f"the worker is gone: {error}") from error
        return self._answer()

    def _answer(self):
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(END_TIMEOUT)
            code = self._process.exitcode
            # What the kernel does to a process that wants more memory than there is.
            raise Failed(f"the worker ended with {code}" + (" (out of memory?)" if code == -9 else "")) from error
        if kind == "user":
            raise UserError(value)
        if kind == "failed":
            raise Failed(*value)
        return value


@contextlib.contextmanager
def _environment(changes: dict[str, str]):
    """Variables for the processes that start inside."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(pipe, make, arguments) -> None:
    """The life of a worker."""
    collect_less_often()
    try:
        runner = make(*arguments)
        pipe.send(("ok", runner.report))
        while (request := pipe.recv()) is not None:
            pipe.send(("ok", _do(runner, *request)))
    except (EOFError, KeyboardInterrupt):
        return  # the driver is gone
    except UserError as error:
        pipe.send(("user", str(error)))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        pipe.send(("failed", (f"{type(error).__name__}: {lines[0][:200]}", traceback.format_exc())))


def _do(runner, name: str, *arguments):
    if name == "turn":
        calls, patience = arguments
        wait_until_quiet(patience)
        return timed(runner.run, calls)
    if name == "profile":
        import jax

        directory, calls = arguments
        with jax.profiler.trace(directory):
            runner.run(calls)
        return None
    return runner.finish()
