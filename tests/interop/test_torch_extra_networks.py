"""Round trips of torch networks: equal outputs here after import, equal weights there after export."""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.generation import pretrained
from ig_jax.interop import exporting, importing
from ig_jax.models import autoencoder, dit
from ig_jax.weightfiles.files import open_weights
from ig_jax.weightfiles.sets import choose

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e .[torch] for these tests")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "golden")]
import torch_networks  # noqa: E402
import variants  # noqa: E402

TITLES = {"sit": "SiT-B/2", "dit": "DiT-B/2", "lightningdit": "LightningDiT-B/1"}


def network(name: str, seed: int = 0) -> torch_networks.Network:
    """A variant with random weights, none zero."""
    torch.manual_seed(seed)
    made = torch_networks.Network(**variants.VARIANTS[name])
    for key, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)
    return made


def checkpoint(name: str, average: torch.nn.Module, raw: torch.nn.Module) -> dict:
    """What the published training code of this family would save."""
    settings = variants.VARIANTS[name]
    if settings["code"] == "lightningdit":
        config = {
            "model": {"model_type": TITLES["lightningdit"], "encoder_depth": settings.get("head", 0)},
            "transport": {"path_type": "Linear", "prediction": "velocity"},
        }
        prefixed = {f"module.{key}": value for key, value in raw.state_dict().items()}
        return {"model": prefixed, "ema": average.state_dict(), "opt": {}, "config": config}
    title = TITLES[settings["code"]]
    args = argparse.Namespace(model=title, num_classes=10, encoder_depth=settings.get("head"))
    return {"model": raw.state_dict(), "ema": average.state_dict(), "opt": {}, "args": args, "steps": 9}


def convert(file: Path, out: Path) -> None:
    choices = importing.Choices(which="ema", family="", num_heads=4, inter_depth=0, latent_stats="", name="x")
    with open_weights(file) as weights:
        job = importing.prepare(file, weights.metadata, choose(weights, "ema").tensors, choices)
        job.write(out, job.read())


# Half of them each time: test_published.py compares all with numbers that the published networks gave.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[toy.SLOW] * (i % 2)) for i, name in enumerate(variants.VARIANTS)]
)
def test_the_same_numbers_here_and_the_same_weights_back_there(tmp_path, name):
    theirs = network(name)
    torch.save(checkpoint(name, theirs, network(name, 1)), tmp_path / "there.pt")
    convert(tmp_path / "there.pt", tmp_path / "run")
    own = pretrained.load(tmp_path / "run")
    x, t, y = variants.inputs(name)
    with torch.no_grad():
        final, intermediate = theirs(*map(torch.from_numpy, (x, t, y)))
    model = own.experiment.model
    flipped = model.clock == "noise_at_0"
    time = jnp.asarray(1 - t if flipped else t)
    out = dit.apply(model, own.params, jnp.moveaxis(x, 1, -1), time, jnp.asarray(y))
    for got, want in zip((out.final, *out.intermediate), (final, intermediate)):
        want = np.moveaxis(want.numpy(), 1, -1) * (-1 if flipped else 1)
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1, abs(want).max()), rtol=0)

    exporting.published_form(tmp_path / "run", "").write(tmp_path / "back.pt")
    stored = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    again = network(name, 2)
    again.load_state_dict(stored)  # strict: no name missing, none too many
    with torch.no_grad():
        assert torch.equal(again(*map(torch.from_numpy, (x, t, y)))[0], final)
    assert all(torch.equal(value, stored[key]) for key, value in theirs.state_dict().items())


def test_safetensors_export_loads_too(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    theirs = network("ldit_qk_no_shift")
    torch.save(checkpoint("ldit_qk_no_shift", theirs, theirs), tmp_path / "there.pt")
    convert(tmp_path / "there.pt", tmp_path / "run")
    exporting.published_form(tmp_path / "run", "").write(tmp_path / "back.safetensors")
    network("ldit_qk_no_shift", 2).load_state_dict(safetensors_torch.load_file(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("groups", [8, 32])
def test_diffusers_autoencoder_there_and_back(tmp_path, groups):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e .[torch]")
    torch.manual_seed(0)
    levels = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    theirs = diffusers.AutoencoderKL(
        **levels, block_out_channels=[32, 64], layers_per_block=1, latent_channels=4, norm_num_groups=groups
    ).eval()
    theirs.save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "diffusion_pytorch_model.safetensors"
    convert(file, tmp_path / "vae")
    config, params, _ = autoencoder_checkpoint.load(tmp_path / "vae")
    assert config.groups == groups
    model = autoencoder.from_params(config, params)
    image, z = (0.9 * variants.hashed(name, (2, c, s, s)) for name, c, s in (("image", 3, 16), ("z", 4, 8)))
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(image)).latent_dist
        decoded = theirs.decode(torch.from_numpy(z)).sample
    got = jax.jit(model.encode)(jnp.moveaxis(image, 1, -1))
    for own, want in (
        (got.mean, posterior.mean),
        (got.std, posterior.std),
        (jax.jit(model.decode)(jnp.moveaxis(z, 1, -1)), decoded),
    ):
        np.testing.assert_allclose(own, np.moveaxis(want.numpy(), 1, -1), atol=2e-5, rtol=0)
    exporting.published_form(tmp_path / "vae", "").write(tmp_path / "back.safetensors")
    file.write_bytes((tmp_path / "back.safetensors").read_bytes())
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "hub", local_files_only=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())
