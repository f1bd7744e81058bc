"""Numbers of the records and the table, from given measurements."""

import json

import bench_fakes
import pytest

from ig_jax.benchmarking import cases, run
from ig_jax.benchmarking.worker import Failed, Turn, Variant

REPORT = {
    "hardware": {"platform": "gpu", "device": "NVIDIA H200"},
    "parameters": 10**6,
    "mesh": {"data": 2},
    "used_devices": 2,
    "flops": 8e12,
    "compile_s": 6.0,
    "fit": {"remat": "dots", "accumulate": 2},
}
EXTRAS = {"peak_bytes": 2**30, "loss": 1.5, "peak": 8e12, "datasheet": 16e12}


def variant(**changes) -> Variant:
    case = bench_fakes.case(batch=64)
    turns = [Turn(1.0, 3.0), Turn(2.0, 4.0), Turn(4.0, 5.0)]
    fields = {"case": case, "report": dict(REPORT), "turns": turns, "extras": EXTRAS, **changes}
    return Variant(case.label, open=None, **fields)


def test_the_numbers_of_a_train_record():
    (line,) = run.results_of("train", variant())
    wanted = {
        "images_per_second": 32,
        "tflops": 4,
        "of_peak": 0.25,
        "of_datasheet": 0.125,  # 4 TFLOP/s on two devices of 8 and 16
        "compile_s": 6,
        "peak_gib": 1,
        "loss": 1.5,
    }
    assert {name: line[name] for name in wanted} == pytest.approx(wanted)
    assert line["ms"] == {"median": 2000, "low": 1000, "high": 4000}
    assert line["cpu_ms"] == {"median": 4000, "low": 3000, "high": 5000}


def test_a_record_has_hardware_date_versions_and_the_whole_recipe():
    (line,) = json.loads(json.dumps(run.results_of("train", variant())))
    assert line["hardware"]["device"] == "NVIDIA H200" and line["date"].startswith("20") and line["versions"]["jax"]
    assert line["case"]["model"]["width"] == 72 and line["case"]["optimizer"]["learning_rate"] == 1e-4
    assert line["case"]["sample"]["cfg_interval"] == [0.0, 0.7] and len(line["turns"]) == 3


def test_host_devices_share_one_host():
    (line,) = run.results_of("train", variant(report=REPORT | {"hardware": {"platform": "cpu"}}))
    assert line["of_peak"] == 0.5


def test_a_failure_has_a_line_and_no_numbers():
    lost = variant(failure=Failed("XlaRuntimeError: RESOURCE_EXHAUSTED: 3 GB"), turns=[], extras={})
    (line,) = run.results_of("train", lost)
    assert line["failure"] == "out of memory" and "ms" not in line
    text = run.table([*run.results_of("train", variant()), line])
    assert text.splitlines()[2] == f"{line['label']}: out of memory"


def test_the_table_is_aligned_and_leaves_out_empty_columns():
    plain = variant(extras={"peak_bytes": 2**31})
    quick = variant(extras={}, turns=[Turn(0.01, 0.01)])
    head, *rows = run.table(run.results_of("train", plain) + run.results_of("train", quick)).splitlines()
    assert len({len(row) for row in (head, *rows)}) == 1
    assert "images/s" in head and "of peak" not in head and "error" not in head
    assert "2,000.0 (1,000.0-4,000.0)" in rows[0] and "dots x2" in rows[0]


def test_below_the_table_stand_the_recipe_and_what_its_columns_mean():
    found = variant(case=bench_fakes.case(batch=64, steps=10))
    text = "\n".join(run.notes("sample", [found.case, found.case], run.results_of("sample", found)))
    assert text.count("SiT-XL/2: sde, 10 steps, IG 1.4 + CFG 1.35 on (0, 0.7]") == 1
    assert "of peak: share of 8 TFLOP/s in float32" in text and "of a turn, of 3;" in text and "error: " not in text


def test_ratios_have_both_clocks():
    ours = variant()
    peer = variant(turns=[Turn(2.0, 6.0), Turn(4.0, 8.0), Turn(8.0, 10.0)], framework="../before", case=ours.case)
    (pair,) = run.ratios([ours, peer, variant()])  # another case has no part in it
    assert pair["wall"] == {"median": 0.5, "low": 0.5, "high": 0.5} == pair["cpu"]


def test_a_ratio_is_of_medians_and_its_spread_of_neighbours():
    assert run.ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == {"median": 1.0, "low": 0.5, "high": 3.0}


def test_each_case_is_followed_by_its_peers_and_a_directory_is_a_checkout(tmp_path):
    case = bench_fakes.case()
    made = run.variants_of("train", case, [str(tmp_path), "sh other.py --compile"], "cache")
    assert [v.label for v in made] == [case.label, f"{case.label} {tmp_path}", f"{case.label} sh other.py --compile"]
    assert [v.open.args[2:] for v in made] == [(), (run.SERVE, tmp_path), (["sh", "other.py", "--compile"], None)]
    assert cases.Case.of(json.loads(json.dumps(made[1].open.args[0][1]))) == case


def test_cases_multiply_and_group_by_the_work():
    base = cases.published("SiT-S/2")
    axes = {"data.batch_size": [4, 8], "model.dtype": ["float32", "bfloat16"], "model.depth": [2, 6]}
    made = cases.expanded(base, axes)
    assert len(made) == 8 and len({case.label for case in made}) == 8
    first, last = made[0].experiment.model, made[-1].experiment.model
    assert "depth=2" in made[0].label and first.inter_depth == (2,) and last.inter_depth == (4,)
    assert [made.index(case) for case in made if case.group == made[0].group] == [0, 2]  # they differ in dtype alone
    assert len({case.group for case in made}) == 4
    wide = cases.changed(base, "model.width", 768)
    assert wide.experiment.model.num_heads == 12


@pytest.mark.parametrize("name", ["SiT-XL/2", "DiT-B/4", "LightningDiT-XL/1"])
def test_a_published_name_is_an_experiment_with_a_small_batch(name):
    case = cases.published(name)
    assert case.batch == cases.BATCH and case.label.startswith(f"{name} b{cases.BATCH} ")
    muon = name.startswith("Lightning")
    assert (case.experiment.optimizer.name == "muon") == muon == bool(case.experiment.loss.direction_weight)
