"""From what a denoiser draws to uint8 images: through an autoencoder, or at once for a model of pixels."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ig_jax.errors import check
from ig_jax.models import autoencoder, latents
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import batch_sharding, replicated

CHUNK = 8  # images a device decodes at a time: what bounds the memory of a decoder's finest level


class Autoencoder(NamedTuple):
    """A decoder's config and its parameters as models.autoencoder.from_params takes them."""

    config: autoencoder.AutoencoderConfig
    params: dict
    digest: str  # sha256 over the digests of all arrays: names these weights beside every image


def load_autoencoder(directory: str | Path, scaling: latents.LatentScaling) -> Autoencoder:
    """The autoencoder in a directory.  Raises: UserError when it does not fit the denoiser's latents."""
    check(needs_autoencoder(scaling), "autoencoder", str(directory), "left out for a model of pixels")
    from ig_jax.interop import autoencoder_checkpoint

    digest = autoencoder_checkpoint.digest(directory)
    found = Autoencoder(*autoencoder_checkpoint.load(directory), digest)
    check(found.config.latent_channels == scaling.channels, "autoencoder latent_channels",
          found.config.latent_channels, f"{scaling.channels}, the channels of the {scaling.name} latents")
    return found


def needs_autoencoder(scaling: latents.LatentScaling) -> bool:
    """Whether these latents are anything but pixels."""
    return scaling.name != latents.PIXELS.name


def check_decodable(scaling: latents.LatentScaling, found: Autoencoder | None) -> None:
    """Raise UserError for latents of an autoencoder that was not given."""
    check(found is not None or not needs_autoencoder(scaling), "autoencoder", "",
          f"the directory of the {scaling.name} autoencoder",
          "give --autoencoder, or --save=latents and decode later")


def image_shape(latent_shape: tuple[int, int, int], found: Autoencoder | None) -> tuple[int, int, int]:
    """(H, W, C) of the image of a latent."""
    height, width, channels = latent_shape
    if found is None:
        return height, width, channels
    return height * found.config.factor, width * found.config.factor, 3


def make_decoder(
    mesh: Mesh, scaling: latents.LatentScaling, found: Autoencoder | None
) -> Callable[[jax.Array], jax.Array]:
    """latents [B, H, W, C] float32 as a denoiser draws them -> images uint8 [B, H', W', C'] on the mesh.

    Raises: UserError for latents of an autoencoder that was not given.
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
        x = autoencoder.decode_chunked(decoder.decode, scaling.denormalise(x), CHUNK * batch_shards(mesh))
        return latents.to_uint8(x, scaling.uint8_rule)

    return jax.jit(decode, in_shardings=(replicated(mesh), rows), out_shardings=rows)
