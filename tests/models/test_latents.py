"""Latent scaling round trips and refusals, and the uint8 rules on every level."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused

from ig_jax.base.schema import bind
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
    levels = {"sit": np.float32(255) * ((x + one) / 2), "half": half * x + 128, "unit": np.float32(255) * x}[rule]
    wanted = np.trunc(np.clip(levels, 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(latents.to_uint8(x, rule), wanted)


def test_the_sit_rule_darkens_by_at_most_one_level():
    got = np.asarray(latents.to_uint8(latents.from_uint8(LEVELS), "sit"))
    assert got[0] == 0 and got[255] == 255 and set(LEVELS.astype(int) - got) <= {0, 1}


def test_sd_scaling_is_the_factor():
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_array_equal(SD_VAE_SCALING.normalise(z), z * np.float32(0.18215))


@pytest.mark.parametrize("scaling", [SD_VAE_SCALING, VA_VAE_SCALING, PIXELS])
def test_normalise_denormalise_json(scaling):
    z = np.random.default_rng(0).normal(size=(2, 4, 4, scaling.channels)).astype(np.float32)
    np.testing.assert_allclose(scaling.denormalise(scaling.normalise(z)), z, atol=1e-6)
    again = bind(LatentScaling, json.loads(json.dumps(dataclasses.asdict(scaling))), "latents")
    assert again == scaling and hash(again) == hash(scaling)
    latents.check_same(again, scaling)


def test_mean_std_normalises_to_unit_variance():
    z = MEAN + STD * np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_allclose(VA_VAE_SCALING.normalise(z), np.sign(z - MEAN), atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        VA_VAE_SCALING,
        latents.from_factor("sd_vae", 0.13025, 4, "sit"),
        latents.from_factor("other_vae", 0.18215, 4, "sit"),
        latents.from_factor("sd_vae", 0.18215, 4, "half"),
    ],
)
def test_mismatch_is_refused_naming_both(other):
    with refused("latents", other, expected=str(SD_VAE_SCALING), says=str(other)):
        latents.check_same(SD_VAE_SCALING, other)


@pytest.mark.parametrize(
    "name, make",
    [
        ("shift", lambda: LatentScaling("a", (0.0,), (1.0, 1.0), "sit")),
        ("scale", lambda: LatentScaling("a", (0.0,), (0.0,), "sit")),
        ("shift", lambda: LatentScaling("a", (float("nan"),), (1.0,), "sit")),
        ("uint8_rule", lambda: LatentScaling("a", (0.0,), (1.0,), "round")),
        ("std", lambda: latents.from_mean_std("a", [0.0], [0.0], "half")),
        ("latents.shift", lambda: bind(LatentScaling, {"name": "a"}, "latents")),
        ("latents", lambda: bind(LatentScaling, [1], "latents")),
        ("latents.scale", lambda: bind(LatentScaling, dataclasses.asdict(PIXELS) | {"scale": ["x"] * 3}, "latents")),
        ("latents.shift", lambda: bind(LatentScaling, dataclasses.asdict(PIXELS) | {"scale": 3}, "latents")),
        ("latents.shape", lambda: SD_VAE_SCALING.normalise(np.zeros((2, 8, 8, 32)))),
        ("uint8_rule", lambda: latents.to_uint8(np.zeros(3), "round")),
        ("images.dtype", lambda: latents.from_uint8(np.zeros(3))),
    ],
)
def test_bad_input_is_refused(name, make):
    with refused(name):
        make()
