"""The order of turns, the clocks, and what becomes of a worker that fails."""

import functools

import bench_fakes
import pytest

from ig_jax.benchmarking import starts, timing
from ig_jax.benchmarking.compare import Plan, Variant, compare
from ig_jax.benchmarking.timing import Spread, Turn
from ig_jax.benchmarking.worker import Failed, Worker
from ig_jax.errors import UserError

PLAN = Plan(repeats=3, warmup=1, wait=0.0, profile="")


def compared(plan: Plan = PLAN, **workers) -> tuple[dict[str, Variant], list[str]]:
    """(variants by name, what their workers did) for fakes with the given fields."""
    log, heard = [], []
    variants = {
        name: Variant(name, bench_fakes.case(), functools.partial(bench_fakes.FakeWorker, name, log, **fields))
        for name, fields in workers.items()
    }
    compare(list(variants.values()), plan, lambda variant, text: heard.append(text))
    if not any(variant.failure for variant in variants.values()):
        assert len(heard) == len(variants) * (plan.repeats + 2)  # what the progress counts on
    return variants, log


def test_variants_on_a_host_are_all_there_and_take_single_turns():
    variants, log = compared(a={}, b={"seconds": 2.0})
    assert [entry for entry in log if entry[2:] == "turn"] == ["a:turn", "b:turn"] * 4  # the first are the warm-up
    assert log.index("b:open") < log.index("a:finish") and log.count("a:open") == 1
    assert variants["b"].wall == [2.0] * 3 and variants["b"].cpu == [1.0] * 3


def test_variants_on_an_accelerator_have_it_alone():
    variants, log = compared(Plan(4, 1, 0.0, ""), a={"platform": "gpu"}, b={"platform": "gpu"})
    opened = [entry for entry in log if entry[2:] in ("open", "close")]
    assert opened == ["a:open", "a:close", "b:open", "b:close"] * 2
    assert len(variants["a"].turns) == len(variants["b"].turns) == 4
    assert log.count("a:finish") == log.count("b:finish") == 1


@pytest.mark.parametrize("error", [Failed, UserError])
@pytest.mark.parametrize("where", ["open", "turn", "finish"])
def test_the_others_go_on_when_one_fails(where, error):
    variants, log = compared(a={"fails_at": where, "error": error}, b={})
    assert str(variants["a"].failure) == f"{where} went wrong"
    assert len(variants["b"].turns) == 3 and variants["b"].extras and log[-1] == "b:close"
    assert all(variant.worker is None for variant in variants.values())


@pytest.mark.parametrize("where", ["open", "finish"])
def test_a_start_that_fails_is_the_failure_of_its_variant_and_leaves_no_worker(where, monkeypatch):
    log = []
    monkeypatch.setattr(starts, "start_ours", lambda *a, **k: bench_fakes.FakeWorker("a", log, fails_at=where))
    variant = Variant("a", bench_fakes.case(), None)
    starts.start_twice(variant, lambda variant, text: None)
    assert str(variant.failure) == f"{where} went wrong"
    assert log == (["a:open"] if where == "open" else ["a:open", "a:finish", "a:close"])


def test_short_calls_are_put_together():
    variants, _ = compared(a={"seconds": 0.03}, b={"seconds": 5.0})
    assert variants["a"].report["calls"] == 7 and variants["b"].report["calls"] == 1


def test_a_worker_answers_from_another_process():
    worker = Worker(bench_fakes.Runner, "good", environment={"OMP_WAIT_POLICY": "passive"})
    try:
        turn = worker.turn(20)
        assert 0.01 <= turn.wall < 0.1 and turn.cpu < turn.wall  # seconds a call, of 0.2 for all
        assert worker.report["threads"] == "passive" and worker.finish() == {"answer": 42}
    finally:
        worker.close()


def test_a_worker_says_why_it_cannot():
    with pytest.raises(UserError, match="x=1 must be 2"):
        Worker(bench_fakes.Runner, "user")
    with pytest.raises(Failed, match="out of memory$") as failure:
        Worker(bench_fakes.Runner, "memory")
    assert failure.value.is_memory and "Traceback" in failure.value.detail
    with pytest.raises(Failed, match="ended with -9"):
        Worker(bench_fakes.Runner, "killed")


def test_both_clocks_of_a_turn():
    def spin(calls: int) -> None:
        for _ in range(calls):
            sum(range(200_000))

    turn = timing.timed(spin, 10)
    assert 0 < turn.cpu <= 1.5 * turn.wall
    assert turn.foreign is None or 0 <= turn.foreign <= 1


def test_a_ratio_is_of_medians_and_its_spread_of_neighbours():
    assert timing.ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == Spread(1.0, 0.5, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Turn(1.0, 2.0, None).foreign is None
