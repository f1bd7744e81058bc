"""DiT's discrete process against the golden numbers of make_gaussian.py, and as it is trained and sampled."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import sample_latents

from ig_jax.diffusion import gaussian, gaussian_samplers, losses, samplers
from ig_jax.diffusion.guidance import Guidance, Region, Scales, guided_velocity
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.errors import UserError
from ig_jax.generation.recipe import Recipe
from ig_jax.models import dit, zoo
from ig_jax.models.dit import DiTOutput
from ig_jax.training import step as training
from ig_jax.training.optimizer import EmaConfig
from ig_jax.training.state import new_state

PROCESS = ProcessConfig("gaussian", "noise", "uniform", 0.0, 1.0)
MODEL = dit.DiTConfig(
    **zoo.FAMILIES["dit"], input_size=4, channels=2, patch_size=2, depth=1, width=16, num_heads=2,
    mlp_ratio=2.0, num_classes=5, inter_depth=(1,), dtype="float32", scan_blocks=False, remat="none",
)
LOSS = training.LossConfig(inter_weight=(0.5,), label_drop=0.1, accelerate=False, omega=0.5,
                           gap_source="online", start_step=0, direction_weight=0.0,
                           direction_intermediate=False)
batch_loss = jax.jit(training.batch_loss, static_argnums=(0, 1, 2))
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
    np.testing.assert_allclose(gaussian.noised(x, eps, t), golden["x_t"], atol=1e-6)
    n = golden["t"]
    of_data, of_state = (table[n][:, None, None, None] for table in
                         (gaussian.FULL.data_weight, gaussian.FULL.state_weight))
    mean = of_data * golden["x"] + of_state * golden["x_t"]
    np.testing.assert_allclose(mean, golden["posterior_mean"], rtol=1e-9, atol=1e-11)
    low = np.exp(gaussian.FULL.log_variance_low[n])
    np.testing.assert_allclose(low[n > 0], golden["posterior_variance"][n > 0], rtol=1e-9)
    assert (low[n == 0] == low[n == 1]).all()


def test_the_bound_is_the_golden_one_at_every_timestep(golden):
    predicted, output, x, eps, t = arrays(golden, "predicted", "output", "x", "eps", "t")
    bound = jax.jit(gaussian.variational_bound)(predicted, output, x, eps, t)
    np.testing.assert_allclose(bound, golden["bound"], rtol=2e-5, atol=2e-6)


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone(golden):
    predicted, output, x, eps, t = arrays(golden, "predicted", "output", "x", "eps", "t")
    gradient = jax.jit(jax.grad(lambda *a: gaussian.variational_bound(*a, x, eps, t).sum(), argnums=(0, 1)))
    of_mean, of_variance = gradient(predicted, output)
    assert (of_mean == 0).all()
    np.testing.assert_allclose(of_variance[:, 1, 2, 1], golden["bound_slope"], rtol=1e-3, atol=1e-6)


def test_spacings_are_the_published_ones(golden):
    assert list(gaussian.respaced("10")) == list(golden["steps"])
    np.testing.assert_allclose(gaussian.make_chain(golden["steps"]).betas, golden["spaced_betas"], rtol=1e-9)
    assert list(gaussian.respaced("1000")) == list(range(1000))
    quarter = gaussian.respaced("250")
    assert (len(quarter), *quarter[[0, 1, 2, 124, 125, -2, -1]]) == (250, 0, 4, 8, 497, 502, 995, 999)
    assert list(gaussian.respaced("ddim50")) == list(range(0, 1000, 20))
    # Sections of 334, 333 and 333 timesteps; a section of one step takes its first.
    assert list(gaussian.respaced("3,1,2")) == [0, 166, 333, 334, 667, 999]


@pytest.mark.parametrize("spacing", ["1", "0", "1001", "ddim37x", "ddim600", "400,400,1", "0,10", "many"])
def test_spacings_that_cannot_be_had_are_refused(spacing):
    with pytest.raises(UserError, match="respacing="):
        gaussian.respaced(spacing)


@pytest.mark.parametrize("solver, key", [
    (gaussian_samplers.Ddpm(), "ddpm"), (gaussian_samplers.Ddpm(clip=True), "ddpm_clip"),
    (gaussian_samplers.Ddim(), "ddim"), (gaussian_samplers.Ddim(eta=0.5), "ddim_eta"),
    (gaussian_samplers.Ddim(clip=True), "ddim_clip"),
])
def test_trajectories_are_the_golden_ones(golden, solver, key):
    field = lambda x, t, region: (0.8 * x + 0.3 * jnp.sin(t / 150), jnp.tanh(x + t / 500 - 1))  # noqa: E731
    start, noise = arrays(golden, "start", "noise")
    found = jax.jit(lambda x: samplers.integrate(
        solver, solver.rows("gaussian", 10), field, x, noise=lambda step: noise[step]))(start)
    np.testing.assert_allclose(found, golden[key], rtol=2e-5, atol=2e-5 * abs(golden[key]).max())


@pytest.mark.parametrize("solver", [gaussian_samplers.Ddpm(), gaussian_samplers.Ddim(),
                                    gaussian_samplers.Ddim(eta=1.0), gaussian_samplers.Ddim(spacing="ddim")])
def test_samplers_draw_the_gaussian_that_the_field_knows(solver):
    # x ~ N(0.6, 0.5^2): E[eps | x_t] is known, and the right variance lies between the two ends.
    def field(x, t, region):
        alpha_bar = jnp.asarray(gaussian.FULL.alpha_bar, jnp.float32)[t.astype(jnp.int32)]
        centred = (x - jnp.sqrt(alpha_bar) * 0.6) / (alpha_bar * 0.25 + 1 - alpha_bar)
        return jnp.sqrt(1 - alpha_bar) * centred, jnp.zeros_like(x)

    normal = lambda i: jax.random.normal(jax.random.key(i), (64, 8, 8, 1))  # noqa: E731
    samples = jax.jit(lambda: samplers.integrate(
        solver, solver.rows("gaussian", 200), field, normal(10_000), noise=normal))()
    assert abs(float(samples.mean()) - 0.6) < 0.02
    assert abs(float(samples.std()) - 0.5) < 0.02


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"eta=1.5 must be in \[0, 1\]"):
        gaussian_samplers.Ddim(eta=1.5)
    with pytest.raises(UserError, match="spacing='odd' must be even or ddim"):
        gaussian_samplers.Ddpm(spacing="odd")


def test_guidance_moves_the_noise_and_takes_the_variance_of_the_conditional_final_head():
    weights = jnp.array([1.0, 2.0, 5.0])  # what each label adds; the null label is 2

    def network(x, t, y):
        base = jnp.concatenate([x, 10 * x], -1) + weights[y][:, None, None, None]
        return DiTOutput(base, (base / 2,))

    x, labels = jnp.arange(1.0, 9.0).reshape(2, 2, 2, 1), jnp.array([0, 1])
    field = gaussian_samplers.noise_field(guided_velocity(network, labels, 2, Guidance(use_cfg=True), Scales(1.4, 1.5)))
    own = weights[labels][:, None, None, None]
    for ig, cfg in ((False, False), (True, False), (False, True), (True, True)):
        eps, variance = field(x, jnp.float32(7), Region(ig, cfg))
        guided = (1.2 if ig else 1.0) * ((x + own) + (0.5 * (own - 5.0) if cfg else 0.0))
        np.testing.assert_allclose(eps, guided, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, 10 * x + own, rtol=1e-6)


def test_guidance_is_looked_up_in_the_clock_of_the_chain():
    rows = gaussian_samplers.Ddpm().rows("gaussian", 10)
    assert [row.scalars["t"] for row in rows] == list(reversed(gaussian.respaced("10")))
    assert (rows[0].lookup, rows[-1].lookup) == ((1.0,), (0.001,))
    assert [row.kind for row in rows] == ["step"] * 9 + ["last"]


def test_the_network_is_told_every_timestep_as_it_is():
    def network(x, t, y):
        return DiTOutput(jnp.broadcast_to(t[:, None, None, None], (1, 1, 1, 2)), ())

    in_time = gaussian_samplers.in_sigma_time(network)
    field = gaussian_samplers.noise_field(guided_velocity(in_time, jnp.array([0]), 1, Guidance(), Scales()))
    told = jax.vmap(lambda n: field(jnp.zeros((1, 1, 1, 1)), n, Region(False, False))[0].squeeze())(jnp.arange(1000.0))
    np.testing.assert_array_equal(told, np.arange(1000))
    off_by_a_bit = jnp.float32(np.nextafter(np.arange(1, 1001, dtype=np.float32) / 1000, np.float32(0)))
    told = jax.vmap(lambda t: in_time(None, t[None], None).final[0, 0, 0, 0])(off_by_a_bit)
    np.testing.assert_array_equal(told, np.arange(1000))


def test_both_heads_learn_noise_and_variance_and_the_terms_add_up(params):
    rng = np.random.default_rng(1)
    x, eps = jnp.asarray(rng.standard_normal((2, 4, 4, 4, 2)), jnp.float32)
    t, y = jnp.array([0.0, 3.0, 400.0, 999.0]), jnp.array([0, 1, 2, 5])
    total, metrics = batch_loss(
        MODEL, PROCESS, LOSS, params, params, jnp.int32(0), x, eps, t, y)
    out = apply(MODEL, params, gaussian.noised(x, eps, t), t, y)
    assert out.final.shape == (4, 4, 4, 4)
    for name, head in (("loss/final", out.final), ("loss/intermediate", out.intermediate[0])):
        assert float(metrics[name]) == pytest.approx(float(jnp.mean((head[..., :2] - eps) ** 2)), rel=1e-5)
        bound = gaussian.variational_bound(head[..., :2], head[..., 2:], x, eps, t).mean()
        assert float(metrics[f"{name}_vb"]) == pytest.approx(float(bound), rel=1e-4)
    parts = sum(weight * (metrics[name] + metrics[f"{name}_vb"])
                for name, weight in (("loss/final", 1.0), ("loss/intermediate", 0.5)))
    assert float(total) == pytest.approx(float(parts), rel=3e-7)
    gap = out.final[..., :2] - out.intermediate[0][..., :2]
    assert float(metrics["gap_square"]) == pytest.approx(float(jnp.mean(gap**2)), rel=1e-5)


def test_acceleration_moves_the_noise_target_and_not_the_bound(params):
    rng = np.random.default_rng(2)
    x, eps = jnp.asarray(rng.standard_normal((2, 4, 4, 4, 2)), jnp.float32)
    t, y = jnp.array([0.0, 100.0, 700.0, 900.0]), jnp.array([0, 1, 2, 5])
    plain, moved = (
        batch_loss(MODEL, PROCESS, config, params, params, jnp.int32(0), x, eps, t, y)[1]
        for config in (LOSS, dataclasses.replace(LOSS, accelerate=True, gap_source="ema"))
    )
    out = apply(MODEL, params, gaussian.noised(x, eps, t), t, y)
    predictions, _ = gaussian.split(out)
    target = eps + 0.5 * losses.guidance_gap(predictions)
    expected = float(jnp.mean((predictions.final - target) ** 2))
    assert float(moved["loss/final"]) == pytest.approx(expected, rel=1e-5)
    assert float(moved["loss/final_vb"]) == pytest.approx(float(plain["loss/final_vb"]), rel=1e-6)
    assert float(moved["loss/intermediate"]) == pytest.approx(float(plain["loss/intermediate"]), rel=1e-6)


def test_the_train_step_learns_the_process():
    ema, optimizer = EmaConfig((0.9,), False), optax.adam(3e-3)
    adamw = toy.experiment().optimizer
    step = jax.jit(functools.partial(
        training.train_step, model=MODEL, process=PROCESS, loss=LOSS, optimizer=optimizer,
        schedule=lambda count: jnp.float32(3e-3), trains=adamw.trains, ema=ema, accumulate=1, seed=0))
    rng = np.random.default_rng(3)
    batch = {"image": jnp.asarray(0.1 * rng.standard_normal((16, 4, 4, 2)), jnp.float32),
             "label": jnp.zeros(16, jnp.int32)}
    state, history = jax.jit(lambda: new_state(MODEL, adamw, optimizer, ema.names, 0, {}))(), []
    for _ in range(50):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    mean = lambda name, part: np.mean([m[name] for m in part])  # noqa: E731
    assert history[0]["loss/final"] == pytest.approx(1, abs=0.1)  # a zero head against unit noise
    for name in ("loss/final", "loss/intermediate"):
        assert mean(name, history[-10:]) < 0.5 * mean(name, history[:3])
        assert mean(f"{name}_vb", history[-10:]) < mean(f"{name}_vb", history[:3])


@pytest.mark.parametrize("solver", ("ddpm", "ddim"))
def test_a_sample_belongs_to_its_index_and_its_guidance(params, solver):
    draw = jax.jit(lambda indices, scale: sample_latents(
        params, jnp.uint32(0), indices, indices % 5, Scales(1.5, scale), model=MODEL, process=PROCESS,
        solver=solver, steps=4, guidance=Guidance(use_cfg=True)))
    four, mixed = draw(jnp.arange(4), 1.25), draw(jnp.array([3, 9, 1, 7]), 1.25)
    assert jnp.isfinite(four).all() and four.shape == (4, 4, 4, 2)
    assert abs(four[jnp.array([3, 1])] - mixed[::2]).max() < 1e-5 * abs(four).max()
    assert abs(four - draw(jnp.arange(4), 1.0)).max() > 1e-3 * abs(four).max()


def test_a_recipe_of_the_other_family_is_refused():
    recipe = Recipe("ddpm", 250, 1.4, 1.0, (0.0, 1.0), (0.0, 1.0))
    recipe.check_model(MODEL)
    with pytest.raises(UserError, match="solver='ddpm' must be one of euler, heun, trapezoid, ab2, dopri5, sde, sde_heun"):
        recipe.check_model(dataclasses.replace(MODEL, sigma_channels="none"))
    with pytest.raises(UserError, match="solver='heun' must be one of ddpm, ddim"):
        dataclasses.replace(recipe, solver="heun").check_model(MODEL)
