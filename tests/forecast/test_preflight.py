"""Preflight: the very programs of a run, compiled for machines that are not here; what they fit into and exchange."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
import toy
from refusal import refused

from ig_jax import preflight
from ig_jax.base import cli
from ig_jax.base.schema import bind
from ig_jax.config.experiment import Experiment
from ig_jax.forecast import report
from ig_jax.forecast.targets import compile_quickly, described, open_target
from ig_jax.models import dit
from ig_jax.parallel.mesh import make_mesh

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is in the extra tpu: bash launch/test.sh --extra=tpu",
)
GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the GPU compiler is in the extra cuda: bash launch/test.sh --extra=cuda",
)
FULL = pytest.mark.skipif(
    not os.environ.get("IG_JAX_FULL_SIZE"),
    reason="minutes for each program: IG_JAX_FULL_SIZE=1 bash launch/test.sh --extra=tpu",
)


def experiment(name, arg="", **changes) -> Experiment:
    config = toy.load_config(name, arg)
    config.update_from_flattened_dict(changes)
    return bind(Experiment, config)


def trained(e: Experiment) -> int:
    return sum(math.prod(leaf.shape) for name, leaf in dit.shapes(e.model).items() if e.optimizer.trains(name))


def block_weights(e: Experiment) -> int:
    return sum(
        math.prod(leaf.shape)
        for name, leaf in dit.shapes(e.model).items()
        if name.startswith("blocks.") and name.endswith(".kernel")
    )


def total(found: report.ProgramReport, *kinds: str) -> int:
    return sum(size for kind in kinds for size in found.collectives.get(kind, {}).values())


# Two blocks wide enough that what a step adds once (heads, embeddings) is small beside them.
WIDE = {"model.depth": 2, "model.width": 256, "model.num_heads": 4, "data.batch_size": 64}


def cpu_train(**changes) -> tuple[Experiment, report.ProgramReport]:
    e = experiment("digits", **WIDE, **changes)
    return e, report.forecast(e, open_target("cpu:8"), sample_batch=0).train


@pytest.fixture(scope="module")
def replicas():
    return cpu_train()


@pytest.fixture(scope="module")
def groups():
    return {fsdp: cpu_train(**{"mesh.data": -1, "mesh.fsdp": fsdp}) for fsdp in (2, 8)}


def test_replicas_exchange_each_gradient_once_and_nothing_else(replicas):
    e, found = replicas
    assert found.collectives.keys() == {"all-reduce"}
    assert total(found, "all-reduce") == pytest.approx(4 * trained(e), rel=0.01)
    assert found.collectives["all-reduce"].keys() == {"data"}


def test_compiled_operations_are_our_count(replicas):
    _, found = replicas
    assert found.device_flops * 8 == pytest.approx(found.flops, rel=0.02)


def test_the_state_is_donated(replicas):
    _, found = replicas
    state = sum(found.memory[name] for name in ("parameters", "ema", "optimizer"))
    assert found.donated == pytest.approx(state, rel=0.001)


def test_sharded_state_is_gathered_twice_at_most_and_never_exchanged_all_to_all(groups):
    for e, found in groups.values():
        assert total(found, "all-gather") <= 2.2 * 4 * block_weights(e)
        assert total(found, "all-to-all") == total(found, "collective-permute") == 0
        summed = total(found, "all-reduce", "reduce-scatter")  # inside a group, then each part between groups
        assert summed <= 1.05 * 4 * trained(e) * (1 + (1 / e.mesh.fsdp if e.mesh.fsdp < 8 else 0))


def test_what_is_gathered_does_not_grow_with_the_devices(groups):
    two, eight = (total(found, "all-gather") for _, found in groups.values())
    assert eight <= 1.05 * two


def test_sharding_cuts_the_state_by_the_devices(replicas, groups):
    whole, cut = (
        sum(found.memory[name] for name in ("parameters", "ema", "optimizer", "gradients"))
        for found in (replicas[1], groups[8][1])
    )
    assert cut == pytest.approx(whole / 8, rel=0.15)  # small arrays stay whole


@pytest.mark.parametrize("interval", [(0.0, 0.7), (0.0, 1.0)])
def test_the_sampler_doubles_its_batch_inside_the_interval_alone(interval):
    e = experiment(
        "digits",
        **WIDE,
        **{"sample.solver": "sde", "sample.steps": 50, "sample.cfg_scale": 1.35, "sample.cfg_interval": interval},
    )
    target = open_target("cpu:8")
    found = report.forecast_sampler(e, target, make_mesh(devices=target.devices), 16)
    evaluations = e.sample.evaluations_per_image("linear", e.model)
    assert evaluations == (100 if interval[1] == 1 else 84)  # 34 of 50 grid times are at or below 0.7
    assert found.device_flops * 8 == pytest.approx(found.flops, rel=0.03)
    assert found.collectives == {}


def test_the_command_prints_a_page_and_json(tmp_path):
    results = tmp_path / "results.jsonl"
    done = toy.run(
        "ig_jax.preflight",
        f"--config={toy.ROOT}/configs/digits.py",
        "--target=cpu:2",
        f"--results={results}",
        "--sample_batch=4",
        *toy.flags(**{"sample.steps": 2}),
        devices=2,
    )
    assert done.returncode == 0, done.stderr
    for words in ("fits", "optimizer", "donated", "TFLOP", "attention", "images\n", "ig_jax.benchmark"):
        assert words in done.stdout
    (line,) = results.read_text().splitlines()
    stored = json.loads(line)
    assert stored["fits"] and stored["devices"] == 2 and stored["train"]["memory"]["parameters"] > 0
    script = [sys.executable, "launch/preflight_table.py", results]
    table = subprocess.run(script, cwd=toy.ROOT, env=toy.environment(), text=True, capture_output=True)
    assert table.returncode == 0 and "| digits | 2 x cpu | " in table.stdout, table.stderr
    (memory,) = re.findall(r"fits: (.*) a device; 16 images", done.stdout)
    (exchange,) = re.findall(r"exchange +(all-reduce .*) over data", done.stdout)
    assert f" {memory} | {exchange} | - |" in table.stdout


BAD = {
    "--target=tpu:v9:2x2": "--target='tpu:v9:2x2' must be one such as",
    "--target=cpu:none": "must be one such as",
    "--target=": "at least one machine",
    "--config.mesh.fsdp=3": "must multiply to the 2 devices",
    "--config.data.batch_size=15": "config.data.batch_size=15 must be a multiple of 2",
    "--config.model.widht=3": "widht",
    "--sample_batch=-1": "--sample_batch=-1",
    "--results=/proc/nowhere/r.jsonl": "cannot write '/proc/nowhere/r.jsonl'",
    "--config.mesh.fsdp_up_to=0": "fsdp_up_to",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_one_line(flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["preflight", f"--config={toy.ROOT}/configs/digits.py", "--target=cpu:2", flag])
    with pytest.raises(SystemExit) as leaves:
        cli.run(preflight.main, toy.fresh(preflight.FLAGS), preflight.__doc__)
    assert leaves.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ig_jax: error: ") and BAD[flag] in line


def test_what_does_not_fit_says_which_settings_would_help(monkeypatch):
    e = experiment("digits", **WIDE)
    target = open_target("cpu:8")
    monkeypatch.setattr(report, "memory_limit", lambda target: 5 * 2**20)
    found = report.forecast(e, target, sample_batch=0)
    assert not found.fits and "DOES NOT FIT" in found.page()
    advice = found.advice()
    assert "MiB too many" in advice and advice in found.page()
    for setting in ("mesh.fsdp=2", "model.remat=dots", "optimizer.accumulate=2"):
        assert setting in advice


@pytest.mark.parametrize(
    "value,text", [(1104.2, "1,100"), (16135, "16,000"), (231.8, "230"), (44.4, "44"), (0.0372, "0.037")]
)
def test_estimates_have_two_significant_digits(value, text):
    assert report.rough(value) == text


# A slice's name counts chips, or cores where a chip has two; its shape as Google lists it.
NAMES = {
    "v5e-16": "tpu v5e 4x4",
    "v5litepod-8": "tpu v5e 2x4",
    "v6e-1": "tpu v6e 1x1",
    "tpu:v5e": "tpu v5e 1x1",
    "v4-8": "tpu v4 2x2x1",
    "v4-32": "tpu v4 2x2x4",
    "v5p-64": "tpu v5p 2x4x4",
    "tpu:v5e:4x8": "tpu v5e 4x8",
    "gpu:h100": "gpu h100 1",
    "a3-highgpu-2g": "gpu h100 2",
    "p5en.48xlarge": "gpu h200 8",
    "cpu:4": "cpu  4",
}


def test_machines_have_the_names_of_the_clouds():
    assert {name: " ".join(described(name)) for name in NAMES} == NAMES
    for name in ("v4-4", "v5e-12", "cpu:0", "v5e", "a3-highgpu"):
        with refused("--target", name):
            described(name)
    with refused("--target", "2xgpu:h100:8", expected="slices of a TPU"):
        open_target("2xgpu:h100:8")


def test_exchanges_and_times_have_units_that_fit():
    moved = {"all-reduce": {"data": 1_950_000, "fsdp": 50_000}, "all-gather": {"fsdp": 2_710_000_000}}
    assert report.exchanged(moved, axes=False) == "all-reduce 2.00 MB, all-gather 2.71 GB"
    assert report.exchanged(moved, axes=True).startswith(
        "all-reduce 1.95 MB over data; all-reduce 50.00 KB over fsdp; "
    )
    assert [report.duration(s) for s in (0.33, 100, 6000, 9e4, 1.3e7)] == [
        "0.33 s",
        "100 s",
        "100 minutes",
        "25 hours",
        "150 days",
    ]


# Every config for the machines it is meant for. Blocks repeat: two of them show what all of them do.
SHIPPED = {
    "digits": ("digits", "", {}),
    "fashion_mnist": ("fashion_mnist", "", {}),
    "sit": ("sit_imagenet256", "B", {"model.depth": 2, "model.inter_depth": (1,)}),
    "dit": ("dit_imagenet256", "B", {"model.depth": 2, "model.inter_depth": (1,)}),
    "lightningdit": ("lightningdit_imagenet256", "XL", {"model.depth": 2, "model.inter_depth": (1,)}),
}


@pytest.fixture(autouse=True)
def least_effort():
    """A TPU's compiler is seven times quicker so; what a program holds, counts and exchanges is as with --quick."""
    before = jax.config.jax_optimization_level
    compile_quickly()
    yield
    jax.config.update("jax_optimization_level", before)


