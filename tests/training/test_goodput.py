"""The seconds of a run by what they were spent on: over restarts they add up to its wall time."""

from ig_jax.training import goodput
from ig_jax.training.goodput import Goodput


def spent(line):
    """The seconds of each kind of a line of metrics, without those that are 0."""
    return {kind: line[f"seconds/{kind}"] for kind in [*goodput.KINDS, "total"] if line[f"seconds/{kind}"]}


def test_time_after_the_last_checkpoint_was_lost_in_work_and_at_rest(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput, "_now", lambda: now[0])

    def life(*kinds_and_seconds, ledger):
        for kind, seconds in kinds_and_seconds:
            ledger.enter(kind)
            now[0] += seconds
        return ledger

    first = life(("start", 3), ("productive", 10), ledger=Goodput())
    first.waited(2.0)
    meta = {"step": 5, "goodput": first.carried()}
    alive = life(("checkpoint", 1), ("productive", 6), ledger=first).metrics()["seconds/total"]
    now[0] += 100
    second = life(("start", 4), ledger=Goodput())
    second.note(meta)
    second.resume(5, alive, at=1020.0)
    life(("productive", 20), ledger=second)
    total = {"start": 7, "productive": 28, "data_wait": 2, "redone": 7, "down": 100, "total": 144}
    assert spent(second.metrics()) == total and second.metrics()["goodput"] == round(28 / 144, 4)
    third = Goodput()
    third.resume(0, alive=144.0, at=now[0])  # killed before its first checkpoint
    now[0] += 1
    assert spent(third.metrics()) == {"start": 1, "redone": 144, "total": 145}
    second.go_back(5)  # in the same process, with all that it has done since
    assert spent(second.metrics()) == {"start": 3, "productive": 8, "data_wait": 2, "redone": 132, "total": 145}
