"""Sampling: the same images on any mesh, one compilation for a sweep, the cost that the recipe states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from flax import nnx
from refusal import refused
from traced import inside

from ig_jax.checkpoints.steps import stored_meta
from ig_jax.diffusion import integration
from ig_jax.diffusion.recipe import Recipe
from ig_jax.generation import decode, labels, pretrained
from ig_jax.generation import sampler as generate
from ig_jax.models import cost, cpu, dit
from ig_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ig_jax.models.latents import to_uint8
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import replicated

E = tiny.experiment()
PARAMS = {name: np.asarray(value) for name, value in tiny.state(E).params.items()}
RECIPE = Recipe.of(dict(solver="heun", steps=6, ig_scale=2.0, cfg_scale=1.5, cfg_interval=(0.0, 0.7)))
LABELS = (np.arange(24) % 10).astype(np.int32)


def model_on(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return pretrained.Pretrained(E, jax.device_put(PARAMS, replicated(mesh)), mesh, 0, "0.999", "", ())


@functools.cache
def images_of(solver, devices, batch_size):
    recipe = RECIPE.replace(solver=solver)
    return model_on(devices).sample(LABELS, recipe, seed=3, batch_size=batch_size)


@pytest.mark.parametrize(
    "solver, devices, batch_size", [("heun", 1, 16), ("heun", 1, 64), ("heun", 2, 4), ("heun", 8, 64), ("sde", 8, 16)]
)
def test_images_are_the_same_bytes_on_any_mesh_and_in_any_batch(solver, devices, batch_size):
    """Sums over a row are ordered by the shape of the batch, so latents differ by up to 2e-6; bytes do not."""
    reference = images_of(solver, 1, 4)
    assert reference.std() > 10
    np.testing.assert_array_equal(images_of(solver, devices, batch_size), reference)


def test_no_evaluation_casts_a_kernel_again():
    model = dataclasses.replace(E.model, dtype="bfloat16")
    sampler = generate.make_sampler(make_mesh(devices=jax.devices()[:1]), generate.Program.of(RECIPE, model, E.process))
    # 3 images, so that no activation has the shape of a kernel.
    args = {}, np.uint32(0), np.arange(3, dtype=np.int32), LABELS[:3], RECIPE.scales
    looped = set(casts(sampler.trace(PARAMS, *args).jaxpr.jaxpr))
    kernels = {value.shape for name, value in PARAMS.items() if name.endswith(".kernel")}
    assert looped and not looped & kernels


def casts(jaxpr, looped=False):
    """Shapes of what a program casts to bfloat16 inside its loops."""
    for equation in jaxpr.eqns:
        if looped and equation.params.get("new_dtype") == jnp.bfloat16:
            yield equation.invars[0].aval.shape
        for program in inside(equation):
            yield from casts(program, looped or equation.primitive.name in ("scan", "while"))


def test_an_image_depends_on_its_index_and_not_on_its_batch():
    model = model_on(1)
    chosen = np.array([17, 3])
    (batch,) = model.batches(RECIPE, LABELS[chosen], seed=3, batch_size=4, indices=chosen)
    np.testing.assert_array_equal(np.asarray(model.decode(batch.latents))[:2], images_of("heun", 1, 4)[chosen])


def test_adaptive_images_agree_to_the_tolerance_in_any_batch():
    pytest.importorskip("diffrax")
    recipe = RECIPE.replace(solver="dopri5", steps=300, cfg_scale=1.0, rtol=1e-4, atol=1e-5)
    few, many = (
        [np.asarray(b.latents)[: len(b.indices)] for b in model_on(1).batches(recipe, LABELS[:8], batch_size=n)]
        for n in (2, 8)
    )
    np.testing.assert_allclose(np.concatenate(few), np.concatenate(many), atol=5e-3)


def latents_of(recipe, seed=3):
    (batch,) = model_on(1).batches(recipe, np.array([3, 7], np.int32), seed=seed, batch_size=2)
    return np.asarray(batch.latents)


def test_adaptive_images_keep_their_intervals_and_their_labels():
    pytest.importorskip("diffrax")
    recipe = RECIPE.replace(steps=200, cfg_scale=3.0, ig_interval=(0.2, 0.9), cfg_interval=(0.3, 0.7))
    adaptive = recipe.replace(solver="dopri5", rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(latents_of(adaptive), latents_of(recipe), atol=1e-3)


def test_another_seed_is_another_image_everywhere():
    recipe = RECIPE.replace(steps=2)
    assert (latents_of(recipe, seed=3) != latents_of(recipe, seed=4)).all()


def test_increments_differ_by_seed_index_and_step(monkeypatch):
    def increments(self, rows, field, x, labels, *, region, noise):
        return jnp.stack([noise(0), noise(1)]), []

    monkeypatch.setattr(integration.FixedGrid, "visit", increments)
    program = generate.Program.of(RECIPE.replace(solver="sde"), E.model, E.process)
    both = [
        generate.integrate(program, PARAMS, {}, jnp.uint32(seed), jnp.arange(2), jnp.arange(2), RECIPE.scales, None)[0]
        for seed in (0, 1)
    ]
    assert len(np.unique(np.reshape(both, (8, -1)), axis=0)) == 8


def test_a_sweep_of_twenty_recipes_compiles_once():
    model = model_on(1)
    for i in range(20):
        recipe = RECIPE.replace(steps=3, ig_scale=1 + 0.1 * i, cfg_scale=1.05 + 0.1 * i)
        list(model.batches(recipe, LABELS[:4], seed=i, batch_size=4))
    program = generate.Program.of(recipe, E.model, E.process)
    assert generate.make_sampler(model.mesh, program)._cache_size() == 1


# --- cost: a loop's body is counted once by the compiler, so the loops are unrolled here -----------------------------

# So many tokens that what depends on time and label alone, which an unrolled program computes once for evaluations at
# the same time, is less than the tolerance.
WIDE = dataclasses.replace(E.model, input_size=16, depth=6, width=64, num_heads=2, inter_depth=(2,))
WEAK = dataclasses.replace(WIDE, depth=3, inter_depth=())


def flops(compiled):
    return compiled.cost_analysis()["flops"]


@pytest.fixture
def unrolled(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))


def compiled_sampler(recipe, batch):
    weak = None if recipe.rules["auto"].off else WEAK
    sampler = generate.make_sampler(
        make_mesh(devices=jax.devices()[:1]), generate.Program.of(recipe, WIDE, E.process, weak)
    )
    index, key = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
    weak_shapes = dit.shapes(weak) if weak else {}
    return sampler.lower(dit.shapes(WIDE), weak_shapes, key, index, index, recipe.scales).compile()


def program_flops(recipe, batch=4):
    return flops(compiled_sampler(recipe, batch))


@functools.cache
def forward_flops(batch=4):
    """FLOPs of one forward pass, by the same counter."""
    x, t, y = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((batch, 16, 16, 1), jnp.float32), ((batch,), jnp.float32), ((batch,), jnp.int32))
    )
    run = lambda params, *args: dit.apply(WIDE, params, *args).final
    return flops(jax.jit(run).lower(dit.shapes(WIDE), x, t, y).compile())


FREE = Recipe.of(dict(solver="euler", steps=4))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(cfg_scale=1.5),
        dict(cfg_scale=1.5, cfg_interval=(0.0, 0.5)),
        dict(prefix_scale=1.4),
        dict(auto_scale=2.0),
        dict(solver="heun", cfg_scale=1.5, cfg_interval=(0.2, 0.7)),
        dict(solver="trapezoid", cfg_scale=1.3, cfg_interval=(0.0, 0.5)),
        dict(solver="ab2"),
        dict(solver="sde", ig_scale=2.0),
    ],
    ids=str,
)
def test_compiled_flops_are_the_evaluations(changed, unrolled):
    recipe = FREE.replace(**changed)
    evaluations = recipe.evaluations_per_image("linear", WIDE, WEAK)
    assert program_flops(recipe) / forward_flops() == pytest.approx(evaluations, rel=0.01)


def test_internal_guidance_costs_less_than_one_percent(unrolled):
    guided = FREE.replace(ig_scale=2.0)
    never = FREE.replace(ig_scale=2.0, ig_interval=(0.0, 0.01))  # no grid point is inside
    assert 1 < program_flops(guided) / program_flops(never) < 1.01


def test_what_a_sampler_holds_hardly_grows_with_its_batch(monkeypatch):
    monkeypatch.setattr(cpu, "CACHE", 2**18)
    few, many = (compiled_sampler(FREE, batch).memory_analysis().temp_size_in_bytes for batch in (8, 64))
    assert many < 1.5 * few


def test_prefix_guidance_costs_one_and_the_depth_of_the_head():
    recipe = FREE.replace(prefix_scale=1.4)
    evaluations = recipe.evaluations_per_image("linear", WIDE) / FREE.steps
    assert evaluations == pytest.approx(1 + 2 / 6, abs=0.01)
    assert cost.prefix_macs(WIDE, 0) < cost.forward_macs(WIDE) / 2


# --- labels, inversion and decoding -----------------------------------------------------------------------------


def test_labels_belong_to_the_index(tmp_path):
    few, many = (labels.labels_for(np.arange(start, 40), "random", 10, 5) for start in (30, 0))
    np.testing.assert_array_equal(few, many[30:])
    assert len(set(many)) > 5
    np.testing.assert_array_equal(labels.labels_for(np.arange(12), "balanced", 10, 0), np.arange(12) % 10)
    np.testing.assert_array_equal(labels.labels_for(np.arange(5), "3,1", 10, 0), [3, 1, 3, 1, 3])
    (tmp_path / "labels.txt").write_text("4\n2\n")
    np.save(tmp_path / "labels.npy", np.array([7, 8]))
    (tmp_path / "labels").write_text("5")
    for name, expected in (("labels.txt", [4, 2, 4]), ("labels.npy", [7, 8, 7]), ("labels", [5, 5, 5])):
        np.testing.assert_array_equal(labels.labels_for(np.arange(3), str(tmp_path / name), 10, 0), expected)


def test_files_without_labels_are_refused(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, a=np.arange(3))
    for name in ("empty.npy", "archive.npy"):
        with refused("labels", str(tmp_path / name), expected="balanced, random, null, a list"):
            labels.labels_for(np.arange(3), str(tmp_path / name), 10, 0)


def test_labels_cover_every_class_and_no_other():
    assert set(labels.labels_for(np.arange(500), "random", 10, 5)) == set(range(10))
    np.testing.assert_array_equal(labels.labels_for(np.arange(3), "null", 10, 5), [10] * 3)
    np.testing.assert_array_equal(labels.labels_for(np.arange(3), "3,10", 10, 5), [3, 10, 3])
    for protocol, outside in (("3,11", 11), ("3,-1", -1)):
        with refused("labels", outside, expected="in 0..9, the classes of this model, or 10 for no class"):
            labels.labels_for(np.arange(4), protocol, 10, 0)


def test_to_noise_inverts_sampling():
    model = model_on(1)
    recipe = RECIPE.replace(solver="trapezoid", steps=60, cfg_scale=1.0)
    (batch,) = model.batches(recipe, LABELS[:4], batch_size=4)
    noise = model.to_noise(recipe, np.asarray(batch.latents), LABELS[:4])
    expected = generate.normal(jnp.uint32(0), generate.Purpose.SAMPLE_NOISE, jnp.arange(4), (8, 8, 1))
    np.testing.assert_allclose(noise, expected, atol=0.02)


def test_latents_go_through_the_autoencoder_that_was_given():
    config = AutoencoderConfig(channels=(8, 8), layers=1, latent_channels=4, groups=4)
    autoencoder = Autoencoder(config, rngs=nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(autoencoder, nnx.Param))
    params = {".".join(map(str, path)): param[...] for path, param in state}
    e = tiny.experiment(channels=4)
    mesh = make_mesh(devices=jax.devices()[:2])
    model = pretrained.Pretrained(e, {}, mesh, 0, "", "", (), autoencoder=decode.Autoencoder(config, params, ""))
    latents = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    expected = to_uint8(autoencoder.decode(e.latents.denormalise(latents)), "sit")
    assert model.image_shape == (16, 16, 3) and np.asarray(expected).std() > 5
    assert np.abs(model.to_images(latents).astype(int) - np.asarray(expected, int)).max() <= 1


def test_a_checkpoint_of_a_gpu_opens_where_its_attention_kernel_is_not(tmp_path):
    directory = tiny.write(tmp_path, tiny.experiment())
    stored = directory / "checkpoints" / "0" / "meta" / "metadata"
    stored.write_text(stored.read_text().replace('"attention": "auto"', '"attention": "cudnn"'))
    assert stored_meta(directory)["config"]["model"]["attention"] == "cudnn"
    model = pretrained.load(directory)
    assert model.sample([0, 1]).shape == (2, 8, 8, 1)
