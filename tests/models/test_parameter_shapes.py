"""The parameters that a config implies without JAX are those the networks have."""

import itertools

import jax
import pytest
from flax import nnx

from ig_jax.models import autoencoder_config, dit, dit_config, zoo
from ig_jax.models.autoencoder import Autoencoder
from ig_jax.models.autoencoder_config import SD_VAE, VA_VAE, AutoencoderConfig

REST = dict(rope=False, clock="noise_at_1", inter_head_init="zero", dtype="float32", scan_blocks=False, remat="none")
OPTIONS = [dit_config.CHOICES[name] for name in ("norm", "mlp", "qk_norm", "sigma_channels")]


def check_denoiser(config):
    traced = dit.shapes(config)
    assert {name: leaf.shape for name, leaf in traced.items()} == dit_config.parameter_shapes(config)
    assert all(leaf.dtype == "float32" for leaf in traced.values())


@pytest.mark.parametrize("norm, mlp, qk_norm, sigma_channels", [*itertools.product(*OPTIONS)])
def test_a_denoiser_in_every_option(norm, mlp, qk_norm, sigma_channels):
    for adaln_shift, inter_depth in ((True, ()), (False, (1, 2))):
        check_denoiser(dit.DiTConfig(
            input_size=8, channels=3, patch_size=2, depth=2, width=48, num_heads=4, mlp_ratio=2.5, num_classes=7,
            norm=norm, mlp=mlp, qk_norm=qk_norm, sigma_channels=sigma_channels, adaln_shift=adaln_shift,
            inter_depth=inter_depth, **REST))


@pytest.mark.parametrize("name", ["SiT-S/8", "LightningDiT-1p6B/1"])  # others in full size: test_published.py
def test_a_denoiser_by_name(name):
    runtime = dict(dtype="bfloat16", scan_blocks=True, remat="full")
    check_denoiser(dit.DiTConfig(**zoo.named(name), input_size=32, channels=4, num_classes=1000, **runtime))


@pytest.mark.parametrize("config", [
    SD_VAE, VA_VAE, AutoencoderConfig((32,), 1, 4, quant_convs=False),
    AutoencoderConfig((8, 16, 16), 1, 3, groups=4, attention_levels=(0, 2)),
])
def test_an_autoencoder(config):
    model = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    traced = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    found = {tuple(key.key for key in path): leaf.shape for path, leaf in traced}
    assert found == autoencoder_config.parameter_shapes(config)
