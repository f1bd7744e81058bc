"""Decoding of latents to uint8 images: through an autoencoder, or directly for a model of pixels."""

import functools
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from ig_jax.base.errors import check
from ig_jax.checkpoints import autoencoder as checkpoint
from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.diffusion.presets import AUTOENCODERS
from ig_jax.models import autoencoder, latents
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import batch_sharding, on_mesh, replicated
from ig_jax.pictures import images


def load_autoencoder(directory: str | os.PathLike, scaling: latents.LatentScaling) -> Autoencoder:
    """The autoencoder in a directory.  Raises: UserError when it does not fit the denoiser's latents."""
    check(needs_autoencoder(scaling), "autoencoder", str(directory), "left out for a model of pixels")
    found = checkpoint.load(directory)
    channels, expected = found.config.latent_channels, f"{scaling.channels}, the channels of the {scaling.name} latents"
    check(channels == scaling.channels, "autoencoder latent_channels", channels, expected)
    return found


def needs_autoencoder(scaling: latents.LatentScaling) -> bool:
    """Whether these latents are not pixels."""
    return scaling.name != latents.PIXELS.name


def check_decodable(scaling: latents.LatentScaling, found: Autoencoder | None) -> None:
    """Raise UserError for latents whose autoencoder was not given."""
    expected = f"the directory of the {scaling.name} autoencoder"
    published = AUTOENCODERS.get(scaling.name)
    convert = f" (python -m ig_jax.convert --from={published} --out=DIR makes one)" if published else ""
    fix = f"give --autoencoder{convert}, or --save=latents and decode later"
    check(found is not None or not needs_autoencoder(scaling), "autoencoder", "", expected, fix)


def check_drawable(channels: int, what: str, fix: str) -> None:
    """Raise UserError for images with a number of channels that no picture has; `what` they are for."""
    expected = f"1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) for {what}"
    check(channels in images.CHANNELS, "model.channels", channels, expected, fix)


def image_shape(latent_shape: tuple[int, int, int], found: Autoencoder | None) -> tuple[int, int, int]:
    """(H, W, C) of the image of a latent."""
    height, width, channels = latent_shape
    if found is None:
        return height, width, channels
    return height * found.config.factor, width * found.config.factor, 3


def make_decoder(
    mesh: Mesh, scaling: latents.LatentScaling, found: Autoencoder | None
) -> Callable[[jax.Array], jax.Array]:
    """Normalised latents (B, h, w, c) float32 -> images uint8 (B, H, W, C), on the mesh.

    Raises: UserError for latents whose autoencoder was not given.
    """
    check_decodable(scaling, found)
    if found is None:
        return _jitted(mesh, scaling, None)
    params = jax.device_put(found.params, replicated(mesh))
    return functools.partial(_jitted(mesh, scaling, found.config), params)


@functools.lru_cache(maxsize=8)
def _jitted(mesh: Mesh, scaling: latents.LatentScaling, config: autoencoder.AutoencoderConfig | None):
    rows = batch_sharding(mesh)
    if config is None:
        return jax.jit(lambda x: latents.to_uint8(x, scaling.uint8_rule), in_shardings=rows, out_shardings=rows)

    def decode(params, x):
        decoder = autoencoder.from_params(config, params)
        with on_mesh(mesh):
            x = autoencoder.by_chunks(decoder.decode, scaling.denormalise(x), autoencoder.CHUNK * batch_shards(mesh))
        return latents.to_uint8(x, scaling.uint8_rule)

    return jax.jit(decode, in_shardings=(replicated(mesh), rows), out_shardings=rows)
