"""DiT's discrete process against golden numbers, and its training and sampling."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from refusal import refused
from toy import sample_latents

from ig_jax.diffusion import gaussian, gaussian_samplers
from ig_jax.diffusion import loss as losses
from ig_jax.diffusion.guidance import Guidance, guided_velocity
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.recipe import Recipe
from ig_jax.models import dit, zoo
from ig_jax.models.dit import DiTOutput
from ig_jax.optim.ema import EmaConfig
from ig_jax.training.state import new_state

PROCESS = ProcessConfig("gaussian", "noise", "uniform", 0.0, 1.0)
CHAIN = gaussian.FULL["gaussian"]
MODEL = dit.DiTConfig(
    **zoo.FAMILIES["dit"],
    input_size=4,
    channels=2,
    patch_size=2,
    depth=1,
    width=16,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
    inter_depth=(1,),
    dtype="float32",
    scan_blocks=False,
    remat="none",
)
LOSS = losses.LossConfig(
    inter_weight=(0.5,),
    label_drop=0.1,
    accelerate=False,
    omega=0.5,
    gap_source="online",
    start_step=0,
    direction_weight=0.0,
    direction_intermediate=False,
)


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(loss, params, *batch):
    return losses.Objective(MODEL, PROCESS, loss)(params, params, losses.NoisyBatch(*batch), jnp.int32(0))


apply = jax.jit(dit.apply, static_argnums=0)


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parents[1] / "golden" / "gaussian.npz")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {k: jnp.float32(0.2 * rng.standard_normal(s.shape)) for k, s in dit.shapes(MODEL).items()}


def arrays(golden, *names):
    return [jnp.asarray(golden[name], jnp.float32) for name in names]


def test_noising_and_posterior_are_the_golden_ones(golden):
    x, eps, t = arrays(golden, "x", "eps", "t")
    np.testing.assert_allclose(CHAIN.noised(x, eps, t), golden["x_t"], atol=1e-6)
    n = golden["t"]
    of_data, of_state = (table[n][:, None, None, None] for table in (CHAIN.data_weight, CHAIN.state_weight))
    mean = of_data * golden["x"] + of_state * golden["x_t"]
    np.testing.assert_allclose(mean, golden["posterior_mean"], rtol=1e-9, atol=1e-11)
    low = np.exp(CHAIN.log_variance_low[n])
    np.testing.assert_allclose(low[n > 0], golden["posterior_variance"][n > 0], rtol=1e-9)
    assert (low[n == 0] == low[n == 1]).all()


def test_the_bound_is_the_golden_one_at_every_timestep(golden):
    predicted, output, x, eps, t = arrays(golden, "predicted", "output", "x", "eps", "t")
    bound = jax.jit(CHAIN.variational_bound)(predicted, output, x, eps, t)
    np.testing.assert_allclose(bound, golden["bound"], rtol=2e-5, atol=2e-6)


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone(golden):
    predicted, output, x, eps, t = arrays(golden, "predicted", "output", "x", "eps", "t")
    gradient = jax.jit(jax.grad(lambda *a: CHAIN.variational_bound(*a, x, eps, t).sum(), argnums=(0, 1)))
    of_mean, of_variance = gradient(predicted, output)
    assert (of_mean == 0).all()
    np.testing.assert_allclose(of_variance[:, 1, 2, 1], golden["bound_slope"], rtol=1e-3, atol=1e-6)


def bound_in_float64(chain, noise, variance, x, eps, t):
    """The terms of the bound in nats as published, also for a complex variance output."""
    at = lambda table: table[t.astype(int)][:, None, None, None]
    low, high = at(chain.log_variance_low), at(chain.log_variance_high)
    log_variance = low + (variance + 1) / 2 * (high - low)
    shift = at(chain.data_weight * np.sqrt(1 / chain.alpha_bar - 1)) * (noise - eps)
    divergence = 0.5 * (log_variance - low + np.exp(low - log_variance) - 1 + shift**2 * np.exp(-log_variance))
    cdf = lambda u: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    upper, lower = (cdf(np.exp(-0.5 * log_variance) * (shift + side)) for side in (1 / 255, -1 / 255))
    mass = np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower))
    return np.where(at(np.arange(1000)) == 0, -np.log(np.where(mass.real < 1e-12, 1e-12, mass)), divergence)


@pytest.mark.parametrize("kind", gaussian.FULL)
def test_the_bound_and_its_gradient_lose_nothing_to_cancellation(kind):
    rng, chain = np.random.default_rng(0), gaussian.FULL[kind]
    t = np.where(np.arange(300) < 200, 0, rng.integers(0, 1000, 300)).astype(np.float32)
    x = np.tanh(2 * rng.normal(size=(300, 4, 4, 2)))
    x[::7] = np.sign(x[::7])  # the open levels
    eps, variance = rng.normal(size=x.shape), rng.uniform(-1.5, 1.5, x.shape)
    noise = eps + rng.normal(size=x.shape) * rng.choice([0, 0.01, 0.3, 1], (300, 1, 1, 1))
    noise, variance, x, eps = (a.astype(np.float32) for a in (noise, variance, x, eps))
    bound, slope = jax.jit(
        jax.vmap(jax.value_and_grad(lambda v, *a: chain.variational_bound(*(b[None] for b in (a[0], v, *a[1:])))[0]))
    )(variance, noise, x, eps, t)
    noise, variance, x, eps = (a.astype(np.float64) for a in (noise, variance, x, eps))
    exact = bound_in_float64(chain, noise, variance, x, eps, t) / np.log(2)
    np.testing.assert_allclose(bound, exact.mean((1, 2, 3)), rtol=0, atol=1e-6)
    step = bound_in_float64(chain, noise, variance + 1e-30j, x, eps, t).imag / 1e-30 / np.log(2)
    error = np.abs(32 * np.asarray(slope, np.float64) - step).max((1, 2, 3))
    assert (error < 1e-5 * np.abs(step).max((1, 2, 3))).all()


def test_squared_cosine_betas_are_those_of_their_alpha_bar_up_to_the_last_steps():
    alpha_bar = lambda n: np.cos((n / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    chain, n = gaussian.FULL["gaussian_cosine"], np.arange(1000)
    np.testing.assert_allclose(chain.alpha_bar[:999], (alpha_bar(n + 1) / alpha_bar(0))[:999], rtol=1e-9)
    assert chain.betas[-1] == pytest.approx(0.999) and chain.betas[:-1].max() < 0.999
    assert chain.betas[0] == pytest.approx(4.128422482e-05, rel=1e-9)


def test_spacings_are_the_published_ones(golden):
    assert list(gaussian.respaced(10, "even")) == list(golden["steps"])
    np.testing.assert_allclose(
        gaussian.make_chain("gaussian", golden["steps"]).betas, golden["spaced_betas"], rtol=1e-9
    )
    assert list(gaussian.respaced(1000, "even")) == list(range(1000))
    quarter = gaussian.respaced(250, "even")
    assert (len(quarter), *quarter[[0, 1, 2, 124, 125, -2, -1]]) == (250, 0, 4, 8, 497, 502, 995, 999)
    assert list(gaussian.respaced(50, "ddim")) == list(range(0, 1000, 20))


@pytest.mark.parametrize("steps, spacing", [(1, "even"), (0, "even"), (1001, "even"), (600, "ddim"), (0, "ddim")])
def test_spacings_that_cannot_be_had_are_refused(steps, spacing):
    with refused("steps", steps):
        gaussian.respaced(steps, spacing)


@pytest.mark.parametrize(
    "solver, key",
    [
        (gaussian_samplers.Ddpm(), "ddpm"),
        (gaussian_samplers.Ddpm(clip=True), "ddpm_clip"),
        (gaussian_samplers.Ddim(), "ddim"),
        (gaussian_samplers.Ddim(eta=0.5), "ddim_eta"),
        (gaussian_samplers.Ddim(clip=True), "ddim_clip"),
    ],
)
def test_trajectories_are_the_golden_ones(golden, solver, key):
    field = lambda x, t, labels, region: (0.8 * x + 0.3 * jnp.sin(t / 150), jnp.tanh(x + t / 500 - 1))
    start, noise = arrays(golden, "start", "noise")
    found = jax.jit(
        lambda x: (
            solver.integrate(
                field, x, jnp.zeros(len(x), int), path="gaussian", steps=10, noise=lambda step: noise[step]
            ).latents
        )
    )(start)
    np.testing.assert_allclose(found, golden[key], rtol=2e-5, atol=2e-5 * abs(golden[key]).max())


@pytest.mark.parametrize("kind", gaussian.FULL)
@pytest.mark.parametrize(
    "solver",
    [
        gaussian_samplers.Ddpm(),
        gaussian_samplers.Ddim(),
        gaussian_samplers.Ddim(eta=1.0),
        gaussian_samplers.Ddim(spacing="ddim"),
    ],
)
def test_samples_have_the_moments_of_the_gaussian_that_the_field_knows(solver, kind):
    # x ~ N(0.6, 0.5^2): E[eps | x_t] is known, and the right variance lies between the two ends.
    def field(x, t, labels, region):
        alpha_bar = jnp.asarray(gaussian.FULL[kind].alpha_bar, jnp.float32)[t.astype(jnp.int32)]
        centred = (x - jnp.sqrt(alpha_bar) * 0.6) / (alpha_bar * 0.25 + 1 - alpha_bar)
        return jnp.sqrt(1 - alpha_bar) * centred, jnp.zeros_like(x)

    normal = lambda i: jax.random.normal(jax.random.key(i), (64, 8, 8, 1))
    samples = jax.jit(
        lambda: solver.integrate(field, normal(10_000), jnp.zeros(64, int), path=kind, steps=200, noise=normal).latents
    )()
    assert abs(float(samples.mean()) - 0.6) < 0.02
    assert abs(float(samples.std()) - 0.5) < 0.02


def test_options_that_do_not_exist_are_refused():
    with refused("eta", 1.5, expected="in [0, 1]"):
        gaussian_samplers.Ddim(eta=1.5)
    with refused("spacing", "odd", expected="even or ddim"):
        gaussian_samplers.Ddpm(spacing="odd")


def test_guidance_moves_the_noise_and_takes_the_variance_of_the_conditional_final_head():
    weights = jnp.array([1.0, 2.0, 5.0])  # what each label adds; the null label is 2

    def network(x, t, y):
        base = jnp.concatenate([x, 10 * x], -1) + weights[y][:, None, None, None]
        return DiTOutput(base, (base / 2,))

    x, labels = jnp.arange(1.0, 9.0).reshape(2, 2, 2, 1), jnp.array([0, 1])
    field = gaussian_samplers.noise_field(guided_velocity(network, 2, Guidance(), {"ig": 1.4, "cfg": 1.5}))
    own = weights[labels][:, None, None, None]
    for region in ((), ("ig",), ("cfg",), ("ig", "cfg")):
        eps, variance = field(x, jnp.float32(7), labels, frozenset(region))
        guided = (1.2 if "ig" in region else 1.0) * ((x + own) + (0.5 * (own - 5.0) if "cfg" in region else 0.0))
        np.testing.assert_allclose(eps, guided, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, 10 * x + own, rtol=1e-6)


def test_guidance_is_looked_up_in_the_clock_of_the_chain():
    rows = gaussian_samplers.Ddpm().rows("gaussian", 10)
    assert [row.coefficients["t"] for row in rows] == list(reversed(gaussian.respaced(10, "even")))
    assert (rows[0].guided_at, rows[-1].guided_at) == ((1.0,), (0.001,))
    assert [row.update == rows[0].update for row in rows] == [True] * 9 + [False]


def test_the_network_is_given_every_timestep_as_it_is():
    def network(x, t, y):
        return DiTOutput(jnp.broadcast_to(t[:, None, None, None], (1, 1, 1, 2)), ())

    in_time = gaussian_samplers.in_sigma_time(network)
    field = gaussian_samplers.noise_field(guided_velocity(in_time, 1, Guidance(), {}))
    x, label = jnp.zeros((1, 1, 1, 1)), jnp.array([0])
    given = jax.vmap(lambda n: field(x, n, label, frozenset())[0].squeeze())(jnp.arange(1000.0))
    np.testing.assert_array_equal(given, np.arange(1000))
    off_by_a_bit = jnp.float32(np.nextafter(np.arange(1, 1001, dtype=np.float32) / 1000, np.float32(0)))
    given = jax.vmap(lambda t: in_time(None, t[None], None).final[0, 0, 0, 0])(off_by_a_bit)
    np.testing.assert_array_equal(given, np.arange(1000))


def test_both_heads_learn_noise_and_variance_and_the_terms_add_up(params):
    rng = np.random.default_rng(1)
    x, eps = jnp.asarray(rng.standard_normal((2, 4, 4, 4, 2)), jnp.float32)
    t, y = jnp.array([0.0, 3.0, 400.0, 999.0]), jnp.array([0, 1, 2, 5])
    total, metrics = batch_loss(LOSS, params, x, eps, t, y)
    out = apply(MODEL, params, CHAIN.noised(x, eps, t), t, y)
    assert out.final.shape == (4, 4, 4, 4)
    for name, head in (("loss/final", out.final), ("loss/intermediate", out.intermediate[0])):
        assert float(metrics[name]) == pytest.approx(float(jnp.mean((head[..., :2] - eps) ** 2)), rel=1e-5)
        bound = CHAIN.variational_bound(head[..., :2], head[..., 2:], x, eps, t).mean()
        assert float(metrics[f"{name}_vb"]) == pytest.approx(float(bound), rel=1e-4)
    parts = sum(
        weight * (metrics[name] + metrics[f"{name}_vb"])
        for name, weight in (("loss/final", 1.0), ("loss/intermediate", 0.5))
    )
    assert float(total) == pytest.approx(float(parts), rel=3e-7)
    gap = out.final[..., :2] - out.intermediate[0][..., :2]
    assert float(metrics["gap_square"]) == pytest.approx(float(jnp.mean(gap**2)), rel=1e-5)


def test_acceleration_moves_the_noise_target_and_not_the_bound(params):
    rng = np.random.default_rng(2)
    x, eps = jnp.asarray(rng.standard_normal((2, 4, 4, 4, 2)), jnp.float32)
    t, y = jnp.array([0.0, 100.0, 700.0, 900.0]), jnp.array([0, 1, 2, 5])
    plain, moved = (
        batch_loss(config, params, x, eps, t, y)[1]
        for config in (LOSS, dataclasses.replace(LOSS, accelerate=True, gap_source="ema"))
    )
    out = apply(MODEL, params, CHAIN.noised(x, eps, t), t, y)
    predictions, _ = gaussian.split(out)
    target = eps + 0.5 * losses.guidance_gap(predictions)
    expected = float(jnp.mean((predictions.final - target) ** 2))
    assert float(moved["loss/final"]) == pytest.approx(expected, rel=1e-5)
    assert float(moved["loss/final_vb"]) == pytest.approx(float(plain["loss/final_vb"]), rel=1e-6)
    assert float(moved["loss/intermediate"]) == pytest.approx(float(plain["loss/intermediate"]), rel=1e-6)


def test_the_train_step_learns_the_process():
    ema, optimizer = EmaConfig((0.9,), False), optax.adam(3e-3)
    adamw = toy.experiment().optimizer
    step = jax.jit(toy.train_step(optimizer, model=MODEL, process=PROCESS, loss=LOSS, optimizer=adamw, ema=ema))
    rng = np.random.default_rng(3)
    batch = {
        "latent": jnp.asarray(0.1 * rng.standard_normal((16, 4, 4, 2)), jnp.float32),
        "label": jnp.zeros(16, jnp.int32),
    }
    state, history = jax.jit(lambda: new_state(MODEL, adamw, optimizer, ema.names, 0, {}))(), []
    for _ in range(50):
        state, metrics = step(state, batch)
        history.append(toy.scalars(metrics))
    mean = lambda name, part: np.mean([m[name] for m in part])
    assert history[0]["loss/final"] == pytest.approx(1, abs=0.1)  # a zero head against unit noise
    for name in ("loss/final", "loss/intermediate"):
        assert mean(name, history[-10:]) < 0.5 * mean(name, history[:3])
        assert mean(f"{name}_vb", history[-10:]) < mean(f"{name}_vb", history[:3])


@pytest.mark.parametrize("solver", ("ddpm", "ddim"))
def test_a_sample_belongs_to_its_index_and_its_guidance(params, solver):
    draw = jax.jit(
        lambda indices, scale: sample_latents(
            params,
            jnp.uint32(0),
            indices,
            indices % 5,
            {"ig": 1.5, "cfg": scale},
            model=MODEL,
            process=PROCESS,
            solver=solver,
            steps=4,
            guidance=Guidance((("ig", (0.0, 1.0)), ("cfg", (0.0, 1.0)))),
        )
    )
    four, mixed = draw(jnp.arange(4), 1.25), draw(jnp.array([3, 9, 1, 7]), 1.25)
    assert jnp.isfinite(four).all() and four.shape == (4, 4, 4, 2)
    assert abs(four[jnp.array([3, 1])] - mixed[::2]).max() < 1e-5 * abs(four).max()
    assert abs(four - draw(jnp.arange(4), 1.0)).max() > 1e-3 * abs(four).max()


def test_a_recipe_of_the_other_family_is_refused():
    recipe = Recipe.of(dict(solver="ddpm", steps=250, ig_scale=1.4))
    recipe.check_model(MODEL)
    with refused("solver", "ddpm", expected="euler, heun, trapezoid, ab2, sde, sde_heun for"):
        recipe.check_model(dataclasses.replace(MODEL, sigma_channels="none"))
    with refused("solver", "heun", expected="one of ddpm, ddim"):
        recipe.replace(solver="heun").check_model(MODEL)
