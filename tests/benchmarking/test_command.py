"""The command from its flags to the results file, and the runners of its workers, on a network of one block."""

import importlib
import json
import sys

import bench_fakes
import numpy as np
import pytest
import toy

from ig_jax import cli
from ig_jax.benchmarking import device, hotspots, peer_numbers, runners

TINY = ["--model=SiT-S/2", "--width=64", "--depth=1", "--latent=8", "--batch=2", "--devices=1", "--repeats=1",
        "--warmup=1", "--wait=0"]


def test_train_from_the_flags_to_the_results(tmp_path):
    results, traces = tmp_path / "results.jsonl", tmp_path / "traces"
    done = toy.run("ig_jax.benchmark", "train", *TINY, f"--results={results}", f"--profile={traces}")
    assert done.returncode == 0, done.stderr
    head, row, *_ = done.stdout.splitlines()
    assert head.startswith("case ") and "images/s" in head and row.startswith("SiT-S/2 b2 float32")
    assert "turns" in done.stderr and " left " in done.stderr
    line, = map(json.loads, results.read_text().splitlines())
    assert min(line[name] for name in (
        "images_per_second", "ms", "cpu_ms", "tflops", "of_peak", "optimizer_share", "compile_s", "peak_bytes",
    )) > 0
    assert line["framework"] == "ig_jax" and line["hardware"]["platform"] == "cpu" and line["mesh"]["data"] == 1
    # 36 bytes and the norm that clips; the compiler counts twice what two of its loops read.
    assert 36 <= line["optimizer_compiled_bytes_per_parameter"] < 80
    assert list(traces.rglob("*.xplane.pb")), "TensorBoard opens these"


@pytest.fixture
def quick(monkeypatch):
    """The device's limits without measuring them."""
    monkeypatch.setattr(device, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(device, "memory_rate", lambda: 1e10)


def test_a_sampler_is_timed_on_weights_that_are_nowhere_zero(quick):
    runner = runners.Sample(bench_fakes.case(steps=4))
    weights = np.concatenate([np.ravel(value) for value in runner.arguments[0].values()])
    assert (weights != 0).mean() > 0.999 and abs(weights.std() - 0.02) < 1e-4 and abs(weights.mean()) < 1e-4
    assert len(np.unique(weights)) > 0.98 * len(weights)
    runner.run(2)
    found = runner.finish()
    assert found["finite"] and found["memory"]["process"] > 2**26
    assert runner.report["evaluations"] == 7 and set(runner.report["seconds"]) == {"trace", "lower", "compile"}


def test_the_step_is_the_run_s_own_and_compiles_once():
    runner = runners.Start(bench_fakes.case())
    assert runner.report["compilations"] == 1


def test_hot_spots_have_errors_or_reasons(quick, monkeypatch):
    case = bench_fakes.case(dtype="bfloat16")
    assert list(hotspots.block_shapes(case)) == ["qkv", "proj", "fc1", "fc2"]
    monkeypatch.setitem(hotspots.CHOICES, "attention", ("auto", "cudnn"))
    monkeypatch.setattr(hotspots, "block_shapes", lambda case: {"fc1": (32, 64, 256)})
    rows = {row["kernel"]: row for row in runners.HotSpots(case).report["rows"]}
    assert 0 < rows["attention auto"]["error"] < 0.02 and 0 < rows["attention auto"]["gradient_error"] < 0.02
    assert "must be" in rows["attention cudnn"]["failure"]
    assert rows["dense fc1"]["shape"] == "32x64x256" and rows["dense fc1"]["both_ms"] > 0


def test_the_loader_of_a_config_is_timed(monkeypatch):
    from ig_jax.benchmarking import cases, loader

    monkeypatch.setattr(loader, "SECONDS", 0.05)
    case = cases.of_config(str(toy.ROOT / "configs/digits.py:runlocal"))
    assert loader.rate(case) > 100 and loader.rate_if_any(case) > 100
    assert loader.rate_if_any(cases.of_config(str(toy.ROOT / "configs/sit_imagenet256.py:B"))) is None
    assert loader.rate_if_any(bench_fakes.case()) is None
    assert case.batch == 128 and case.experiment.name == "digits"


def test_the_peer_gets_the_same_work_in_numbers():
    numbers = json.loads(json.dumps(peer_numbers.numbers(bench_fakes.case(steps=10), "sample")))
    assert sum(1 + row["cfg"] for row in numbers["rows"]) == numbers["evaluations"] == 17
    assert numbers["rows"][-1]["noise"] == 0 and numbers["shape"] == [2, 4, 8, 8]
    assert numbers["model"]["num_attention_heads"] * numbers["model"]["attention_head_dim"] == 64


@pytest.mark.parametrize("arguments,words", [
    ([], "command='' must be one of train, sample"),
    (["fly"], "command='fly' must be one of"),
    (["train"], "must be one of the two; try --model=SiT-S/2"),
    (["train", "--model=SiT-S/3"], "model name 'SiT-S/3' must be family-size/patch"),
    (["train", "--model=SiT-S/2", "--batch=0"], "--batch=0 must be at least 1"),
    (["train", "--model=SiT-S/2", "--batch=two"], "--batch='two' must be whole numbers"),
    (["train", "--model=SiT-S/2", "--dtype=float16"], "dtype='float16' must be one of"),
    (["train", "--model=SiT-S/2", "--scan=yes"], "--scan='yes' must be on or off"),
    (["train", "--model=SiT-S/2", "--mesh=1,2"], "--mesh='1,2' must be three numbers"),
    (["train", "--model=SiT-S/2", "--repeats=0"], "--repeats=0 must be at least 1"),
    (["train", "--model=SiT-S/2", "--width=100"], "--width=100 must be a multiple of the head dimension 64"),
    (["train", "--model=SiT-S/2", "--steps=10"], "--steps=10 must be left out for train; it belongs to sample"),
    (["train", "--model=SiT-S/2", "--peer_compile"], "given together with --peer=diffusers"),
    (["train", "--model=LightningDiT-XL/1", "--peer=diffusers"], "left out for LightningDiT-XL/1"),
    (["sample", "--model=SiT-S/2", "--solver=rk4"], "solver='rk4' must be one of"),
    (["sample", "--model=SiT-S/2", "--solver=heun", "--peer=diffusers"], "--solver='heun' must be sde"),
    (["data", "--model=SiT-S/2"], "given for data"),
    (["train", "--config=configs/nowhere.py"], "must be an existing config file"),
    (["train", "--config=configs/digits.py:big"], "config argument 'big'"),
], ids=str)
def test_bad_flags_are_one_line(arguments, words, capsys, monkeypatch):
    module = importlib.reload(importlib.import_module("ig_jax.benchmark"))
    monkeypatch.chdir(toy.ROOT)
    monkeypatch.setattr(sys, "argv", ["ig_jax.benchmark", *arguments])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")  # a peer that would be there
    with pytest.raises(SystemExit) as left:
        cli.run(module.main, module.FLAGS, module.__doc__, words=module.WORDS)
    err = capsys.readouterr().err.strip()
    assert left.value.code == 2 and "\n" not in err and words in err, err


def test_a_missing_peer_names_its_extra(monkeypatch):
    from ig_jax.benchmarking import peer
    from ig_jax.errors import UserError

    monkeypatch.setattr(peer, "NEEDS", ("a_package_that_nobody_has",))
    with pytest.raises(UserError, match=r'a_package_that_nobody_has, which is not installed; .*"\.\[torch\]"'):
        peer.check_installed()
