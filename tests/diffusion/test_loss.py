"""The loss: its terms and their sum, the stop-gradient, the fixed point of the accelerated target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused

from ig_jax.diffusion import loss as losses
from ig_jax.diffusion import paths
from ig_jax.diffusion.loss import LossConfig, NoisyBatch, Objective
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.models import dit, zoo
from ig_jax.models.dit import DiTOutput

MODEL = dit.DiTConfig(
    **{**zoo.FAMILIES["sit"], "inter_head_init": "xavier"},
    input_size=4,
    channels=3,
    patch_size=2,
    depth=2,
    width=16,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
    inter_depth=(1, 2),
    dtype="float32",
    scan_blocks=False,
    remat="none",
)
LOSS = LossConfig(
    inter_weight=(0.5, 0.25),
    label_drop=0.1,
    accelerate=False,
    omega=0.5,
    gap_source="online",
    start_step=0,
    direction_weight=0.0,
    direction_intermediate=False,
)
VELOCITY = ProcessConfig("linear", "velocity", "uniform", 0.0, 1.0)
NAMES = ("loss/intermediate_1", "loss/intermediate_2")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_params(config, seed=0):
    """Parameters that are nowhere zero: a zero head would hide half of what is tested."""
    rng = np.random.default_rng(seed)
    return {k: jnp.float32(0.2 * rng.standard_normal(s.shape)) for k, s in dit.shapes(config).items()}


apply = jax.jit(dit.apply, static_argnums=0)


@pytest.fixture(scope="module")
def batch():
    t = jnp.array([0.1, 0.4, 0.6, 0.9])
    return normal(0, 4, 4, 4, 3), normal(1, 4, 4, 4, 3), t, jnp.array([0, 1, 2, 5])


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def batch_loss(params, batch, loss, process=VELOCITY, model=MODEL, step=0):
    ema = jax.tree.map(lambda p: 0.9 * p, params)
    return jitted_loss(Objective(model, process, loss), params, ema, NoisyBatch(*batch), jnp.int32(step))


jitted_loss = jax.jit(Objective.__call__, static_argnums=0)
jitted_gradient = jax.jit(
    jax.grad(lambda params, objective, *batch: objective(params, params, NoisyBatch(*batch), 0)[0]), static_argnums=1
)


def test_squared_error_is_the_mean_over_one_example():
    a, b = normal(0, 2, 3, 3, 4), normal(1, 2, 3, 3, 4)
    expected = [np.mean((np.float64(a[i]) - np.float64(b[i])) ** 2) for i in range(2)]
    np.testing.assert_allclose(losses.squared_error(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("kind", paths.PATHS)
def test_losses_of_noise_and_score_are_those_of_the_original_sit(monkeypatch, kind, prediction, weighting):
    """In float64 and its clock, with data at 1: compute_drift and training_losses of its transport."""
    head, x, eps = np.random.default_rng(6).standard_normal((3, 5, 4, 4, 3))
    t = np.array([0.02, 0.3, 0.5, 0.8, 0.98])
    ours = paths.coefficients(kind, t)
    alpha, sigma, d_alpha, d_sigma = ours.alpha, ours.sigma, -ours.d_alpha, -ours.d_sigma
    drift_var = d_alpha / alpha * sigma**2 - sigma * d_sigma
    weight = {"none": 1, "velocity": (drift_var / sigma) ** 2, "likelihood": drift_var / sigma**2}[weighting]
    error = head - eps if prediction == "noise" else head * sigma[:, None, None, None] + eps
    expected = np.mean(weight * np.mean(error**2, axis=(1, 2, 3)))

    monkeypatch.setattr(losses.dit, "apply", lambda *args: DiTOutput(jnp.float32(head), ()))
    model = dataclasses.replace(MODEL, inter_depth=())
    loss = dataclasses.replace(LOSS, inter_weight=(), weighting=weighting)
    objective = Objective(model, ProcessConfig(kind, prediction, "uniform", 0.0, 1.0), loss)
    batch = NoisyBatch(*(jnp.float32(a) for a in (x, eps, t)), jnp.zeros(5, jnp.int32))
    total, metrics = objective({}, {}, batch, jnp.int32(0))
    assert float(total) == pytest.approx(expected, rel=3e-6) and metrics["loss/final"] == total


@pytest.mark.parametrize("process", [VELOCITY, dataclasses.replace(VELOCITY, prediction="data")])
def test_a_weighting_that_its_prediction_does_not_have_is_refused(process):
    with refused("loss.weighting", "velocity", expected="noise or score"):
        Objective(MODEL, process, dataclasses.replace(LOSS, weighting="velocity"))


def test_direction_error_of_small_angles_is_not_rounded_away():
    angle = np.array([1e-4, 1e-3, 0.1], np.float32)
    prediction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)[:, None, None]
    target = jnp.broadcast_to(jnp.array([5.0, 0.0]), (3, 1, 1, 2))
    exact = 1 - np.cos(np.arctan2(*np.float64(prediction[:, 0, 0]).T[::-1]))
    np.testing.assert_allclose(losses.direction_error(prediction, target), exact, rtol=1e-5)


def test_direction_error_by_hand():
    # Two pixels: (3, 4) against (4, 3) has cosine 24/25, (1, 0) against (-2, 0) has -1.
    prediction = jnp.array([[[[3.0, 4.0], [1.0, 0.0]]]])
    target = jnp.array([[[[4.0, 3.0], [-2.0, 0.0]]]])
    np.testing.assert_allclose(losses.direction_error(prediction, target), [(1 / 25 + 2) / 2], rtol=1e-6)


def test_direction_gradient_is_that_of_the_angle_and_zero_for_a_head_that_begins_at_zero():
    angle = 0.3  # of the prediction; the target lies along the first axis, so the loss is 1 - cos(angle)
    unit = jnp.array([[[[np.cos(angle), np.sin(angle)]]]])
    target = jnp.array([[[[5.0, 0.0]]]])
    gradient = jax.grad(lambda p: losses.direction_error(p, target).sum())
    tangent = jnp.array([-np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(gradient(2 * unit)[0, 0, 0], np.sin(angle) / 2 * tangent, rtol=1e-5)
    assert losses.direction_error(0 * unit, target) == 1
    assert (gradient(0 * unit) == 0).all()


def test_no_gradient_passes_through_the_gap():
    target, gap = normal(0, 2, 2, 2, 3), normal(1, 2, 2, 2, 3)
    out = DiTOutput(normal(2, 2, 2, 2, 3), (normal(3, 2, 2, 2, 3),))
    moved = losses.accelerated_target(target, gap, 0.25)
    np.testing.assert_allclose(moved, target + 0.25 * gap, rtol=1e-6)

    def loss(out):
        moved = losses.accelerated_target(target, losses.guidance_gap(out), 0.5)
        return losses.squared_error(out.final, moved).sum()

    gradient = jax.grad(loss)(out)
    expected = 2 * (out.final - target - 0.5 * (out.final - out.intermediate[0])) / 12
    np.testing.assert_allclose(gradient.final, expected, rtol=1e-5, atol=1e-7)
    assert (gradient.intermediate[0] == 0).all()


@pytest.mark.parametrize("prediction", ("velocity", "noise"))
@pytest.mark.parametrize("path", paths.PATHS)
def test_the_data_form_of_the_accelerated_target_is_that_of_every_prediction(path, prediction):
    x, eps, final, inter = np.random.default_rng(4).standard_normal((4, 9))
    t, omega = np.linspace(0.1, 0.9, 9), 1 / 3
    c = paths.coefficients(path, t)
    x_t = c.alpha * x + c.sigma * eps
    other = lambda value, source, target: (lambda ab: ab[0] * x_t + ab[1] * value)(
        paths.conversion(path, source, target, t)
    )
    target, v_final, v_inter = (other(value, "data", prediction) for value in (x, final, inter))
    moved = losses.accelerated_target(target, v_final - v_inter, omega)
    in_data = losses.accelerated_target(x, final - inter, omega)
    scale = 1 + abs(other(in_data, "data", prediction))
    assert (abs(other(in_data, "data", prediction) - moved) / scale).max() < 1e-6
    assert (abs(other(moved, prediction, "data") - in_data) / scale).max() < 1e-6


@pytest.mark.parametrize(
    "process",
    [
        VELOCITY,
        ProcessConfig("cosine", "velocity", "uniform", 0.0, 1.0),
        ProcessConfig("linear", "data", "uniform", 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("omega", (0.0, 1 / 3, 0.6))
def test_descending_the_real_loss_ends_at_guidance_1_over_1_minus_omega(monkeypatch, process, omega):
    # A network that knows one number for the data in each head; the weak one never leaves -0.5.
    x, eps = jnp.full((8, 1, 1, 1), 1.0), normal(5, 8, 1, 1, 1)
    t = jnp.linspace(0.5, 0.9, 8)

    def network(model, params, x_t, t, y):
        quantity = lambda data: (
            paths.convert(process.kind, "data", process.prediction, jnp.broadcast_to(data, x_t.shape), x_t, t)
            if process.prediction != "data"
            else jnp.broadcast_to(data, x_t.shape)
        )
        return DiTOutput(quantity(params["final"]), (quantity(jax.lax.stop_gradient(params["weak"])),))

    monkeypatch.setattr(losses.dit, "apply", network)
    model = dataclasses.replace(MODEL, channels=1, inter_depth=(1,))
    loss = dataclasses.replace(LOSS, inter_weight=(0.5,), accelerate=True, omega=omega)
    objective, batch = Objective(model, process, loss), NoisyBatch(x, eps, t, jnp.zeros(8, jnp.int32))
    descend = jax.jit(jax.grad(lambda p: objective(p, p, batch, jnp.int32(0))[0]))
    params = {"final": jnp.float32(0.0), "weak": jnp.float32(-0.5)}
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, descend(params))
    guidance = (params["final"] - params["weak"]) / (1.0 - params["weak"])
    assert float(params["weak"]) == -0.5
    assert float(guidance) == pytest.approx(1 / (1 - omega), rel=0.01)


def test_acceleration_moves_only_the_final_target_by_the_gap_of_the_named_network(params, batch):
    x, eps, t, y = batch
    x_t, target = VELOCITY.noised(x, eps, t)
    out = apply(MODEL, params, x_t, t, y)
    ema = apply(MODEL, jax.tree.map(lambda p: 0.9 * p, params), x_t, t, y)
    for source, network in (("online", out), ("ema", ema)):
        loss = dataclasses.replace(LOSS, accelerate=True, gap_source=source, start_step=3)
        moved = target + 0.5 * (network.final - network.intermediate[0])
        _, late = batch_loss(params, batch, loss, step=3)
        _, early = batch_loss(params, batch, loss, step=2)
        error = lambda head, goal: pytest.approx(float(jnp.mean((head - goal) ** 2)), rel=1e-5)
        assert float(late["loss/final"]) == error(out.final, moved)
        assert float(early["loss/final"]) == error(out.final, target)
        for name, head in zip(NAMES, out.intermediate):
            assert float(late[name]) == error(head, target)
        added = late["loss/final"] + 0.5 * late[NAMES[0]] + 0.25 * late[NAMES[1]]
        assert float(added) == pytest.approx(float(late["loss/total"]), rel=3e-7)


def test_lambda_0_leaves_the_final_loss_and_its_gradient_untouched():
    out = DiTOutput(normal(2, 4, 4, 4, 3), (normal(3, 4, 4, 4, 3), normal(4, 4, 4, 4, 3)))
    target = normal(5, 4, 4, 4, 3)

    objective = Objective(MODEL, VELOCITY, dataclasses.replace(LOSS, inter_weight=(0.0, 0.0)))
    batch = NoisyBatch(*(jnp.zeros(1) for _ in NoisyBatch._fields))

    def dual(out):
        return jnp.mean(losses.total(objective.terms(out, None, target, target, batch)))

    plain, plain_gradient = jax.value_and_grad(lambda final: jnp.mean(losses.squared_error(final, target)))(out.final)
    value, gradient = jax.value_and_grad(dual)(out)
    assert value == plain
    assert (gradient.final == plain_gradient).all()
    assert all((head == 0).all() for head in gradient.intermediate)


def test_lambda_0_trains_the_trunk_as_if_there_were_no_heads(params, batch):
    bare = dataclasses.replace(MODEL, inter_depth=())
    shared = {name: params[name] for name in dit.shapes(bare)}
    loss = dataclasses.replace(LOSS, inter_weight=(0.0, 0.0))
    with_heads = jitted_gradient(params, Objective(MODEL, VELOCITY, loss), *batch)
    alone = Objective(bare, VELOCITY, dataclasses.replace(LOSS, inter_weight=()))
    without = jitted_gradient(shared, alone, *batch)
    for name, gradient in without.items():
        assert (with_heads[name] == gradient).all(), name


@pytest.mark.parametrize("weight, intermediate", [(0.7, False), (0.7, True)])
def test_the_logged_terms_add_up_to_what_is_optimised(params, batch, weight, intermediate):
    loss = dataclasses.replace(LOSS, direction_weight=weight, direction_intermediate=intermediate)
    total, metrics = batch_loss(params, batch, loss)
    weights = {"loss/final": 1.0, NAMES[0]: 0.5, NAMES[1]: 0.25}
    heads = list(weights) if intermediate else ["loss/final"]
    weights |= {f"{name}_direction": weight * weights[name] for name in heads}
    assert {name for name in metrics if name.startswith("loss/")} == {"loss/total", *weights}
    assert total == metrics["loss/total"]
    added = sum(weight * metrics[name] for name, weight in weights.items())
    assert float(added) == pytest.approx(float(total), rel=3e-7)


def test_the_direction_term_compares_each_head_with_its_own_target(params, batch):
    x, eps, t, y = batch
    x_t, target = VELOCITY.noised(x, eps, t)
    out = apply(MODEL, params, x_t, t, y)
    _, metrics = batch_loss(params, batch, dataclasses.replace(LOSS, direction_weight=0.7, direction_intermediate=True))
    for name, head in (("loss/final", out.final), (NAMES[1], out.intermediate[1])):
        p, v = np.float64(head), np.float64(target)
        cosine = (p * v).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(v, axis=-1)
        assert float(metrics[f"{name}_direction"]) == pytest.approx(np.mean(1 - cosine), rel=1e-5)
