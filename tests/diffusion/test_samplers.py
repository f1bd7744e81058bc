"""Trajectories against loops written from the published descriptions, and the order of each solver.

The loops are float64 numpy in the clock of the code they describe; the library runs in float32.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused
from small_network import CLASSES, SHAPE, network, oracle

from ig_jax.diffusion import adaptive, paths, samplers
from ig_jax.diffusion.guidance import Guidance, guided_velocity
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.models.dit import DiTOutput

B, CLOSE = 3, 5e-5
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(B, *SHAPE))
INCREMENTS = RNG.normal(size=(60, B, *SHAPE))
LABELS = np.array([1, 4, 9])
NULL = np.full(B, CLASSES)


WHOLE = (0.0, 1.0)


def library(solver, steps, *, path="linear", w=1.0, s=1.0, ig=WHOLE, cfg=WHOLE):
    """What ig_jax samples from NOISE, LABELS and INCREMENTS."""
    guidance = Guidance((("ig", ig), ("cfg", cfg)) if s != 1 else (("ig", ig),))
    increments = jnp.asarray(INCREMENTS, jnp.float32)
    return np.asarray(
        solver.integrate(
            guided_velocity(network, CLASSES, guidance, {"ig": w, "cfg": s}),
            jnp.asarray(NOISE, jnp.float32),
            jnp.asarray(LABELS),
            path=path,
            steps=steps,
            region=guidance.region,
            noise=lambda step: increments[step],
        ).latents
    )


def assert_close(ours, theirs):
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=CLOSE * max(1.0, np.abs(theirs).max()), rtol=0)


# --- the release of IG on SiT -------------------------------------------------------------------------------


def sit_ig_velocity(x, t, y, w, ig):
    """Closed interval on both sides, w > 1 only."""
    final = oracle("final", x, t, y)
    return oracle("inter", x, t, y) * (1 - w) + w * final if w > 1 and ig[0] <= t <= ig[1] else final


def score_of_velocity(path, v, x, t):
    if path == "linear":
        a, da, s, ds = 1 - t, -1.0, t, 1.0
    else:
        a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
        da, ds = -np.pi / 2 * s, np.pi / 2 * a
    ratio = a / da
    return (ratio * v - x) / (s**2 - ratio * ds * s)


def sit_ig_sde(steps, w, s, ig, cfg, path):
    times = np.append(np.linspace(1.0, 0.04, steps), 0.0)
    x = NOISE

    def drift(x, t):
        def branch(y):
            v = sit_ig_velocity(x, t, y, w, ig)
            return v - t * score_of_velocity(path, v, x, t)

        conditional = branch(LABELS)
        if s > 1 and cfg[0] <= t <= cfg[1]:
            null = branch(NULL)
            return null + s * (conditional - null)
        return conditional

    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        x = x + drift(x, t) * dt
        if i < steps - 1:
            x = x + np.sqrt(2 * t * abs(dt)) * INCREMENTS[i]
    return x


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(
    "w, s, ig, cfg",
    [
        (1.0, 1.0, (0, 1), (0, 1)),
        (1.4, 1.0, (0, 1), (0, 1)),
        (2.3, 1.0, (0.31, 1), (0, 1)),
        (1.4, 1.35, (0, 1), (0, 0.7)),
        (1.9, 1.8, (0.25, 0.9), (0.1, 0.65)),
    ],
)
def test_sde_of_sit_with_ig(path, w, s, ig, cfg):
    ours = library(samplers.EulerMaruyama(), 37, path=path, w=w, s=s, ig=ig, cfg=cfg)
    assert_close(ours, sit_ig_sde(37, w, s, ig, cfg, path))


def sit_ig_ode(steps, w, s, ig, cfg, heun):
    times = np.linspace(1, 0, steps + 1)
    x = NOISE

    def slope(x, t, looked_up):
        def branch(y):
            final = oracle("final", x, t, y)
            inter = oracle("inter", x, t, y)
            return inter + w * (final - inter) if ig[0] <= looked_up <= ig[1] else final

        conditional = branch(LABELS)
        if s > 1 and cfg[0] <= looked_up <= cfg[1]:
            null = branch(NULL)
            return null + s * (conditional - null)
        return conditional

    for i, (t, end) in enumerate(zip(times[:-1], times[1:])):
        d = slope(x, t, t)
        ahead = x + (end - t) * d
        if heun and i < steps - 1:
            ahead = x + (end - t) * (0.5 * d + 0.5 * slope(ahead, end, t))
        x = ahead
    return x


@pytest.mark.parametrize("solver, heun", [(samplers.Euler(), False), (samplers.Heun(), True)])
@pytest.mark.parametrize("w, s, ig, cfg", [(1.0, 1.8, (0, 1), (0, 0.7)), (1.7, 1.5, (0.33, 1), (0, 0.71))])
def test_ode_of_sit(solver, heun, w, s, ig, cfg):
    ours = library(solver, 23, w=w, s=s, ig=ig, cfg=cfg)
    assert_close(ours, sit_ig_ode(23, w, s, ig, cfg, heun))


# --- LightningDiT: time runs from noise to data, the network gives the velocity of that clock -----------------


def lightningdit_ode(points, shift, w, s, cfg_start, heun):
    times = np.linspace(0, 1, points)
    times = shift * times / (1 + (shift - 1) * times)
    x = NOISE

    def slope(x, t):
        def branch(y):
            final, inter = (-oracle(head, x, 1 - t, y) for head in ("final", "inter"))
            return final + (w - 1) * (final - inter)

        conditional = branch(LABELS)
        return conditional if t < cfg_start or s == 1 else branch(NULL) + s * (conditional - branch(NULL))

    for t, end in zip(times[:-1], times[1:]):
        d = slope(x, t)
        x = x + (end - t) * ((d + slope(x + (end - t) * d, end)) / 2 if heun else d)
    return x


@pytest.mark.parametrize("solver, heun", [(samplers.Euler, False), (samplers.Trapezoid, True)])
@pytest.mark.parametrize("w, s", [(1.7, 1.0), (1.4, 1.45)])
def test_ode_of_lightningdit(solver, heun, w, s):
    ours = library(solver(shift=0.3), 40, w=w, s=s, cfg=(0, 0.81))
    assert_close(ours, lightningdit_ode(41, 0.3, w, s, 0.19, heun))


# --- the SDEs of the original SiT, in its clock ----------------------------------------------------------------


def sit_path(path, t):
    """alpha, its derivative, sigma, its derivative, with t = 1 at data."""
    if path == "linear":
        return t, 1.0, 1 - t, -1.0
    if path == "vp":
        exponent, slope = -0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t), 0.5 * (1 - t) * 19.9 + 0.05
        alpha, sigma = np.exp(exponent), np.sqrt(1 - np.exp(2 * exponent))
        return alpha, alpha * slope, sigma, -np.exp(2 * exponent) * slope / sigma
    angle = np.pi / 2 * t
    return np.sin(angle), np.pi / 2 * np.cos(angle), np.cos(angle), -np.pi / 2 * np.sin(angle)


def sit_sde(path, steps, form, norm, last_step, size, heun):
    def diffusion(t):
        a, da, s, ds = sit_path(path, t)
        return {
            "constant": norm,
            "SBDM": norm * (da / a * s**2 - s * ds) if a else np.inf,
            "sigma": norm * s,
            "linear": norm * (1 - t),
            "decreasing": 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
            "increasing-decreasing": norm * np.sin(np.pi * t) ** 2,
        }[form]

    def velocity(x, t):
        return -oracle("final", x, 1 - t, LABELS)

    def score(x, t):
        a, da, s, ds = sit_path(path, t)
        ratio = a / da
        return (ratio * velocity(x, t) - x) / (s**2 - ratio * ds * s)

    def drift(x, t):
        return velocity(x, t) + diffusion(t) * score(x, t)

    size = 0.0 if last_step == "none" else size
    first, last = (1e-3 if form == "SBDM" else 0.0), 1 - size
    times = np.linspace(first, last, steps)
    dt, x = times[1] - times[0], NOISE
    for i, t in enumerate(times[:-1]):
        jump = np.sqrt(2 * diffusion(t) * dt) * INCREMENTS[i]
        if heun:
            x = x + jump
            k = drift(x, t)
            x = x + dt / 2 * (k + drift(x + dt * k, t + dt))
        else:
            x = x + drift(x, t) * dt + jump
    a, _, s, _ = sit_path(path, last)
    return {
        "none": lambda: x,
        "mean": lambda: x + size * drift(x, last),
        "euler": lambda: x + size * velocity(x, last),
        "tweedie": lambda: x / a + s**2 / a * score(x, last),
    }[last_step]()


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("form", list(samplers.DIFFUSION_FORMS))
@pytest.mark.parametrize("solver, heun", [(samplers.EulerMaruyama, False), (samplers.HeunSde, True)])
def test_sde_forms_of_original_sit(path, form, solver, heun):
    ours = library(solver(diffusion_form=form, diffusion_norm=0.7), 50, path=path)
    assert_close(ours, sit_sde(path, 50, form, 0.7, "mean", 0.04, heun))


@pytest.mark.parametrize("last_step", samplers.LAST_STEPS)
@pytest.mark.parametrize("solver, heun", [(samplers.EulerMaruyama, False), (samplers.HeunSde, True)])
def test_last_steps_of_original_sit(last_step, solver, heun):
    if last_step == "none" and heun:
        with refused("last_step", "none", expected="sde_heun"):
            solver(last_step=last_step)
        return
    ours = library(solver(diffusion_form="sigma", last_step=last_step, last_step_size=0.1), 20)
    assert_close(ours, sit_sde("linear", 20, "sigma", 1.0, last_step, 0.1, heun))


# --- networks that predict the score, in the clock of the original SiT ---------------------------------------------


def gaussian_score(path, x, t):
    """The exact score at sigma-time t of data distributed as N(0.6, 0.5^2)."""
    alpha, sigma = paths.coefficients(path, t)[:2]
    return -(x - 0.6 * alpha) / (0.25 * alpha**2 + sigma**2)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_score_network_samples_as_in_the_original_sit(path, stochastic):
    """score_ode and the SDE drift of its transport, in float64: -drift_mean + drift_var score, + w score."""
    process = ProcessConfig(path, "score", "uniform", 0.0, 1.0)

    def network(x, t, labels):
        return process.to_velocity(toy.MODEL, DiTOutput(gaussian_score(path, x, t[:, None, None, None]), ()), x, t)

    solver = samplers.EulerMaruyama(diffusion_form="sigma") if stochastic else samplers.Euler()
    increments = jnp.asarray(INCREMENTS, jnp.float32)
    found = solver.integrate(
        guided_velocity(network, CLASSES, Guidance(), {}),
        jnp.asarray(NOISE, jnp.float32),
        jnp.asarray(LABELS),
        path=path,
        steps=40,
        noise=lambda step: increments[step],
    ).latents

    end = 1e-3 if path == "vp" else 0.0
    times = np.append(np.linspace(1, 0.04, 40), 0.0) if stochastic else np.linspace(1, end, 41)
    x = NOISE
    for i, (t, following) in enumerate(zip(times[:-1], times[1:])):
        alpha, d_alpha, sigma, d_sigma = sit_path(path, 1 - t if path == "vp" else max(1 - t, 1e-3))
        drift_var = d_alpha / alpha * sigma**2 - sigma * d_sigma
        score, dt = gaussian_score(path, x, t), t - following
        drift, noise = d_alpha / alpha * x + drift_var * score, 0.0
        if stochastic:
            diffusion = sit_path(path, 1 - t)[2]
            drift = drift + diffusion * score
            noise = np.sqrt(2 * diffusion * dt) * INCREMENTS[i] if i < 39 else 0.0
        x = x + drift * dt + noise
    np.testing.assert_allclose(found, x, atol=2e-3 if path != "vp" else 1e-4)


# --- order of convergence and moments ----------------------------------------------------------------------------


def gaussian_velocity(mean, std, path="linear"):
    """The exact velocity, as (a, b) of a x + b, of data distributed as N(mean, std^2) in every coordinate."""

    def velocity(x, t, labels=None, region=None):
        c = paths.coefficients(path, t)
        variance = c.alpha**2 * std**2 + c.sigma**2
        slope = (c.alpha * c.d_alpha * std**2 + c.sigma * c.d_sigma) / variance
        return slope * (x - c.alpha * mean) + c.d_alpha * mean

    return velocity


def error(solver, steps, reverse, std=0.5, mean=1.0):
    """Largest distance from the exact flow map x -> mean + std x of the noise, in numpy float64."""
    velocity = gaussian_velocity(mean, std)
    x = np.linspace(-2, 2, 9)
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), solver.start(x))
    for row in solver.rows("linear", steps, reverse):
        state = row.update(state, [velocity] * len(row.guided_at), SimpleNamespace(**row.coefficients), None)
    exact = (x - mean) / std if reverse else mean + std * x
    return np.abs(np.asarray(solver.finish(state)) - exact).max()


@pytest.mark.parametrize(
    "solver, reverse",
    [
        (samplers.Euler(), False),
        (samplers.Heun(), False),
        (samplers.Trapezoid(), False),
        (samplers.AdamsBashforth(), False),
        (samplers.Euler(shift=0.3), False),
        (samplers.Trapezoid(shift=0.3), False),
        (samplers.AdamsBashforth(shift=0.3), False),
        (samplers.Trapezoid(), True),
        (samplers.AdamsBashforth(shift=2.0), True),
    ],
)
def test_order_is_the_slope_of_error_against_step(solver, reverse):
    steps = np.array([256, 512, 1024, 2048])
    slope = -np.polyfit(np.log(steps), np.log([error(solver, n, reverse) for n in steps]), 1)[0]
    assert slope == pytest.approx(solver.order, abs=0.15)


def test_every_solver_declares_what_it_is():
    """Orders as published, and the properties that callers read."""
    orders = {
        "euler": 1,
        "heun": 2,
        "trapezoid": 2,
        "ab2": 2,
        "dopri5": 5,
        "sde": 1,
        "sde_heun": 2,
        "ddpm": 1,
        "ddim": 1,
    }
    assert {name: solver.order for name, solver in SOLVERS.items()} == orders
    made = {name: solver() for name, solver in SOLVERS.items()}
    pick = lambda field: {name for name, solver in made.items() if getattr(solver, field)}
    assert pick("adaptive") == {"dopri5"} and pick("has_memory") == {"ab2"} and pick("chain") == {"ddpm", "ddim"}
    assert pick("stochastic") == {"sde", "sde_heun", "ddpm"}
    assert pick("reversible") == {"euler", "heun", "trapezoid", "ab2", "dopri5"}
    assert all(solver.name == name for name, solver in made.items())


def test_ab2_is_exact_for_a_slope_that_is_a_line_in_time():
    solver = samplers.AdamsBashforth(shift=0.3)
    grid, rows = solver.grid("linear", 7), solver.rows("linear", 7)
    for before, t, end, row in zip(grid, grid[1:], grid[2:], rows[1:]):
        moved = row.coefficients["now"] * t + row.coefficients["before"] * before
        assert moved == pytest.approx((end**2 - t**2) / 2, rel=1e-12)


def test_vp_begins_at_pure_noise_and_ends_before_the_data():
    sbdm = samplers.EulerMaruyama(diffusion_form="SBDM")
    assert sbdm.rows("vp", 10)[0].coefficients["t"] == 1 and sbdm.rows("linear", 10)[0].coefficients["t"] == 0.999
    assert samplers.Euler().grid("vp", 10)[-1] == 1e-3 and samplers.Euler().grid("linear", 10)[-1] == 0


@pytest.mark.parametrize(
    "solver, steps",
    [
        (samplers.EulerMaruyama(), 250),
        (samplers.HeunSde(), 60),
        (samplers.EulerMaruyama(diffusion_form="sigma", last_step="tweedie"), 250),
    ],
)
def test_moments_of_a_gaussian(solver, steps):
    mean, std, count = 1.0, 0.5, 40_000
    key = jax.random.key(0)
    x, _ = solver.integrate(
        gaussian_velocity(mean, std),
        jax.random.normal(key, (count,)),
        jnp.zeros(count, int),
        path="linear",
        steps=steps,
        noise=lambda step: jax.random.normal(jax.random.fold_in(key, step + 1), (count,)),
    )
    # Sampling error 3 sigma: 0.0075 and 0.0053; the last noiseless step makes the spread a little small.
    assert float(jnp.mean(x)) == pytest.approx(mean, abs=0.015)
    assert float(jnp.std(x)) == pytest.approx(std, abs=0.02)


def test_reverse_returns_to_the_noise():
    velocity = guided_velocity(network, CLASSES, Guidance(), {})
    noise, labels = jnp.asarray(NOISE, jnp.float32), jnp.asarray(LABELS)
    x, _ = samplers.Trapezoid().integrate(velocity, noise, labels, path="linear", steps=200)
    again, _ = samplers.Trapezoid().integrate(velocity, x, labels, path="linear", steps=200, reverse=True)
    np.testing.assert_allclose(again, noise, atol=2e-3)


EXACT = gaussian_velocity(1.0, 0.5)


# --- adaptive ------------------------------------------------------------------------------------------------------


def dopri5(rtol, steps=200, velocity=EXACT, **given):
    pytest.importorskip("diffrax")
    solver, x = adaptive.DormandPrince(rtol=rtol, atol=1e-7), jnp.linspace(-2, 2, 9)[None]
    return solver.integrate(velocity, x, jnp.zeros(1, int), path="linear", steps=steps, **given)


def test_dopri5_error_follows_the_tolerance():
    exact = 1.0 + 0.5 * np.linspace(-2, 2, 9)
    errors = [np.abs(np.asarray(dopri5(rtol)[0])[0] - exact).max() for rtol in (1e-2, 1e-4, 1e-6)]
    assert errors[0] < 5e-2 and errors[1] < 2e-4 and errors[2] < 1e-5
    assert errors[0] > errors[1] > errors[2]


def test_dopri5_counts_every_evaluation():
    calls = []

    def velocity(x, t, labels, region):
        jax.debug.callback(lambda: calls.append(region))
        return gaussian_velocity(1.0, 0.5)(x, t)

    guided = dict(edges=(0.3,), region=lambda t: t > 0.3, cost=lambda region: 2.5 if region else 1.0)
    _, evaluations = dopri5(1e-4, velocity=velocity, **guided)
    jax.effects_barrier()
    assert calls.count(True) > 6 and calls.count(False) > 6
    np.testing.assert_array_equal(evaluations, [2.5 * calls.count(True) + calls.count(False)])


def test_dopri5_goes_both_ways_and_is_nan_where_it_ran_out_of_steps():
    back, _ = dopri5(1e-6, reverse=True)
    np.testing.assert_allclose(back[0], (np.linspace(-2, 2, 9) - 1.0) / 0.5, atol=1e-4)
    assert np.isnan(dopri5(1e-6, steps=2)[0]).all()


@pytest.mark.parametrize("reverse, moved", [(False, -0.7), (True, 0.7)])
def test_dopri5_is_in_the_region_between_two_edges_both_ways(reverse, moved):
    def velocity(x, t, labels, region):
        return jnp.full_like(x, float(region))

    x, _ = dopri5(1e-3, steps=50, edges=(0.3,), region=lambda t: t > 0.3, velocity=velocity, reverse=reverse)
    np.testing.assert_allclose(x[0], np.linspace(-2, 2, 9) + moved, atol=1e-4)


def test_increments_belong_to_the_step_wherever_the_grid_is_cut():
    whole = library(samplers.EulerMaruyama(), 20)
    cut = library(samplers.EulerMaruyama(), 20, ig=(0.3, 0.6))  # w = 1: other groups of steps, the same numbers
    np.testing.assert_allclose(cut, whole, atol=1e-6)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: samplers.Euler(shift=0.0), "shift"),
        (lambda: samplers.EulerMaruyama(diffusion_form="cubic"), "diffusion_form"),
        (lambda: samplers.EulerMaruyama(diffusion_norm=-1.0), "diffusion_norm"),
        (lambda: samplers.EulerMaruyama(last_step="best"), "last_step"),
        (lambda: samplers.EulerMaruyama(last_step_size=1.0), "last_step_size"),
        (lambda: adaptive.DormandPrince(rtol=0.0), "rtol"),
    ],
)
def test_bad_options_are_named(make, name):
    with refused(name):
        make()
