"""Paths against their derivatives, and conversions against x and eps."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused

from ig_jax.diffusion import paths

INSIDE = np.linspace(0.01, 0.99, 15)
PAIRS = list(itertools.permutations(paths.QUANTITIES, 2))


def quantities(path, x, eps, t):
    """(x_t, each quantity) in float64, from their definitions."""
    c = paths.coefficients(path, t)
    return c.alpha * x + c.sigma * eps, {
        "velocity": c.d_alpha * x + c.d_sigma * eps,
        "noise": eps,
        "data": x,
        "score": -eps / c.sigma,
    }


@pytest.mark.parametrize("path", paths.PATHS)
def test_derivatives_are_those_of_alpha_and_sigma(path):
    step = 1e-6
    c, up, down = (paths.coefficients(path, INSIDE + d) for d in (0, step, -step))
    np.testing.assert_allclose(c.d_alpha, (up.alpha - down.alpha) / (2 * step), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(c.d_sigma, (up.sigma - down.sigma) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", paths.PATHS)
def test_data_at_0_and_noise_at_1(path):
    start, end = paths.coefficients(path, np.float64(0)), paths.coefficients(path, np.float64(1))
    assert (start.alpha, start.sigma) == (1, 0)
    assert abs(end.sigma - 1) < 3e-5 and abs(end.alpha) < 7e-3


def test_vp_is_the_limit_of_the_discrete_chain_and_stays_exact_at_small_times():
    # 1000 linear betas of 1e-4..0.02 are beta(t) dt with beta(t) from 0.1 to 20.
    chain = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = (np.arange(1000) + 1) / 1000
    continuous = paths.coefficients("vp", t).alpha ** 2
    np.testing.assert_allclose(np.log(chain)[99:], np.log(continuous)[99:], rtol=0.012)
    assert paths.coefficients("vp", np.float64(1)).alpha == pytest.approx(np.exp(-5.025), rel=1e-12)
    t = np.float64(1e-6)
    assert float(paths.coefficients("vp", jnp.float32(t)).sigma) == pytest.approx(np.sqrt(0.1 * t), rel=1e-4)


@pytest.mark.parametrize("path", paths.PATHS)
def test_velocity_is_the_derivative_of_x_t(path):
    rng = np.random.default_rng(0)
    x, eps = rng.standard_normal((2, 4, 3, 3, 2))
    t = np.array([0.1, 0.4, 0.6, 0.9])
    move = lambda s: sum(a[:, None, None, None] * b for a, b in zip(paths.coefficients(path, t + s)[:2], (x, eps)))
    x_t, velocity = paths.interpolate(path, jnp.asarray(x), jnp.asarray(eps), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(velocity, (move(1e-5) - move(-1e-5)) / 2e-5, atol=3e-5)
    np.testing.assert_allclose(x_t, move(0), atol=1e-6)


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("path", paths.PATHS)
def test_conversions_give_the_quantities_of_x_and_eps(path, source, target):
    rng = np.random.default_rng(1)
    x, eps = rng.standard_normal((2, 15))
    x_t, known = quantities(path, x, eps, INSIDE)
    a, b = paths.conversion(path, source, target, INSIDE)
    np.testing.assert_allclose(a * x_t + b * known[source], known[target], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", paths.PATHS)
def test_conversions_in_a_program_are_those_of_the_host(path):
    rng = np.random.default_rng(2)
    x, eps = rng.standard_normal((2, 15, 2, 2, 3)).astype(np.float32)
    t = jnp.asarray(INSIDE, jnp.float32)
    x_t, known = quantities(path, x, eps, INSIDE[:, None, None, None])
    for source, target in PAIRS:
        got = paths.convert(path, source, target, jnp.float32(known[source]), jnp.float32(x_t), t)
        scale = 1 + abs(known[target])
        assert (abs(got - known[target]) / scale).max() < 2e-3, (source, target)  # alpha is 0.01 at the ends
        middle = slice(4, 11)
        assert (abs(got - known[target]) / scale)[middle].max() < 2e-5, (source, target)


def test_conversions_hold_at_the_ends_where_they_are_defined():
    rng = np.random.default_rng(3)
    x, eps = jnp.asarray(rng.standard_normal((2, 2, 1, 1, 3)), jnp.float32)
    both = jnp.array([0.0, 1.0])
    for path in ("linear", "cosine"):
        x_t, velocity = paths.interpolate(path, x, eps, both)
        for target, value in (("data", x), ("noise", eps)):
            got = paths.convert(path, "velocity", target, velocity, x_t, both)
            assert abs(got - value).max() < 1e-6, (path, target)
    # On "vp" noise still determines data and velocity at t = 1, and data the score as far as t > 0.
    x_t, velocity = paths.interpolate("vp", x, eps, jnp.ones(2))
    assert abs(paths.convert("vp", "noise", "data", eps, x_t, jnp.ones(2)) - x).max() < 2e-4
    assert abs(paths.convert("vp", "noise", "velocity", eps, x_t, jnp.ones(2)) - velocity).max() < 1e-4
    # and a noise or data prediction determines the data at t = 0 exactly, though the velocity there is infinite.
    a, b = paths.conversion("vp", "velocity", "data", jnp.float32(0))
    assert (float(a), float(b)) == (1, 0)
    assert paths.coefficients("vp", np.float64(0)).d_sigma == np.inf


@pytest.mark.parametrize("path", paths.PATHS)
def test_score_of_a_gaussian(path):
    # x ~ N(m, s^2) gives x_t ~ N(alpha m, alpha^2 s^2 + sigma^2), with every expectation known.
    mean, variance, x_t = 0.7, 0.3, np.linspace(-2, 2, 15)
    c = paths.coefficients(path, INSIDE)
    spread = c.alpha**2 * variance + c.sigma**2
    score = -(x_t - c.alpha * mean) / spread
    data = mean + c.alpha * variance / spread * (x_t - c.alpha * mean)
    noise = c.sigma / spread * (x_t - c.alpha * mean)
    velocity = c.d_alpha * data + c.d_sigma * noise
    for source, value in (("data", data), ("noise", noise), ("velocity", velocity)):
        a, b = paths.conversion(path, source, "score", INSIDE)
        np.testing.assert_allclose(a * x_t + b * value, score, rtol=1e-9, atol=1e-9)


def test_an_unknown_path_is_refused():
    with refused("path", "gaussian", expected="one of linear, cosine, vp"):
        paths.coefficients("gaussian", np.float64(0.5))
