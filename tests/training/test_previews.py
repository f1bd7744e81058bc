"""Previews during training: a sheet near square that says what made it."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from PIL import Image
from refusal import refused
from search import find

from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.models import autoencoder
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.latents import SD_VAE_SCALING, from_factor, to_uint8
from ig_jax.parallel.mesh import make_mesh
from ig_jax.pictures import images, plots
from ig_jax.training import hooks


def preview(directory, monkeypatch, count, classes):
    """(the sheet of `count` images, the images in the order of their numbers, lines of text)."""
    e = tiny.experiment(num_classes=classes)
    e = dataclasses.replace(e, run=dataclasses.replace(e.run, preview_images=count, preview_every=1))
    sampled = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    batch = SimpleNamespace(latents=jnp.asarray(sampled))
    monkeypatch.setattr(hooks, "sample_latents", lambda *args, **kwargs: [batch])
    monkeypatch.setattr(hooks.decode, "make_decoder", lambda *args: lambda latents: latents)
    lines, text = [], plots.Page.text
    monkeypatch.setattr(
        plots.Page, "text", lambda self, x, y, line, *a, **k: (lines.append(line), text(self, x, y, line, *a, **k))
    )
    shown = []
    records = SimpleNamespace(image=lambda step, name, picture: shown.append(picture))
    state = SimpleNamespace(ema=dict.fromkeys(e.ema.names, {}))
    hook = hooks.preview(e, make_mesh(), directory)
    hook.action(SimpleNamespace(step=40, state=state, records=records))
    picture = np.asarray(Image.open(directory / "previews" / "step_0000040.png"))
    np.testing.assert_array_equal(shown[0], picture)
    return picture, sampled, " ".join(lines)


@pytest.mark.parametrize("classes, columns", [(10, 8), (1000, 6)])
def test_a_preview_is_readable_near_square_and_sorted_by_class(tmp_path, monkeypatch, classes, columns):
    picture, sampled, text = preview(tmp_path, monkeypatch, 40, classes)
    order = np.argsort(np.arange(40) % classes, kind="stable")
    assert len(find(picture, images.grid(sampled[order], columns=columns, zoom=6))) == 1
    assert 0.5 < picture.shape[0] / picture.shape[1] < 2
    assert "digits, step 40, EMA 0.999; euler, 4 steps, seed 0; IG 2" in text


def test_previews_that_no_file_can_hold_are_refused_at_the_start(tmp_path):
    e = tiny.experiment(channels=5)
    run = dataclasses.replace(e.run, preview_images=4)
    e = SimpleNamespace(run=run, model=e.model, ema=e.ema, latents=from_factor("pixels", 1.0, 5, "half"))
    with refused("model.channels", 5, fix="run.preview_images=0"):
        hooks.preview(e, make_mesh(), tmp_path)


def test_latents_are_drawn_by_the_autoencoder_of_the_run(tmp_path, monkeypatch):
    config = AutoencoderConfig(channels=(8, 16), layers=1, latent_channels=4, groups=4)
    rng = np.random.default_rng(0)
    shapes = autoencoder.shapes(config)
    weights = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    autoencoder_checkpoint.save(tmp_path / "vae", config, weights, "diffusers")
    e, side = tiny.experiment(channels=4), 8 * config.factor
    run = dataclasses.replace(e.run, preview_images=8, preview_every=1, autoencoder=str(tmp_path / "vae"))
    e = dataclasses.replace(e, run=run, latents=SD_VAE_SCALING)
    x = jnp.asarray(rng.normal(size=(8, 8, 8, 4)), jnp.float32)
    monkeypatch.setattr(hooks, "sample_latents", lambda *args, **kwargs: [SimpleNamespace(latents=x)])
    drawn, sheet = [], plots.sheet
    monkeypatch.setattr(plots, "sheet", lambda images, **how: (drawn.append(images), sheet(images, **how))[1])
    state = SimpleNamespace(ema=dict.fromkeys(e.ema.names, {}))
    records = SimpleNamespace(image=lambda step, name, picture: None)
    hooks.preview(e, make_mesh(), tmp_path).action(SimpleNamespace(step=1, state=state, records=records))
    want = np.asarray(to_uint8(autoencoder.from_params(config, weights).decode(x / 0.18215), "sit"))
    assert want.shape == (8, side, side, 3) and want.std() > 5
    np.testing.assert_allclose(drawn[0].astype(int), want, atol=1)  # a rounding of the jitted decoder
