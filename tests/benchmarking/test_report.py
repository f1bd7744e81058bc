"""From measurements to records and the table, without measuring anything."""

import json

import bench_fakes
import pytest

from ig_jax.benchmarking import cases, report, table
from ig_jax.benchmarking.compare import Variant
from ig_jax.benchmarking.timing import Turn
from ig_jax.benchmarking.worker import Failed
from ig_jax.files import append_lines

REPORT = {
    "hardware": {"platform": "gpu", "device": "NVIDIA H200"}, "parameters": 10**6, "mesh": {"data": 2},
    "used_devices": 2, "flops": 8e12, "seconds": {"trace": 1.0, "lower": 2.0, "compile": 3.0}, "calls": 1,
    "first_call": 0.5,
}
EXTRAS = {
    "memory": {"device": 2**30, "program": 2**29, "process": 2**31}, "loss": 1.5, "peak": 8e12, "datasheet": 16e12,
    "bandwidth": 1e9, "data": 400.0,
    "optimizer": {"seconds": 0.1, "parameters": 10**6, "compiled_bytes": 30e6},
}


def variant(**changes) -> Variant:
    case = bench_fakes.case(batch=64)
    turns = [Turn(1.0, 3.0, 0.1), Turn(2.0, 4.0, 0.2), Turn(4.0, 5.0, None)]
    fields = {"report": dict(REPORT), "turns": turns, "extras": EXTRAS, **changes}
    return Variant(case.label, case, start=None, **fields)


def test_the_numbers_of_a_train_record():
    line, = report.records("train", variant())
    wanted = {
        "images_per_second": 32, "ms": 2000, "ms_min": 1000, "ms_max": 4000, "cpu_ms": 4000, "tflops": 4,
        "of_peak": 0.25, "of_datasheet": 0.125,  # 4 TFLOP/s on two devices of 8 and 16
        "optimizer_ms": 100, "optimizer_share": 0.05, "optimizer_floor_ms": 20,  # 40 bytes of a million at 2 GB/s
        "optimizer_bytes_per_parameter": 200, "optimizer_compiled_bytes_per_parameter": 60,
        "data_share": 0.08, "compile_all_s": 6, "peak_bytes": 2**30, "foreign": 0.2, "loss": 1.5,
    }
    assert {name: line[name] for name in wanted} == pytest.approx(wanted)


def test_a_record_says_what_ran_where_and_when():
    line, = json.loads(json.dumps(report.records("train", variant())))
    assert line["hardware"]["device"] == "NVIDIA H200" and line["date"].startswith("20") and line["versions"]["jax"]
    assert line["case"]["model"]["width"] == 64 and line["case"]["optimizer"]["learning_rate"] == 1e-4
    assert line["case"]["sample"]["cfg_interval"] == [0.0, 0.7] and len(line["turns"]) == 3


def test_host_devices_share_one_host():
    line, = report.records("train", variant(report=REPORT | {"hardware": {"platform": "cpu"}}))
    assert line["of_peak"] == 0.5 and line["optimizer_bytes_per_parameter"] == 100


def test_what_failed_has_a_line_and_no_numbers():
    lost = variant(failure=Failed("XlaRuntimeError: RESOURCE_EXHAUSTED: 3 GB"), turns=[], extras={})
    line, = report.records("train", lost)
    assert line["failure"] == "out of memory" and "ms" not in line
    text = table.table("train", [*report.records("train", variant()), line])
    assert text.splitlines()[2].split("  ")[-1].strip() == "out of memory"


def test_the_table_is_aligned_and_leaves_out_what_nothing_fills():
    plain = variant(extras={"memory": {"process": 2**31}})
    quick = variant(extras={}, turns=[Turn(0.01, 0.01, 0.0)])
    lines = [*report.records("train", plain), *report.records("train", quick)]
    head, *rows = table.table("train", lines).splitlines()
    assert len({len(row) for row in (head, *rows)}) == 1
    assert "images/s" in head and "of peak" not in head and "opt ms" not in head
    assert "2,000 (1,000-4,000)" in rows[0] and "2.00" in rows[0] and rows[1].split()[-1] == "0.0%"


def test_every_command_has_a_table():
    from ig_jax import benchmark

    assert set(benchmark.WORDS) == set(table.COLUMNS)


def test_ratios_are_said_with_both_clocks():
    ours, peer = variant(), variant(turns=[Turn(2.0, 6.0, 0.0), Turn(4.0, 8.0, 0.0), Turn(8.0, 10.0, 0.0)])
    pair = report.compared(ours, peer)
    assert pair["wall"] == {"median": 0.5, "low": 0.5, "high": 0.5} == pair["cpu"]
    text = table.ratios([pair])
    assert "0.50 (0.50-0.50) by the wall, 0.50 (0.50-0.50) by CPU time" in text and "one output head" in text


def test_records_are_added_to_what_is_there(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    for number in (1, 2):
        append_lines(path, [{"number": number}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"number": 1}, {"number": 2}]


def test_the_case_of_a_published_name():
    case = cases.published("SiT-XL/2")
    assert (case.model.depth, case.model.width, case.model.inter_depth) == (28, 1152, (8,))
    assert case.loss.inter_weight == (0.5,) and case.loss.label_drop == 0.1 and case.ema.decays == (0.9999,)
    assert (case.optimizer.learning_rate, case.optimizer.weight_decay, case.optimizer.clip_norm) == (1e-4, 0.0, 1.0)
    assert (case.sample.ig_scale, case.sample.cfg_scale, case.sample.cfg_interval) == (1.4, 1.35, (0.0, 0.7))
    for name in ("DiT-B/4", "LightningDiT-XL/1"):
        made = cases.published(name)
        made.process.check_model(made.model)
        made.sample.check_model(made.model)


def test_cases_multiply_and_group_by_the_work():
    base = cases.published("SiT-S/2")
    made = cases.expanded(base, {"batch": [4, 8], "dtype": ["float32", "bfloat16"], "depth": [2, 6], "scan": []})
    assert len(made) == 8 and len({case.label for case in made}) == 8
    assert "depth=2" in made[0].label and made[0].model.inter_depth == (2,) and made[-1].model.inter_depth == (4,)
    assert [len(group) for group in cases.grouped(made)] == [2] * 4
    assert {case.model.dtype for case in cases.grouped(made)[0]} == {"float32", "bfloat16"}
    wide = cases.changed(base, "width", 768)
    assert wide.model.num_heads == 12
