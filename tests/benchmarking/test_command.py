"""The command from its flags to the results file, and the programs that it times, on a network of one block."""

import json
import sys

import bench_fakes
import numpy as np
import pytest
import toy

from ig_jax import benchmark
from ig_jax.base import cli
from ig_jax.benchmarking import cases, kernels, programs


def test_train_from_the_flags_to_the_results(tmp_path):
    results, traces = tmp_path / "results.jsonl", tmp_path / "traces"
    done = toy.run("ig_jax.benchmark", "train", *bench_fakes.TINY, f"--results={results}", f"--profile={traces}")
    assert done.returncode == 0, done.stderr
    head, row, *_ = done.stdout.splitlines()
    assert head.startswith("case ") and "images/s" in head and row.startswith("SiT-S/2 b2 bfloat16")
    assert "turns" in done.stderr and " left " in done.stderr
    assert "\nGiB: the most that" in done.stdout and " TFLOP/s in bfloat16, which" in done.stdout
    assert "\n1 line appended to " in done.stdout and "evals: " not in done.stdout
    (line,) = map(json.loads, results.read_text().splitlines())
    assert min(line[name] for name in ("images_per_second", "tflops", "of_peak", "compile_s", "peak_bytes")) > 0
    assert line["framework"] == "ig_jax" and line["hardware"]["platform"] == "cpu" and line["mesh"]["data"] == 1
    assert line["case"]["model"]["width"] == 64 and line["fit"] == {"remat": "none", "accumulate": 1}
    assert list(traces.rglob("*.xplane.pb")), "TensorBoard opens these"


@pytest.fixture
def quick(monkeypatch):
    """The device's limits without measuring them."""
    monkeypatch.setattr(programs, "matmul_rate", lambda dtype: 1e12)


def test_a_sampler_is_timed_on_weights_that_are_nowhere_zero(quick):
    runner = programs.Sample(bench_fakes.case(steps=4).as_dict())
    weights = np.concatenate([np.ravel(value) for value in runner.arguments[0].values()])
    assert (weights != 0).mean() > 0.999 and abs(weights.std() - 0.02) < 1e-4 and abs(weights.mean()) < 1e-4
    assert len(np.unique(weights)) > 0.98 * len(weights)
    runner.run(2)
    found = runner.finish()
    assert found["finite"] and found["peak_bytes"] > 2**26
    assert runner.report["evaluations"] == 7 and runner.report["compile_s"] > 0


def test_kernels_have_errors_or_reasons(quick, monkeypatch):
    case = bench_fakes.case(dtype="bfloat16")
    assert list(kernels.block_shapes(case)) == ["qkv", "proj", "fc1", "fc2"]
    monkeypatch.setitem(kernels.CHOICES, "attention", ("auto", "cudnn"))
    monkeypatch.setattr(kernels, "block_shapes", lambda case: {"fc1": (32, 64, 256)})
    rows = {row["kernel"]: row for row in kernels.Kernels(case.as_dict()).finish()["rows"]}
    assert 0 < rows["attention auto"]["error"] < 0.02 and 0 < rows["attention auto"]["gradient_error"] < 0.02
    assert "must be" in rows["attention cudnn"]["failure"]
    assert rows["dense fc1"]["shape"] == "32x64x256" and rows["dense fc1"]["both_ms"] > 0


def test_a_config_file_is_a_case():
    case = cases.of_config(str(toy.ROOT / "configs/digits.py:runlocal"))
    assert case.batch == 128 and case.experiment.name == "digits"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "command='' must be one of train, sample"),
        (["fly"], "command='fly' must be one of"),
        (["train"], "must be one of the two; try --model=SiT-S/2"),
        (["train", "--model=SiT-S/3"], "model name 'SiT-S/3' must be family-size/patch"),
        (["train", "--model=SiT-S/2", "--batch=0"], "config.data.batch_size=0 must be at least 1"),
        (["train", "--model=SiT-S/2", "--batch=two"], "config.data.batch_size='two' must be a whole number"),
        (["train", "--model=SiT-S/2", "--dtype=float16"], "dtype='float16' must be one of"),
        (["train", "--model=SiT-S/2", "--scan=yes"], "config.model.scan_blocks='yes' must be True or False"),
        (["train", "--model=SiT-S/2", "--devices=0"], "--devices=0 must be at least 1"),
        (["train", "--model=SiT-S/2", "--repeats=0"], "--repeats='0' must be a positive integer"),
        (["train", "--model=SiT-S/2", "--warmup=two"], "--warmup='two' must be a positive integer"),
        (["train", "--model=SiT-S/2", "--debug=maybe"], "--debug='maybe' must be one of true, false"),
        (["train", "--model=SiT-S/2", "--peer=nowhere --fast"], "--peer='nowhere' must be a checkout or a command"),
        (["train", "--model=SiT-S/2", "--width=100"], "--width=100 must be a multiple of the head dimension 64"),
        (["train", "--model=SiT-S/2", "--steps=10"], "--steps='10' must be left out for train"),
        (["sample", "--model=SiT-S/2", "--solver=rk4"], "solver='rk4' must be one of"),
        (["data", "--model=SiT-S/2"], "--model=['SiT-S/2'] must be left out for data"),
        (["train", "--model=SiT-S/2", "--folder=latents"], "--folder='latents' must be left out for train"),
        (["reading", "--model=SiT-S/2"], "command='reading' must be one of"),
        (["kernels", "--model=SiT-S/2", "--peer=../before"], "must be left out for kernels"),
        (["train", "--config=configs/nowhere.py"], "must be an existing config file"),
        (["train", "--config=configs/digits.py:big"], "config argument 'big'"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(toy.ROOT)
    monkeypatch.setattr(sys, "argv", ["ig_jax.benchmark", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.run(benchmark.main, toy.fresh(benchmark.FLAGS), benchmark.__doc__, words=benchmark.WORDS)
    err = capsys.readouterr().err.strip()
    assert left.value.code == 2 and "\n" not in err and words in err and "Error" not in err, err
