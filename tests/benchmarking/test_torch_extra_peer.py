"""The peer in torch does the work that it is compared by: an optional extra, all else is tested without it."""

import bench_fakes
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.benchmarking import peer, peer_numbers
from ig_jax.diffusion import samplers

torch = pytest.importorskip("torch", reason="torch is not installed; pip install torch==2.13.0 for these tests")
pytest.importorskip("diffusers")


def made(command: str, **changes):
    return peer.MAKERS[command](peer_numbers.numbers(bench_fakes.case(**changes), command), compiled=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_moves_the_weights_and_the_average_follows(dtype):
    runner = made("train", dtype=dtype)
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
    runner = made("sample", **changes)
    seen = []
    forward = runner.forward
    runner.forward = lambda x, **arguments: seen.append(len(x)) or forward(x, **arguments)
    runner.run(1)
    assert sum(seen) == evaluations * 2 == runner.report["evaluations"] * 2
    assert runner.finish()["finite"]


def test_a_sampler_takes_our_steps():
    """With the same field and no noise, both end in the same place."""
    case = bench_fakes.case(steps=10, cfg_scale=1.35)
    runner = made("sample", steps=10, cfg_scale=1.35)
    start = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    draws = iter([torch.from_numpy(start)])
    runner.noise = lambda *shape: next(draws)
    for row in runner.numbers["rows"]:
        row["noise"] = 0.0
    runner.predict = lambda x, t, y: 0.3 * x + t[:, None, None, None] - y[:, None, None, None] / 1000

    def velocity(x, t, region):
        def field(y):
            return 0.3 * x + t - y[:, None, None, None] / 1000

        conditional, unconditional = field(jnp.arange(2.0)), field(jnp.full(2, 1000.0))
        return unconditional + 1.35 * (conditional - unconditional) if region.cfg else conditional

    solver = case.sample.method
    ours = samplers.integrate(
        solver, solver.rows("linear", 10), velocity, jnp.asarray(start), region=case.sample.guidance.region,
        noise=lambda step: jnp.zeros((2, 4, 8, 8)),
    )
    np.testing.assert_allclose(runner._draw().numpy(), ours, atol=1e-5)
