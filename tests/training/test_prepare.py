"""Preparation of a batch in the step: mirror, posterior sample, normalisation, addressed by position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from ig_jax.data.spec import BatchSpec, pixels
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models.latents import LatentScaling
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import batch_sharding
from ig_jax.training.state import TrainState, born_sharded, partition, state_layout
from ig_jax.training.step import prepare

SCALING = LatentScaling("toy", (1.0, -2.0), (0.5, 2.0), "half")
MOMENTS = BatchSpec("moments", (6, 4, 2), "float32", True, SCALING, ("cat", "dog"))
COUNT, SEED, STEP = 64, 5, 3


def batch_of(spec, seed=0, count=COUNT):
    """Random numbers in every array of a batch; standard deviations are positive."""
    rng = np.random.default_rng(seed)
    batch = {"label": jnp.asarray(rng.integers(0, 2, count), jnp.int32)}
    for name, form in spec.abstract(count).items():
        if name == "image":
            batch[name] = jnp.asarray(rng.integers(0, 256, form.shape, np.uint8))
        elif name != "label":
            batch[name] = jnp.asarray(np.abs(rng.normal(2.0, 1.0, form.shape)), form.dtype)
    return batch


def prepared(spec, batch, seed=SEED, step=STEP):
    return np.asarray(prepare(spec, batch, seed, jnp.int32(step)))


def mirrors(seed=SEED, step=STEP, count=COUNT):
    """Which examples are mirrored, by the documented address."""
    return np.asarray(jax.random.bernoulli(address(seed, Purpose.MIRROR, step), 0.5, (count, 1, 1, 1)))


def test_half_of_the_examples_are_mirrored():
    assert 400 < mirrors(count=1000).sum() < 600


def test_moments_are_sampled_from_the_chosen_mirror_and_normalised():
    batch = batch_of(MOMENTS)
    chosen = np.where(mirrors(), batch["moments_flip"], batch["moments"]).astype(np.float64)
    noise = np.asarray(jax.random.normal(address(SEED, Purpose.POSTERIOR, STEP), (COUNT, 6, 4, 2), jnp.float32))
    latent = chosen[..., :2] + chosen[..., 2:] * noise
    x = prepared(MOMENTS, batch)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, (latent - [1.0, -2.0]) * [0.5, 2.0], rtol=1e-5, atol=1e-5)


def test_moments_have_the_mean_and_standard_deviation_that_are_stored():
    spec = dataclasses.replace(MOMENTS, mirrored=False)
    one = batch_of(spec, count=1)
    many = {name: jnp.repeat(value, 4096, axis=0) for name, value in one.items()}
    mean, std = np.split(np.asarray(one["moments"][0]), 2, axis=-1)
    latents = prepared(spec, many) / [0.5, 2.0] + [1.0, -2.0]
    np.testing.assert_allclose(latents.mean(0), mean, atol=0.3)
    np.testing.assert_allclose(latents.std(0), std, rtol=0.06)


@pytest.mark.parametrize("holds", ["moments", "latents"])
def test_channels_may_be_stored_first(holds):
    spec = dataclasses.replace(MOMENTS, holds=holds)
    batch = batch_of(spec)
    first = {name: jnp.moveaxis(value, -1, 1) if value.ndim == 4 else value for name, value in batch.items()}
    turned = dataclasses.replace(spec, channels_first=True)
    assert {name: form.shape for name, form in turned.abstract(COUNT).items()} == {n: v.shape for n, v in first.items()}
    np.testing.assert_array_equal(prepared(turned, first), prepared(spec, batch))


def test_a_log_variance_is_clamped_and_halved():
    """As diffusers' DiagonalGaussianDistribution: std = exp(clip(logvar, -30, 20) / 2)."""
    spec = dataclasses.replace(MOMENTS, mirrored=False)
    batch = batch_of(spec)
    mean, std = np.split(np.asarray(batch["moments"], np.float64), 2, axis=-1)
    logvar = 2 * np.log(std)
    logvar[0, 0, 0], std[0, 0, 0] = (-50.0, 25.0), (np.exp(-15), np.exp(10))
    stored = {**batch, "moments": jnp.asarray(np.concatenate([mean, logvar], -1), jnp.float32)}
    wanted = {**batch, "moments": jnp.asarray(np.concatenate([mean, std], -1), jnp.float32)}
    found = prepared(dataclasses.replace(spec, spread="logvar"), stored)
    np.testing.assert_allclose(found, prepared(spec, wanted), rtol=1e-5, atol=1e-5)


