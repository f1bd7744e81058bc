"""Decoding on several devices, whose images stay where they are."""

import re

import jax
import numpy as np
import pytest

from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.generation import decode
from ig_jax.models import autoencoder, convolutions, cpu
from ig_jax.models.latents import SD_VAE_SCALING
from ig_jax.parallel.mesh import make_mesh

CONFIG = autoencoder.AutoencoderConfig(channels=(8, 16), layers=1, latent_channels=4, groups=4)


@pytest.mark.parametrize("devices, fast", [(1, True), (8, False)])
def test_only_one_cpu_takes_its_own_way(monkeypatch, devices, fast):
    monkeypatch.setattr(convolutions, "WIDE", 8)
    monkeypatch.setattr(convolutions, "PIXELS", 1)
    monkeypatch.setattr(cpu, "CACHE", 1)
    rng = np.random.default_rng(0)
    params = {n: rng.normal(0, 0.3, leaf.shape).astype("f") for n, leaf in autoencoder.shapes(CONFIG).items()}
    x = rng.normal(size=(8, 8, 8, 4)).astype("f")
    mesh = make_mesh(devices=jax.devices()[:devices])
    decoder = decode.make_decoder(mesh, SD_VAE_SCALING, Autoencoder(CONFIG, params, ""))
    program = decoder.func.lower(*decoder.args, x)
    assert ("tensor<36x" in program.as_text()) == fast
    assert not re.findall("all-gather|all-to-all|collective-permute|all-reduce", program.compile().as_text())
    want = SD_VAE_SCALING.denormalise(x)
    monkeypatch.setattr(convolutions, "PIXELS", 1e9)
    want = decode.latents.to_uint8(autoencoder.from_params(CONFIG, params).decode(want), "sit")
    np.testing.assert_allclose(np.asarray(decoder(x)).astype(int), want, atol=1)