def compiled_for(name: str, arg: str, changes: dict, target: str, sample_batch: int = 0):
    """(experiment, report) of a shipped config on a machine that is not here."""
    e = experiment(name, arg, **changes)
    return e, report.forecast(e, open_target(target), sample_batch)


def check_program(e: Experiment, found: report.Report, device_flops: float) -> None:
    """What holds for every train step: it fits, counts, donates, and exchanges no more than it must."""
    train = found.train
    assert train.fits and train.limit < 150e9
    assert train.device_flops * found.devices == pytest.approx(train.flops, rel=device_flops)
    # A TPU pads small arrays to its tiles, in what it reports as donated too.
    assert train.donated >= 0.99 * sum(train.memory[part] for part in ("parameters", "ema", "optimizer"))
    assert total(train, "all-to-all") == 0
    width = 2 if e.model.dtype == "bfloat16" else 4
    ends = 4 * (trained(e) - block_weights(e))  # heads, embeddings, norms
    assert total(train, "all-gather") <= 2.2 * width * block_weights(e) + 2.2 * ends
    state = sum(leaf.size for leaf in jax.tree.leaves(dit.shapes(e.model))) * 4 * 4
    assert total(train, "all-gather") < state
    if found.mesh["fsdp"] == 1:
        assert total(train, "all-reduce") == pytest.approx(4 * trained(e), rel=0.01)


