"""What the processes of a run tell each other beside the devices, through JAX's coordination service.

A thread of each process looks twice a second. A process that fails leaves a note, and the others leave with its line.
A process that is silent for long is reported by process 0. What one process asks for (a stop, a save) is answered to
all of them after the same step.
"""

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # private: the client of the coordination service

from ig_jax.base.errors import PEER_FAILED, RESUMABLE

_TICK = 0.5  # seconds
LEAVING = threading.RLock()  # held for ever by the thread that ends this process: its line is the last one
NOTICE = 3 * _TICK  # in which a note reaches everybody
_NOTE, _ALIVE, _ASKED, _REACHED = "ig_jax/note", "ig_jax/alive", "ig_jax/asked", "ig_jax/reached"


def _client() -> Any:
    """JAX's client of the coordination service, None in a process that runs alone."""
    return distributed.global_state.client


def leave(line: str, code: int, stacks: bool = False) -> NoReturn:
    """End this process with `code`; its peers see the last line, which this process has printed, and leave too.

    stacks: whether they dump their stacks before.
    """
    LEAVING.acquire()
    client = _client()
    if client is not None:
        with contextlib.suppress(Exception):  # a note is there already, or process 0 is gone
            client.key_value_set(_NOTE, f"{code} {int(stacks)} process {jax.process_index()}: {line}")
        _wait_for_readers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_readers() -> None:
    """Let everybody read the note before process 0 leaves, which keeps it."""
    if jax.process_index() == 0:
        time.sleep(NOTICE)


@contextlib.contextmanager
def within(seconds: float, line: str) -> Iterator[None]:
    """End this process with `line` where the block takes longer."""

    def late() -> None:
        print(f"ig_jax: error: {line}", file=sys.stderr, flush=True)
        os._exit(PEER_FAILED)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def watch(silence: float) -> None:
    """Look for notes of other processes from now on, and from process 0 for those silent for `silence` seconds."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(silence, ended), daemon=True)
    thread.start()

    def end() -> None:
        """A thread that comes back from a call into JAX while Python ends would abort the process."""
        jax.distributed.shutdown()  # the last that others may fail in
        ended.set()
        thread.join(10 * _TICK)

    atexit.register(end)


def _watch(silence: float, ended: threading.Event) -> None:
    client, index, count = _client(), jax.process_index(), 0
    heard: dict[str, tuple[str, float]] = {}
    while not ended.wait(_TICK):
        try:
            note = client.key_value_try_get(_NOTE)
        except Exception as error:
            if "NOT_FOUND" not in str(error):
                return  # the coordination service has ended, and with it this run
            note = ""
        code, stacks, line = note.split(" ", 2) if note else ("", "", "")
        if note and not line.startswith(f"process {index}:"):
            LEAVING.acquire()
            if stacks == "1":
                faulthandler.dump_traceback(2)
            stopped = int(code) == RESUMABLE
            _wait_for_readers()
            print(f"ig_jax: {'stopped' if stopped else 'error'}: {line}", file=sys.stderr, flush=True)
            os._exit(RESUMABLE if stopped else PEER_FAILED)
        with contextlib.suppress(Exception):
            count += 1
            client.key_value_set(f"{_ALIVE}/{index}", str(count), allow_overwrite=True)
            for key, value in client.key_value_dir_get(_ALIVE) if index == 0 else ():
                if heard.get(key, ("", 0.0))[0] != value:
                    heard[key] = value, time.monotonic()
                elif time.monotonic() - heard[key][1] > silence:
                    line = f"process {key.rpartition('/')[2]} has been silent for {silence:.0f} s"
                    client.key_value_set(_NOTE, f"{PEER_FAILED} 1 {line}")


class Agreement:
    """What any process asks for, known to all of them after the same step; a context manager.

    A process that asks does not know how far the others are: their main threads may wait for a step that this one has
    not begun. So the threads answer with the step that their process may have begun, nobody goes on before all have
    answered, and the largest is the one.
    """

    def __init__(self) -> None:
        self._step, self._round = 0, 0
        self._asked = ""
        self._at: int | None = None  # the step all have agreed on
        self._changed = threading.Condition()
        self._client: Any = _client() if jax.process_count() > 1 else None
        self._ended = threading.Event()

    def __enter__(self) -> "Agreement":
        self._thread = threading.Thread(target=self._listen, daemon=True)
        if self._client is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._client is not None:
            self._thread.join(10 * _TICK)

    def ask(self, what: str) -> None:
        """Ask for `what`; later calls for the same or less change nothing until it is answered."""
        if self._client is None:
            self._asked = what
        else:
            with contextlib.suppress(Exception):  # another process was first
                self._client.key_value_set(f"{_ASKED}/{self._round}", what)

    def after(self, step: int) -> str:
        """What is to be done after `step`, "" for nothing; called after each step by every process."""
        with self._changed:
            self._step = step
            if self._client is None:
                asked, self._asked = self._asked, ""
                return asked
            self._changed.wait_for(lambda: not self._asked or self._at is not None)
            if self._at != step:
                return ""
            asked, self._asked, self._at = self._asked, "", None
            self._round += 1
            return asked

    def _listen(self) -> None:
        while not self._ended.wait(_TICK):
            with contextlib.suppress(Exception):  # nothing was asked, or the service has ended
                self._answer(self._client.key_value_try_get(f"{_ASKED}/{self._round}"))

    def _answer(self, asked: str) -> None:
        if self._asked:
            return  # agreed, and the step is not reached yet
        with self._changed:
            self._asked, may_have_begun, place = asked, self._step + 1, f"{_REACHED}/{self._round}"
        self._client.key_value_set(f"{place}/{jax.process_index()}", str(may_have_begun))
        answers: list = []
        while len(answers) < jax.process_count():
            time.sleep(_TICK / 10)
            answers = self._client.key_value_dir_get(place)
        with self._changed:
            self._at = max(int(step) for _, step in answers)
            self._changed.notify()
