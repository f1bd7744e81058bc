"""The train step: its gradients, its independence of meshes and accumulation, and its single compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from refusal import refused

from ig_jax.diffusion import curves
from ig_jax.diffusion.loss import Objective
from ig_jax.forecast import hlo
from ig_jax.forecast.collectives import collectives
from ig_jax.models import dit
from ig_jax.models.latents import from_uint8
from ig_jax.optim.optimizer import learning_rate, make_optimizer
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import batch_sharding, on_mesh, tree_shardings
from ig_jax.training.state import TrainState, born_sharded, partition, state_layout


def objective(experiment, **loss):
    """The objective of an experiment with changes of its loss."""
    e = experiment
    return Objective(e.model, e.process, dataclasses.replace(e.loss, **loss))


def start(experiment, transformation) -> TrainState:
    params = toy.params(experiment.model)
    ema = {name: jax.tree.map(lambda p: 0.9 * p, params) for name in experiment.ema.names}
    return TrainState(jnp.int32(0), params, ema, transformation.init(partition(params, experiment.optimizer.trains)[0]))


def prepare(experiment, mesh, spec=None):
    """(jitted step, state, place a batch) for an experiment on a mesh."""
    transformation = make_optimizer(experiment.optimizer, experiment.run.steps, experiment.model)
    make = functools.partial(start, experiment, transformation)
    layout = state_layout(make, mesh)
    step = toy.train_step(
        transformation,
        model=experiment.model,
        process=experiment.process,
        loss=experiment.loss,
        optimizer=experiment.optimizer,
        ema=experiment.ema,
        total_steps=experiment.run.steps,
        seed=experiment.seed,
        spec=spec,
    ).jitted(layout, mesh)
    return step, born_sharded(make, layout), lambda batch: jax.device_put(batch, batch_sharding(mesh))


def train(experiment, mesh, steps=3, inspect=None):
    step, state, place = prepare(experiment, mesh)
    history = []
    if inspect:
        compiled = step.lower(state, place(toy.batch())).compile()
        inspect(compiled.as_text())
        step = compiled
    for i in range(steps):
        state, metrics = step(state, place(toy.batch(seed=i)))
        history.append(toy.scalars(metrics))
    assert inspect or step._cache_size() == 1
    return jax.device_get(state), history


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone():
    return train(toy.experiment(), one_device())


def assert_same(result, expected):
    (state, history), (want_state, want_history) = result, expected
    for got, want in zip(history, want_history, strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=1e-7)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(want_state.params), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)  # Adam divides small gradients by themselves
    for got, want in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want_state.ema), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        *(pytest.param(axes, marks=toy.SLOW) for axes in ({"data": 8}, {"data": 1, "fsdp": 8})),
    ],
)
def test_eight_devices_equal_one(alone, axes, monkeypatch):
    monkeypatch.setattr("ig_jax.parallel.sharding.SMALLEST_FSDP_ARRAY", 64)  # or a toy would stay replicated
    assert_same(train(toy.experiment(), make_mesh(**axes)), alone)


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_sharded_forward_pass_equals_the_replicated_one(axes, monkeypatch):
    monkeypatch.setattr("ig_jax.parallel.sharding.SMALLEST_FSDP_ARRAY", 64)
    model, mesh, params = toy.MODEL, make_mesh(**axes), toy.params()
    x, y = toy.batch()["latent"], toy.batch()["label"]
    arguments = x, jnp.linspace(0, 1, len(x)), y

    def forward(params, *arguments):
        with on_mesh(mesh):
            return dit.apply(model, params, *arguments)

    placed = jax.device_put(params, tree_shardings(params, mesh))
    assert not placed["blocks.0.mlp.fc1.kernel"].sharding.is_fully_replicated
    got = jax.jit(forward)(placed, *jax.device_put(arguments, batch_sharding(mesh)))
    want = jax.jit(functools.partial(dit.apply, model))(params, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_fsdp_cuts_parameters_averages_and_moments(monkeypatch):
    monkeypatch.setattr("ig_jax.parallel.sharding.SMALLEST_FSDP_ARRAY", 64)
    _, state, _ = prepare(toy.experiment(), make_mesh(data=1, fsdp=8))
    name = "blocks.0.attn.qkv.kernel"
    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for array in (state.params[name], state.ema["0.999"][name], moments.mu[name]):
        assert array.addressable_shards[0].data.size * 8 == array.size
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state))
    assert held < 1.05 / 8 * sum(array.nbytes for array in jax.tree.leaves(state))


def test_micro_batches_equal_one_batch_and_exchange_gradients_once(alone, monkeypatch):
    monkeypatch.setattr("ig_jax.parallel.sharding.SMALLEST_FSDP_ARRAY", 64)
    mesh, found = make_mesh(data=2, fsdp=2, tensor=2), []
    experiment = toy.experiment(**{"optimizer.accumulate": 2})
    assert_same(train(experiment, mesh, inspect=lambda text: found.extend(collectives(hlo.parse(text), mesh))), alone)
    sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert 2 in {one.times for one in sums if one.axes == "tensor"}  # within the layers of each micro-batch
    assert {one.times for one in sums if one.axes != "tensor"} == {1}


def test_scan_and_remat_train_the_same(alone):
    assert_same(train(toy.experiment(**{"model.scan_blocks": True, "model.remat": "full"}), one_device()), alone)


def test_the_state_is_donated():
    step, state, place = prepare(toy.experiment(), one_device())
    before = state.params["blocks.0.attn.qkv.kernel"]
    step(state, place(toy.batch()))
    assert before.is_deleted()


def test_the_step_optimises_the_loss_of_its_own_draws_with_the_first_average():
    """At the first step of the accelerated target, so that a step counted wrongly would leave it out."""
    e = toy.experiment(
        **{
            "seed": 5,
            "loss.accelerate": True,
            "loss.gap_source": "ema",
            "loss.label_drop": 0.5,
            "loss.start_step": 1,
            "ema.decays": (0.9, 0.5),
        }
    )
    step, state, place = prepare(e, one_device(), e.batch_spec)
    averages = {name: jax.tree.map(lambda p, f=float(name): f * p, state.params) for name in state.ema}
    params, average = jax.device_get((state.params, averages["0.9"]))
    image = jax.random.randint(jax.random.key(0), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    label = jnp.arange(16) % 10
    number = jax.device_put(jnp.int32(1), state.step.sharding)
    _, got = step(dataclasses.replace(state, step=number, ema=averages), place({"image": image, "label": label}))

    x = from_uint8(image)
    noisy = objective(e).noised(x, label, 5, jnp.int32(1))
    gradient, want = jax.jit(jax.grad(objective(e), has_aux=True))(params, average, noisy, jnp.int32(1))
    for name in ("loss/total", "loss/final", "loss/intermediate"):
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5)
    assert float(got["gap_norm"]) == pytest.approx(float(want["gap_square"]) ** 0.5, rel=1e-5)
    assert float(got["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert float(jnp.linalg.norm(got["gradient"].values)) == pytest.approx(float(got["gradient_norm"]), rel=1e-5)
    intermediate = curves.plain("sigma", got["sigma"])["sigma/intermediate"].values()
    weights = np.asarray(got["sigma"].values[0])
    assert np.nansum(np.array([*intermediate], float) * weights) == pytest.approx(
        float(want["loss/intermediate"]), rel=1e-4
    )
    assert float(got["learning_rate"]) == pytest.approx(float(learning_rate(e.optimizer, e.run.steps)(1)))


def test_ema_moves_by_its_rate_and_frozen_positions_stay():
    experiment = toy.experiment(**{"ema.warmup": False, "ema.decays": (0.5, 0.9)})
    step, state, place = prepare(experiment, one_device())
    start_ema, positions = jax.device_get((state.ema, state.params["pos_embed"]))
    state, _ = step(state, place(toy.batch()))
    state = jax.device_get(state)
    for name, rate in (("0.5", 0.5), ("0.9", 0.1)):
        for key, value in state.params.items():
            expected = start_ema[name][key] + rate * (value - start_ema[name][key])
            np.testing.assert_allclose(state.ema[name][key], expected, atol=1e-6)
    assert (state.params["pos_embed"] == positions).all()


def test_label_drop_uses_the_null_label_at_its_rate():
    x, y = jnp.zeros((4096, 1, 1, 1)), jnp.arange(4096) % 10
    _, _, t, dropped = objective(toy.experiment(), label_drop=0.1).noised(x, y, 0, jnp.int32(3))
    assert float((dropped == 10).mean()) == pytest.approx(0.1, abs=0.02)
    assert ((dropped == y) | (dropped == 10)).all()
    assert float(t.min()) >= 0 and float(t.max()) < 1 and float(t.mean()) == pytest.approx(0.5, abs=0.02)


def test_noise_time_and_label_drop_are_independent():
    x, y = jnp.zeros((20_000, 1, 1, 1)), jnp.zeros(20_000, jnp.int32)
    _, eps, t, y = objective(toy.experiment(), label_drop=0.5).noised(x, y, 0, jnp.int32(3))
    assert abs(np.corrcoef([eps.ravel(), t, y == 10]) - np.eye(3)).max() < 0.03


def test_draws_belong_to_seed_step_and_position():
    noised = objective(toy.experiment(), label_drop=0.5).noised

    def draw(seed, step, count):
        return noised(jnp.zeros((count, 2, 2, 1)), jnp.zeros(count, jnp.int32), seed, jnp.int32(step))[1:]

    for small, large in zip(draw(0, 5, 8), draw(0, 5, 32)):
        np.testing.assert_array_equal(small, large[:8])
    for other in (draw(1, 5, 8), draw(0, 6, 8)):
        assert all((a != b).any() for a, b in zip(draw(0, 5, 8), other))


def test_lambda_zero_trains_the_final_head_alone():
    experiment = toy.experiment(**{"loss.inter_weight": (0.0,)})
    step, state, place = prepare(experiment, one_device())
    before = jax.device_get(state.params)
    state, metrics = step(state, place(toy.batch()))
    assert metrics["loss/total"] == metrics["loss/final"]
    changed = {name for name, value in state.params.items() if (value != before[name]).any()}
    moved = np.sqrt(sum(np.sum((state.params[n] - before[n]) ** 2) for n in before if n.startswith("blocks.1.")))
    assert dict(zip(metrics["update"].points, metrics["update"].values))["1"] == pytest.approx(moved, rel=1e-3)
    assert changed == {name for name in before if not name.startswith("inter_heads") and name != "pos_embed"}


def test_loss_and_model_must_agree_on_the_heads():
    with refused("config.loss.inter_weight", (0.5, 0.5), expected="one weight for each"):
        toy.experiment(**{"loss.inter_weight": (0.5, 0.5)})