@pytest.mark.parametrize("target", [pytest.param("v5e-4", marks=TPU), pytest.param("gpu:h100:8", marks=GPU)])
@pytest.mark.parametrize("name", ["sit", *(pytest.param(n, marks=toy.SLOW) for n in SHIPPED if n != "sit")])
def test_shipped_configs_compile_and_fit(name, target):
    config, arg, changes = SHIPPED[name]
    e, found = compiled_for(config, arg, changes, target)
    check_program(e, found, device_flops=0.25 if e.optimizer.name == "muon" else 0.05)
    fused = target.startswith("gpu") and e.model.dtype == "bfloat16"
    assert found.train.attention.split()[0] == ("cudnn" if fused else "xla") and found.train.estimate.seconds > 0


@TPU
@toy.SLOW
def test_on_a_tpu_gathers_do_not_grow_from_4_to_64_chips():
    changes = SHIPPED["sit"][2]
    few, many = (
        compiled_for("sit_imagenet256", "B", changes, target)[1].train for target in ("tpu:v5e:2x2", "tpu:v5e:8x8")
    )
    assert total(many, "all-gather") <= 1.05 * total(few, "all-gather")


@TPU
def test_on_a_tpu_replicas_exchange_each_gradient_once_and_the_sampler_doubles_inside_its_interval():
    changes = SHIPPED["sit"][2] | {"mesh.fsdp_up_to": 1, "sample.cfg_scale": 1.35, "sample.cfg_interval": (0.0, 0.7)}
    e, found = compiled_for("sit_imagenet256", "B", changes, "tpu:v5e:2x2", sample_batch=16)
    check_program(e, found, device_flops=0.05)
    assert e.sample.evaluations_per_image("linear", e.model) == 422  # 172 of 250 steps at or below 0.7
    assert found.sampler.device_flops * 4 == pytest.approx(found.sampler.flops, rel=0.03)


