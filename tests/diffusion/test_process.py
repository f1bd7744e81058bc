"""Times of a process, its target, and the velocity of each prediction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
from toy import sample_latents

from ig_jax.diffusion import paths
from ig_jax.diffusion.guidance import Guidance, Scales
from ig_jax.diffusion.process import PREDICTIONS, ProcessConfig
from ig_jax.models import dit, zoo
from ig_jax.models.dit import DiTOutput

UNIFORM = ProcessConfig("linear", "velocity", "uniform", 0.0, 1.0)
GAUSSIAN = ProcessConfig("gaussian", "noise", "uniform", 0.0, 1.0)
MODEL = dit.DiTConfig(
    **zoo.FAMILIES["sit"],
    input_size=4,
    channels=3,
    patch_size=2,
    depth=2,
    width=16,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
    inter_depth=(1,),
    dtype="float32",
    scan_blocks=False,
    remat="none",
)


def path_process(kind, prediction="velocity"):
    return dataclasses.replace(UNIFORM, kind=kind, prediction=prediction)


def test_uniform_times_fill_the_range_of_the_process():
    for process, low, high in (
        (UNIFORM, 0, 1),
        (path_process("vp"), 1e-5, 1),
        (path_process("cosine", "noise"), 1e-3, 0.999),
    ):
        t = np.asarray(process.draw_times(jax.random.key(0), (20_000,)))
        assert low <= t.min() < low + 1e-3 and high - 1e-3 < t.max() <= high
        assert abs(t.mean() - 0.5) < 0.01 and abs(t.std() - 12**-0.5) < 0.005


def test_logit_normal_times_have_the_moments_they_are_named_after():
    process = dataclasses.replace(UNIFORM, time="logit_normal", time_mean=0.8, time_std=0.6)
    t = np.asarray(process.draw_times(jax.random.key(1), (50_000,)), np.float64)
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.8) < 0.01 and abs(logit.std() - 0.6) < 0.01
    assert abs(np.mean(((logit - 0.8) / 0.6) ** 4) - 3) < 0.15  # a normal, not merely the right spread


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_log_normal_times_are_those_of_a_log_normal_noise_level(kind):
    process = dataclasses.replace(UNIFORM, kind=kind, time="log_normal", time_mean=-0.4, time_std=1.2)
    c = paths.coefficients(kind, np.asarray(process.draw_times(jax.random.key(1), (50_000,)), np.float64))
    level = np.log(c.sigma / c.alpha)
    assert abs(level.mean() + 0.4) < 0.02 and abs(level.std() - 1.2) < 0.02
    assert abs(np.mean(((level + 0.4) / 1.2) ** 4) - 3) < 0.15


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1.0, 0.9995, 0.9985, 0.99])
def test_velocities_of_a_noise_prediction_lose_nothing_near_t_1(kind, t):
    process, t = path_process(kind, "noise"), np.float32(t)
    x_t, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 3)).astype(np.float32)
    found = jax.jit(lambda *a: process.to_velocity(MODEL, DiTOutput(a[1], ()), a[0], a[2]).final)(x_t, noise, t[None])
    s = max(1 - np.float64(t), 1e-3)  # the distance from pure noise, in float64
    alpha, sigma = (s, 1 - s) if kind == "linear" else (np.sin(np.pi / 2 * s), np.cos(np.pi / 2 * s))
    d_alpha, d_sigma = (-1, 1) if kind == "linear" else (-np.pi / 2 * sigma, np.pi / 2 * alpha)
    x = (np.float64(x_t) - sigma * noise) / alpha
    exact = d_alpha * x + d_sigma * noise
    np.testing.assert_allclose(found, exact, rtol=0, atol=6e-7 * abs(exact).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_of_the_reversed_clock_is_turned_for_a_velocity_only(prediction):
    model = dataclasses.replace(MODEL, clock="noise_at_0", inter_head_init="xavier")
    params = dit.init(model, jax.random.key(0))
    params = {name: value + 0.05 for name, value in params.items()}
    x_t, t, y = jnp.ones((2, 4, 4, 3)), jnp.array([0.25, 0.75]), jnp.array([0, 5])
    published = dit.apply(dataclasses.replace(model, clock="noise_at_1"), params, x_t, 1 - t, y)
    process = path_process("linear", prediction)
    found, _ = process.predictions(model, dit.apply(model, params, x_t, t, y), t)
    sigma = t[:, None, None, None]
    factor = {"velocity": -1, "noise": 1, "data": 1, "score": -sigma}[prediction]
    for got, raw in zip(found.heads, published.heads):
        np.testing.assert_allclose(got, factor * raw, rtol=1e-6)


def test_gaussian_timesteps_are_all_the_whole_numbers_from_0_to_999():
    t = np.asarray(GAUSSIAN.draw_times(jax.random.key(2), (50_000,)))
    assert t.dtype == np.float32 and set(t) == set(range(1000))
    assert np.bincount(t.astype(int)).max() < 100  # 50 each on average


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", paths.PATHS)
def test_a_perfect_prediction_stands_for_the_velocity_of_the_path(kind, prediction):
    rng = np.random.default_rng(0)
    x, eps = jnp.asarray(rng.standard_normal((2, 5, 2, 2, 3)), jnp.float32)
    t = jnp.array([0.05, 0.3, 0.5, 0.7, 0.95])
    process = path_process(kind, prediction)
    x_t, target = process.noised(x, eps, t)
    expected = {"velocity": paths.interpolate(kind, x, eps, t)[1], "noise": eps, "data": x, "score": eps}
    assert (target == expected[prediction]).all()
    sigma = paths.coefficients(kind, t[:, None, None, None]).sigma
    answer = -eps / sigma if prediction == "score" else target
    out = process.to_velocity(MODEL, DiTOutput(answer, (0 * target,)), x_t, t)
    assert (abs(out.final - expected["velocity"]) / (1 + abs(expected["velocity"]))).max() < 2e-4
    if prediction == "data":  # the head that predicts x = 0 says eps = x_t / sigma
        d_sigma = paths.coefficients(kind, t[:, None, None, None]).d_sigma
        np.testing.assert_allclose(out.intermediate[0], d_sigma * x_t / sigma, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ("noise", "data", "score"))
@pytest.mark.parametrize("kind", paths.PATHS)
def test_velocities_are_finite_at_both_ends_of_a_grid(kind, prediction):
    out = path_process(kind, prediction).to_velocity(
        MODEL, DiTOutput(jnp.ones((2, 1, 1, 1)), ()), jnp.full((2, 1, 1, 1), 0.5), jnp.array([0.0, 1.0])
    )
    assert jnp.isfinite(out.final).all()
    if (kind, prediction) == ("linear", "data"):  # (x_t - D) / t, exact where it is defined
        assert (out.final[1] == -0.5).all()
    if (kind, prediction) == ("linear", "noise"):  # (eps - x_t) / (1 - t)
        assert (out.final[0] == 0.5).all()


@pytest.mark.parametrize("kind, prediction", [("linear", "noise"), ("cosine", "data"), ("vp", "noise")])
def test_samples_of_a_network_that_knows_a_gaussian_are_that_gaussian(monkeypatch, kind, prediction):
    # x ~ N(0.6, 0.5^2) per number; the exact E[x | x_t] or E[eps | x_t] integrated by Heun gives it back.
    def network(model, params, x_t, t, y, until_head=None):
        c = paths.coefficients(kind, t[:, None, None, None])
        centred = (x_t - c.alpha * 0.6) / (c.alpha**2 * 0.25 + c.sigma**2)
        out = {"data": 0.6 + 0.25 * c.alpha * centred, "noise": c.sigma * centred}[prediction]
        return DiTOutput(out, (out,))

    monkeypatch.setattr(dit, "apply", network)
    samples = jax.jit(
        lambda: sample_latents(
            {},
            jnp.uint32(0),
            jnp.arange(256),
            jnp.zeros(256, jnp.int32),
            Scales(),
            model=MODEL,
            process=path_process(kind, prediction),
            solver="heun",
            steps=80,
            guidance=Guidance(),
        )
    )()
    assert abs(float(samples.mean()) - 0.6) < 0.03
    assert abs(float(samples.std()) - 0.5) < 0.03


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "gvp"}, "kind='gvp' must be one of linear, cosine, vp, gaussian, gaussian_cosine"),
        ({"prediction": "energy"}, "prediction='energy' must be one of velocity, noise, data, score"),
        ({"time": "lognormal"}, "time='lognormal' must be one of uniform, logit_normal, log_normal"),
        ({"kind": "vp", "time": "log_normal"}, "time='log_normal' must be uniform or logit_normal for kind='vp'"),
        ({"time_std": 0.0}, "time_std=0.0 must be greater than 0"),
        ({"time_mean": float("nan")}, "time_mean=nan must be a finite number"),
        ({"kind": "gaussian"}, "prediction='velocity' must be noise for kind='gaussian'"),
        (
            {"kind": "gaussian", "prediction": "noise", "time": "logit_normal"},
            "time='logit_normal' must be uniform for kind='gaussian'",
        ),
    ],
)
def test_a_process_that_does_not_exist_is_refused(change, message):
    with refused(message.split("=")[0], says=message):
        dataclasses.replace(UNIFORM, **change)


def test_a_network_of_another_form_is_refused():
    variance = dataclasses.replace(MODEL, sigma_channels="variance")
    GAUSSIAN.check_model(variance)
    with refused("model.sigma_channels", "none", expected="variance for process.kind="):
        GAUSSIAN.check_model(MODEL)
    with refused("model.sigma_channels", "variance", expected="none or unused"):
        UNIFORM.check_model(variance)
    reverse = dataclasses.replace(MODEL, clock="noise_at_0")
    UNIFORM.check_model(reverse)
    path_process("linear", "noise").check_model(reverse)
    with refused("model.clock", "noise_at_0", expected="noise_at_1"):
        GAUSSIAN.check_model(dataclasses.replace(variance, clock="noise_at_0"))
