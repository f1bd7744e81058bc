"""Published autoencoder weights: parity with the published networks, names, round trips and refusals."""

import functools
import json
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.interop import autoencoder_weights as weights
from ig_jax.models.autoencoder import SD_VAE, VA_VAE, AutoencoderConfig, from_params, shapes

GOLDEN = Path(__file__).parent.parent / "golden"
KEYS = json.loads((GOLDEN / "autoencoder_keys.json").read_text())  # full-size published names and shapes
DIFFUSERS = AutoencoderConfig(channels=(32, 64, 64), layers=1, latent_channels=4, groups=8)
LDM = AutoencoderConfig(channels=(32, 32, 64), layers=2, latent_channels=8, attention_levels=(2,))


class Stored:
    """A tensor of known shape that must not be read where it has no array."""

    def __init__(self, shape, array=None):
        self.shape = tuple(shape)
        self._array = array

    def read(self):
        assert self._array is not None, "read before all shapes were checked"
        return self._array


def hashed_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights behind tests/golden/autoencoder_*.npz: a hash of name and position, nowhere zero or one.

    The outputs there are those of diffusers 0.42.1's AutoencoderKL and of a torch 2.13.0 twin of the VA-VAE
    network, in float64, with these weights.
    """
    x = np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    u = (x / 2.0**31 - 1).reshape(shape)
    if len(shape) == 1:
        return (u * 0.2 + (1 if name.endswith("weight") else 0)).astype(np.float32)
    return (u * np.sqrt(3 / np.prod(shape[1:]))).astype(np.float32)


def published(config: AutoencoderConfig, naming: str) -> dict[str, Stored]:
    """A published state of hashed weights, with the names and shapes that `to_published` gives."""
    arrays = weights.to_published(zeros(config), config, naming)
    return {name: Stored(a.shape, hashed_weight(name, a.shape)) for name, a in arrays.items()}


@functools.cache
def zeros(config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """The parameters of a config as zeros of full shape that take no memory."""
    return {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes(config).items()}


@pytest.mark.parametrize("naming, config", [("diffusers", DIFFUSERS), ("ldm", LDM)])
def test_parity_with_the_published_networks(naming, config):
    golden = np.load(GOLDEN / f"autoencoder_{naming}.npz")
    model = from_params(config, weights.to_params(published(config, naming), config))
    mean, std = jax.jit(model.encode)(golden["image"])
    decoded = jax.jit(model.decode)(golden["z"])
    for got, name in ((mean, "mean"), (std, "std"), (decoded, "decoded")):
        np.testing.assert_allclose(got, golden[name], atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    "keys, naming, config, count",
    [
        ("sd_vae", "diffusers", SD_VAE, 83_653_863),
        ("sd_vae_old", "diffusers_old", SD_VAE, 83_653_863),
        ("va_vae", "ldm", VA_VAE, 69_836_067),
    ],
)
def test_full_size_names_and_shapes(keys, naming, config, count):
    state = {name: Stored(shape) for name, shape in KEYS[keys].items()}
    assert weights.naming_of(state) == naming and weights.recognise(state) == config
    arrays = weights.to_published(zeros(config), config, naming)
    assert {name: list(array.shape) for name, array in arrays.items()} == KEYS[keys]
    assert sum(array.size for array in arrays.values()) == count


@pytest.mark.parametrize("naming", weights.NAMINGS)
@pytest.mark.parametrize("config", [DIFFUSERS, LDM, AutoencoderConfig((32, 64), 1, 4, quant_convs=False)])
def test_round_trip_is_byte_equal(naming, config):
    state = published(config, naming)
    assert weights.naming_of(state) == naming and weights.recognise(state, config.groups) == config
    params = weights.to_params(state, config)
    kinds, wanted = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (params, zeros(config)))
    assert kinds == wanted
    again = weights.to_published(params, config, naming)
    assert again.keys() == state.keys()
    for name, array in again.items():
        assert array.shape == state[name].shape and array.flags.c_contiguous
        assert array.tobytes() == state[name].read().tobytes(), name


def test_old_and_new_attention_names_are_the_same_network():
    arrays = {name: t.read() for name, t in published(DIFFUSERS, "diffusers").items()}
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_(?:[qkv]|out\.0)", lambda m: renames[m[0]], name): a for name, a in arrays.items()}
    assert old.keys() != arrays.keys()
    new_params, old_params = (
        weights.to_params({name: Stored(a.shape, a) for name, a in state.items()}, DIFFUSERS) for state in (arrays, old)
    )
    jax.tree.map(np.testing.assert_array_equal, new_params, old_params)


def test_parts_that_only_training_needs_are_left_out():
    state = published(LDM, "ldm")
    other = {
        "loss.logvar": Stored(()),
        "foundation_model.model.cls_token": Stored((1, 1, 8)),
        "linear_proj.weight": Stored((8, 8, 1, 1)),
    }
    assert weights.recognise(state | other) == LDM
    found, plain = weights.to_params(state | other, LDM), weights.to_params(state, LDM)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_half_precision_files_become_float32():
    state = published(DIFFUSERS, "diffusers")
    half = {name: Stored(t.shape, t.read().astype(jnp.bfloat16)) for name, t in state.items()}
    leaves = jax.tree.leaves(weights.to_params(half, DIFFUSERS))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


CONV = "decoder.conv_in.weight"


@pytest.mark.parametrize(
    "change, name, value, words",
    [
        ({CONV: None}, f"tensor {CONV} shape", "missing", "(512, 4, 3, 3)"),
        ({CONV: Stored((512, 5, 3, 3))}, f"tensor {CONV} shape", (512, 5, 3, 3), "must be (512, 4, 3, 3)"),
        ({CONV: Stored(())}, f"tensor {CONV} shape", (), "must be"),
        (
            {"decoder.extra.weight": Stored((7, 3))},
            "tensor 'decoder.extra.weight'",
            None,
            "of shape (7, 3) has no place",
        ),
        ({"line\nbreak": Stored((7,))}, "tensor 'line\\nbreak'", None, "of shape"),
    ],
)
def test_first_wrong_tensor_is_named_before_any_is_read(change, name, value, words):
    state = {name: Stored(shape) for name, shape in KEYS["sd_vae"].items()} | change
    state = {name: t for name, t in state.items() if t is not None}
    with refused(name, value, says=words):
        weights.to_params(state, SD_VAE)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"blocks.0.attn.qkv.weight": Stored((3, 3))},
        {name: Stored(()) for name in KEYS["sd_vae"]},
        {name: Stored(shape) for name, shape in KEYS["va_vae"].items() if "down.0" not in name},
        {name: Stored(shape) for name, shape in KEYS["sd_vae"].items() if name != CONV},
        {name: Stored(shape) for name, shape in KEYS["va_vae"].items()}
        | {f"encoder.down.0.block.{i}.conv1.weight": Stored((128, 128, 3, 3)) for i in range(20_000)},
    ],
)
def test_other_files_are_not_recognised(state):
    with pytest.raises(UserError):
        weights.recognise(state)


def test_export_refuses_wrong_parameters():
    params = weights.to_params(published(DIFFUSERS, "ldm"), DIFFUSERS)
    with refused("parameter decoder.conv_in.bias shape", "missing"):
        weights.to_published({}, DIFFUSERS, "diffusers")
    with refused("parameter quant_conv.kernel shape", (1, 1, 8, 4), expected="(1, 1, 8, 8)"):
        weights.to_published(params | {"quant_conv.kernel": np.zeros((1, 1, 8, 4))}, DIFFUSERS, "diffusers")
    with refused("naming", "torch"):
        weights.to_published(params, DIFFUSERS, "torch")
