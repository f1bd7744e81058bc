"""The order of turns, the two clocks, and failing workers."""

import functools

import bench_fakes
import pytest
import toy
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.benchmarking import worker
from ig_jax.benchmarking.worker import Failed, Variant, Worker, measure

FAKES = {"PYTHONPATH": str(toy.ROOT / "tests")}


def measured(repeats: int = 3, **workers) -> tuple[dict[str, Variant], list[str]]:
    """(variants by name, log of their workers) for fakes with the given fields."""
    log, notes = [], []
    variants = {
        name: Variant(name, bench_fakes.case(), functools.partial(bench_fakes.FakeWorker, name, log, **fields))
        for name, fields in workers.items()
    }
    measure(list(variants.values()), repeats, 1, "", lambda variant, text: notes.append(text))
    if not any(variant.failure for variant in variants.values()):
        assert len(notes) == len(variants) * (repeats + 2)  # the length of the progress bar
    return variants, log


def test_variants_on_a_host_stay_in_memory_and_take_single_turns():
    variants, log = measured(a={}, b={"seconds": 2.0})
    assert [entry for entry in log if entry[2:] == "turn"] == ["a:turn", "b:turn"] * 4  # the first are the warm-up
    assert log.index("b:open") < log.index("a:finish") and log.count("a:open") == 1
    assert variants["b"].turns == [(2.0, 1.0)] * 3 and variants["b"].extras == {"answer": 42}


def test_variants_on_an_accelerator_have_it_alone():
    variants, log = measured(4, a={"platform": "gpu"}, b={"platform": "gpu"})
    opened = [entry for entry in log if entry[2:] in ("open", "close")]
    assert opened == ["a:open", "a:close", "b:open", "b:close"] * 2
    assert len(variants["a"].turns) == len(variants["b"].turns) == 4
    assert log.count("a:finish") == log.count("b:finish") == 1


@pytest.mark.parametrize("error", [Failed, UserError])
@pytest.mark.parametrize("where", ["open", "turn", "finish"])
def test_the_others_go_on_when_one_fails(where, error):
    variants, log = measured(a={"fails_at": where, "error": error}, b={})
    assert str(variants["a"].failure) == f"{where} went wrong"
    assert len(variants["b"].turns) == 3 and variants["b"].extras and log[-1] == "b:close"
    assert all(variant.worker is None for variant in variants.values())


def test_short_calls_share_a_turn():
    variants, _ = measured(a={"seconds": 0.03}, b={"seconds": 5.0})
    assert variants["a"].calls == 7 and variants["b"].calls == 1


def test_a_worker_answers_from_another_process():
    process = Worker(["bench_fakes:Runner", {"name": "good"}], FAKES | {"OMP_WAIT_POLICY": "passive"})
    try:
        turn = worker.Turn(*process.ask("turn", 20))
        assert 0.01 <= turn.wall < 0.1 and turn.cpu < turn.wall  # seconds a call, of 0.2 for all
        assert process.report["threads"] == "passive" and process.ask("finish") == {"answer": 42}
    finally:
        process.close()


def test_a_worker_reports_why_it_failed():
    with refused("x", 1, expected="2", fix="do so", says="x=1 must be 2; do so"):
        Worker(["bench_fakes:Runner", {"name": "user"}], FAKES)
    with pytest.raises(Failed, match="out of memory") as failure:
        Worker(["bench_fakes:Runner", {"name": "memory"}], FAKES)
    assert failure.value.is_memory and "Traceback" in failure.value.detail
    with pytest.raises(Failed, match="ended with -9") as failure:
        Worker(["bench_fakes:Runner", {"name": "killed"}], FAKES)
    assert failure.value.is_memory


def test_a_peer_is_another_checkout(tmp_path):
    """Its own code runs, and what it reads relative to it."""
    package = tmp_path / "ig_jax/benchmarking"
    package.mkdir(parents=True)
    for folder in (package, package.parent):  # a package comes before one that is elsewhere on the path
        (folder / "__init__.py").touch()
    (package / "worker.py").write_text("""if True:
        import json, sys
        for line in sys.stdin:
            print(json.dumps(["report", {"other": json.loads(line)}]), flush=True)
    """)
    process = Worker(["programs:Train", {}], {}, worker.SERVE, tmp_path)
    try:
        assert process.report == {"other": ["programs:Train", {}]}
    finally:
        process.close()


def test_both_clocks_of_a_turn():
    class Busy:
        def run(self, calls: int) -> None:
            for _ in range(calls):
                sum(range(200_000))

    turn = worker.REQUESTS["turn"](Busy(), 10)
    assert 0 < turn.cpu <= 1.5 * turn.wall
