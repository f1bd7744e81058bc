"""Latent scaling round trips and refusals, and the uint8 rules on every level."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.models import latents
from ig_jax.models.latents import PIXELS, SD_VAE_SCALING, LatentScaling

MEAN, STD = np.linspace(-1, 1, 32, dtype=np.float32), np.linspace(0.5, 3, 32, dtype=np.float32)
VA_VAE_SCALING = latents.from_mean_std("va_vae", MEAN, STD, "half")
LEVELS = np.arange(256, dtype=np.uint8)


def test_half_rule_inverts_from_uint8_on_all_levels():
    for decode in (latents.from_uint8, jax.jit(latents.from_uint8)):
        x = decode(LEVELS)
        assert x.dtype == jnp.float32 and float(x[0]) == -1 and float(x[-1]) == 1
        for encode in (latents.to_uint8, jax.jit(latents.to_uint8, static_argnums=1)):
            np.testing.assert_array_equal(encode(x, "half"), LEVELS)


@pytest.mark.parametrize("rule", latents.UINT8_RULES)
def test_rules_truncate_and_clip(rule):
    x = np.concatenate([np.linspace(-1.5, 1.5, 1001), [-np.inf, np.inf]]).astype(np.float32)
    one, half = np.float32(1), np.float32(127.5)
    levels = np.float32(255) * ((x + one) / 2) if rule == "sit" else half * x + 128
    wanted = np.trunc(np.clip(levels, 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(latents.to_uint8(x, rule), wanted)


def test_sit_rule_on_all_levels_is_never_more_than_one_level_dark():
    got = np.asarray(latents.to_uint8(latents.from_uint8(LEVELS), "sit"))
    assert got[0] == 0 and got[255] == 255 and set(LEVELS.astype(int) - got) <= {0, 1}


def test_sd_scaling_is_the_factor():
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_array_equal(SD_VAE_SCALING.normalise(z), z * np.float32(0.18215))


@pytest.mark.parametrize("scaling", [SD_VAE_SCALING, VA_VAE_SCALING, PIXELS])
def test_normalise_denormalise_json(scaling):
    z = np.random.default_rng(0).normal(size=(2, 4, 4, scaling.channels)).astype(np.float32)
    np.testing.assert_allclose(scaling.denormalise(scaling.normalise(z)), z, atol=1e-6)
    again = LatentScaling.from_json(json.loads(json.dumps(scaling.to_json())))
    assert again == scaling and hash(again) == hash(scaling)
    latents.check_same(again, scaling)


def test_mean_std_normalises_to_unit_variance():
    z = MEAN + STD * np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_allclose(VA_VAE_SCALING.normalise(z), np.sign(z - MEAN), atol=1e-5)


@pytest.mark.parametrize("other", [
    VA_VAE_SCALING,
    latents.from_factor("sd_vae", 0.13025, 4, "sit"),
    latents.from_factor("other_vae", 0.18215, 4, "sit"),
    latents.from_factor("sd_vae", 0.18215, 4, "half"),
])
def test_mismatch_is_refused_naming_both(other):
    with pytest.raises(UserError) as err:
        latents.check_same(SD_VAE_SCALING, other)
    assert str(SD_VAE_SCALING) in str(err.value) and str(other) in str(err.value)


@pytest.mark.parametrize("make", [
    lambda: LatentScaling("a", (0.0,), (1.0, 1.0), "sit"),
    lambda: LatentScaling("a", (0.0,), (0.0,), "sit"),
    lambda: LatentScaling("a", (float("nan"),), (1.0,), "sit"),
    lambda: LatentScaling("a", (0.0,), (1.0,), "round"),
    lambda: latents.from_mean_std("a", [0.0], [0.0], "half"),
    lambda: LatentScaling.from_json({"name": "a"}),
    lambda: LatentScaling.from_json([1]),
    lambda: LatentScaling.from_json(PIXELS.to_json() | {"scale": ["x"] * 3}),
    lambda: LatentScaling.from_json(PIXELS.to_json() | {"scale": 3}),
    lambda: SD_VAE_SCALING.normalise(np.zeros((2, 8, 8, 32))),
    lambda: latents.to_uint8(np.zeros(3), "round"),
    lambda: latents.from_uint8(np.zeros(3)),
])
def test_bad_input_is_a_user_error(make):
    with pytest.raises(UserError):
        make()
