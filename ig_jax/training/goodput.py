"""Where the wall time of a run goes, over all of its starts."""

import contextlib
import time
from collections.abc import Iterator

KINDS = {
    "productive": "steps",
    "start": "opening the data, reading the state, the first step",
    "compile": "waiting for the compiled step",
    "data_wait": "idle devices without a batch",
    "checkpoint": "saves that steps waited for",
    "evaluation": "previews and evaluation",
    "redone": "steps after the last checkpoint, lost when the run ended",
    "down": "between the last sign of life and the next start",
}
PREFIX = "seconds/"
_EPOCH = time.time() - time.monotonic()


def _now() -> float:
    """Seconds since 1970; a clock that is set while the process runs changes nothing."""
    return _EPOCH + time.monotonic()


class Goodput:
    """A ledger in which every second since the first start of a run is of one kind.

    A checkpoint carries it to the next start. What came after that checkpoint is lost: up to the last line of
    metrics.jsonl it was work that is done again, and from then on nothing ran.
    """

    def __init__(self) -> None:
        self._first = self._born = self._since = _now()  # of the run; of what this ledger counts itself; of this kind
        self._spent, self._kind = dict.fromkeys(KINDS, 0.0), "start"
        self._carried: dict[int, dict] = {}

    def enter(self, kind: str) -> None:
        """From now on the time is of this kind."""
        now = _now()
        self._spent[self._kind] += now - self._since
        self._since, self._kind = now, kind

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """The time of the block is of this kind."""
        before = self._kind
        self.enter(kind)
        yield
        self.enter(before)

    def waited(self, seconds: float) -> None:
        """So much of the time of this kind was spent waiting for data."""
        self._spent[self._kind] -= seconds
        self._spent["data_wait"] += seconds

    def carried(self) -> dict:
        """What a checkpoint keeps."""
        self.enter(self._kind)
        return {"first": self._first, "spent": dict(self._spent)}

    def note(self, meta: dict) -> None:
        """What the checkpoint that may be read next has kept; older ones have nothing."""
        self._carried[meta["step"]] = meta.get("goodput") or {}

    def resume(self, step: int, alive: float, at: float) -> None:
        """Go on from the checkpoint of `step`, 0 for none.

        alive: the last sign of life of the run, in seconds after its first start, 0 for none; at: the same as a time.
        """
        first = at - alive if alive else self._born
        carried = self._carried.get(step) or {"first": first, "spent": dict.fromkeys(KINDS, 0.0)}
        done = sum(carried["spent"].values())
        lost = self._born - carried["first"] - done
        redone = min(max(alive - done, 0.0), lost)
        for kind, seconds in (carried["spent"] | {"redone": carried["spent"]["redone"] + redone}).items():
            self._spent[kind] += seconds
        self._spent["down"] += lost - redone
        self._first = carried["first"]

    def go_back(self, step: int) -> None:
        """The same in a process that reads an earlier state again."""
        self.enter(self._kind)
        self._born, self._spent = self._since, dict.fromkeys(KINDS, 0.0)
        self._carried[step] = self._carried.get(step) or {"first": self._first, "spent": dict.fromkeys(KINDS, 0.0)}
        self.resume(step, alive=float("inf"), at=self._born)

    def metrics(self) -> dict[str, float]:
        """The seconds of each kind and of all by name, and `goodput`, the share of productive ones."""
        spent = self.carried()["spent"]
        total = _now() - self._first
        seconds = {f"{PREFIX}{kind}": round(value, 3) for kind, value in (spent | {"total": total}).items()}
        return seconds | {"goodput": round(spent["productive"] / max(total, 1e-9), 4)}