@TPU
def test_a_step_that_a_tpus_compiler_refuses_is_reported_not_raised():
    _, found = compiled_for("digits", "", {"data.batch_size": 262_144}, "tpu:v5e:2x2")
    assert not found.fits and found.train.used > found.train.limit > 15 * 2**30
    assert "DOES NOT FIT" in found.page() and "parameters" in found.page()


@GPU
@pytest.mark.parametrize("arg,head", [("B", 64), ("XL", 72)])
@pytest.mark.parametrize("target", ["gpu:h200:8", "gpu:h100:8", "gpu:a100:8"])
def test_on_a_gpu_the_attention_is_cudnn_forward_and_backward(arg, head, target):
    e, found = compiled_for("sit_imagenet256", arg, SHIPPED["sit"][2] | {"data.batch_size": 64}, target)
    assert e.model.width // e.model.num_heads == head
    assert found.train.attention == "cudnn (2 forward, 2 backward)"
    check_program(e, found, device_flops=0.05)


@FULL
@pytest.mark.parametrize("target", [pytest.param("tpu:v5e:16x16", marks=TPU), pytest.param("gpu:h200:8", marks=GPU)])
@pytest.mark.parametrize("config", ["sit_imagenet256", "lightningdit_imagenet256", "dit_imagenet256"])
@pytest.mark.parametrize("batch", [256, 1024])
def test_full_size_fits_256_chips_and_eight_gpus(config, batch, target):
    e, found = compiled_for(config, "XL", {"data.batch_size": batch}, target)
    check_program(e, found, device_flops=0.5)