def test_stored_latents_are_taken_as_they_are_and_normalised():
    spec = dataclasses.replace(MOMENTS, holds="latents", dtype="bfloat16")
    batch = batch_of(spec)
    chosen = np.where(mirrors(), batch["latent_flip"], batch["latent"]).astype(np.float32)
    np.testing.assert_array_equal(prepared(spec, batch), (chosen - np.float32([1, -2])) * np.float32([0.5, 2]))


def test_latents_stored_normalised_pass_unchanged():
    identity = LatentScaling("toy", (0.0, 0.0), (1.0, 1.0), "half")
    spec = dataclasses.replace(MOMENTS, holds="latents", mirrored=False, scaling=identity)
    batch = batch_of(spec)
    np.testing.assert_array_equal(prepared(spec, batch), batch["latent"])


@pytest.mark.parametrize("mirrored", [False, True])
def test_pixels_become_numbers_between_minus_1_and_1_and_are_mirrored_left_to_right(mirrored):
    spec = pixels((6, 4, 3), ("cat", "dog"), mirrored)
    batch = batch_of(spec)
    images = np.asarray(batch["image"])
    want = np.where(mirrors(), images[:, :, ::-1], images) if mirrored else images
    np.testing.assert_allclose(prepared(spec, batch), want / 127.5 - 1, atol=1e-6)


def test_an_example_belongs_to_seed_step_and_position():
    batch = batch_of(MOMENTS)
    first = {name: value[:8] for name, value in batch.items()}
    np.testing.assert_array_equal(prepared(MOMENTS, first), prepared(MOMENTS, batch)[:8])
    for seed, step in ((SEED + 1, STEP), (SEED, STEP + 1)):
        assert (prepared(MOMENTS, batch, seed, step) != prepared(MOMENTS, batch)).any(axis=(1, 2, 3)).all()
        assert (mirrors(seed, step) != mirrors()).any()


def test_mirror_and_posterior_are_independent_of_the_noise_of_the_step():
    keys = [jax.random.key_data(address(0, purpose, 1)).tolist() for purpose in Purpose]
    assert len({tuple(key) for key in keys}) == len(Purpose)
    assert (Purpose.MIRROR, Purpose.POSTERIOR) == (7, 8)  # part of the meaning of every checkpoint


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_prepares_the_same(devices):
    batch = batch_of(MOMENTS)

    def on(count):
        rows = batch_sharding(make_mesh(devices=jax.devices()[:count]))
        jitted = jax.jit(functools.partial(prepare, MOMENTS, seed=SEED, step=STEP), in_shardings=(rows,))
        return np.asarray(jitted(jax.device_put(batch, rows)))

    np.testing.assert_array_equal(on(devices), on(1))


def test_micro_batches_train_on_the_same_mirrors_and_latents():
    """A step in four micro-batches on eight devices equals one on one device, with moments of both mirrors."""
    model = dataclasses.replace(toy.MODEL, channels=2, num_classes=2)
    spec = dataclasses.replace(MOMENTS, latent_shape=(8, 8, 2), dtype="bfloat16")
    e = toy.experiment()
    fresh = toy.params(model)

    def trained(devices, accumulate):
        optimizer = dataclasses.replace(e.optimizer, accumulate=accumulate)
        transformation = optax.sgd(0.1)
        step = toy.train_step(
            transformation, model=model, process=e.process, loss=e.loss, optimizer=optimizer, ema=e.ema, spec=spec
        )
        mesh = make_mesh(devices=jax.devices()[:devices])
        names = e.ema.names

        def make():
            trainable = partition(fresh, optimizer.trains)[0]
            return TrainState(jnp.int32(3), fresh, dict.fromkeys(names, fresh), transformation.init(trainable))

        layout = state_layout(make, mesh)
        batch = jax.device_put(batch_of(spec), batch_sharding(mesh))
        state, metrics = step.jitted(layout, mesh)(born_sharded(make, layout), batch)
        return jax.device_get((state.params, metrics))

    (params, metrics), (want_params, want_metrics) = trained(8, 4), trained(1, 1)
    assert toy.scalars(metrics) == pytest.approx(toy.scalars(want_metrics), rel=2e-5)
    for name, value in params.items():
        np.testing.assert_allclose(value, want_params[name], atol=2e-6)
