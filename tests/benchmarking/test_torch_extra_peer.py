"""The work of the peer in torch, an optional extra."""

import importlib.util
import json
import sys

import bench_fakes
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

torch = pytest.importorskip("torch", reason="torch is not installed; pip install torch==2.13.0 for these tests")
pytest.importorskip("diffusers")

from ig_jax.benchmarking import cases  # noqa: E402

SPEC = importlib.util.spec_from_file_location("peer_diffusers", toy.ROOT / "launch/peer_diffusers.py")
peer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peer)


def made(command: str, **changes):
    return peer.make(f"ig_jax.benchmarking.programs:{command}")(bench_fakes.case(**changes).as_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_moves_the_weights_and_the_average_follows(dtype):
    runner = made("Train", dtype=dtype)
    before = [p.detach().clone() for p in runner.parameters]
    assert all(p.any() for p in runner.parameters)
    runner.run(1)
    moved = [(p.detach() - b).abs().max().item() for p, b in zip(runner.parameters, before)]
    assert min(moved) > 0 and max(moved) < 1.1e-4  # AdamW's first step is the learning rate
    for average, p, b in zip(runner.average, runner.parameters, before):
        np.testing.assert_allclose(average.numpy(), (b + 1e-4 * (p.detach() - b)).numpy(), atol=1e-7)
    assert np.isfinite(runner.finish()["loss"])


@pytest.mark.parametrize("changes,evaluations", [({"steps": 10}, 17), ({"steps": 10, "cfg_scale": 1.0}, 10)])
def test_a_sampler_evaluates_as_often_as_ours(changes, evaluations, monkeypatch):
    runner = made("Sample", **changes)
    seen = []
    forward = runner.forward
    runner.forward = lambda x, **arguments: seen.append(len(x)) or forward(x, **arguments)
    runner.run(1)
    assert sum(seen) == evaluations * 2 == runner.report["evaluations"] * 2
    assert runner.finish()["finite"]


def test_a_sampler_takes_our_steps():
    """With the same field and no noise, both end in the same place."""
    case = bench_fakes.case(steps=10, cfg_scale=1.35)
    runner = made("Sample", steps=10, cfg_scale=1.35)
    start = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    draws = iter([torch.from_numpy(start)])
    runner.noise = lambda *shape: next(draws)
    for row in runner.rows:
        row["noise"] = 0.0
    runner.predict = lambda x, t, y: 0.3 * x + t[:, None, None, None] - y[:, None, None, None] / 1000

    def velocity(x, t, labels, region):
        def field(y):
            return 0.3 * x + t - y[:, None, None, None] / 1000

        conditional, unconditional = field(jnp.arange(2.0)), field(jnp.full(2, 1000.0))
        return unconditional + 1.35 * (conditional - unconditional) if "cfg" in region else conditional

    ours, _ = case.experiment.sample.solver.integrate(
        velocity,
        jnp.asarray(start),
        jnp.arange(2),
        path="linear",
        steps=10,
        region=case.experiment.sample.guidance.region,
        noise=lambda step: jnp.zeros((2, 4, 8, 8)),
    )
    np.testing.assert_allclose(runner._sample().numpy(), ours, atol=1e-5)


def test_the_peer_has_the_parts_of_sit_alone():
    with refused("--peer", "diffusers", expected="left out for LightningDiT-XL/1", fix="SiT"):
        peer.make("programs:Train")(cases.published("LightningDiT-XL/1").as_dict())
    with refused("--solver", "heun", expected="sde"):
        made("Sample", solver="heun")


@toy.SLOW
def test_a_step_in_turns_with_the_peer(tmp_path):
    results, script = tmp_path / "results.jsonl", toy.ROOT / "launch/peer_diffusers.py"
    flags = [*bench_fakes.TINY, "--steps=2", "--cfg_scale=1.35"]
    command = f"--peer={sys.executable} {script}"
    done = toy.run("ig_jax.benchmark", "sample", *flags, f"--results={results}", command)
    assert done.returncode == 0, done.stderr
    ours, other = map(json.loads, results.read_text().splitlines())
    assert ours["evaluations_per_image"] == other["evaluations_per_image"] == 4
    assert other["versions"]["torch"] and other["finite"] and ours["ratios"][0]["wall"]["median"] > 0
