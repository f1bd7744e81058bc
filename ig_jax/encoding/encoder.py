"""The encoder of an autoencoder on all devices of this process: uint8 images -> what the shards store.

Each device runs the program of a fixed number of images, whatever the number of devices and processes, so that the
bytes of a shard depend on its images alone.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ig_jax.base.errors import check
from ig_jax.checkpoints import autoencoder as checkpoint
from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.data.spec import FLIPPED, FORMS
from ig_jax.models import autoencoder, latents
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.parallel.mesh import BATCH_AXES, make_mesh
from ig_jax.parallel.sharding import batch_sharding, replicated

SEED = 0  # of the latents sampled with --stage=latents


def load(directory: str | os.PathLike) -> Autoencoder:
    """The autoencoder in a directory, its parameters on every device of this process.  Raises: UserError."""
    return checkpoint.load(directory, replicated(make_mesh(devices=jax.local_devices())))


def stored_shape(config: AutoencoderConfig, size: int, stage: str) -> tuple[int, int, int]:
    """(h, w, 2C) of moments or (h, w, C) of latents.  Raises: UserError for a size that does not divide."""
    check(size > 0 and size % config.factor == 0, "--size", size, f"a multiple of {config.factor} pixels")
    channels = config.latent_channels * (2 if stage == "moments" else 1)
    return size // config.factor, size // config.factor, channels


def make_encode(
    found: Autoencoder, stage: str, dtype: str, mirrored: bool, compute: str
) -> Callable[[np.ndarray, np.ndarray], dict[str, jax.Array]]:
    """A function of images uint8 (B, H, W, 3) and their rows int (B,) in the source, B a multiple of the devices.

    It returns the arrays of a record with a leading axis, in `dtype`; the convolutions run in `compute`. The mirrored
    images are encoded too, since the encoding of a mirrored image is not the mirrored encoding. Sampled latents depend
    on the row.
    """

    def stored(params: dict[str, jax.Array], images: jax.Array, rows: jax.Array, flip: int) -> jax.Array:
        moments = autoencoder.moments(found.config, params, images, compute)
        if stage == "moments":
            return moments.astype(dtype)
        mean, std = jnp.split(moments, 2, axis=-1)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), row), flip))(rows)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return latents.sample(mean, std, noise).astype(dtype)

    def encode(params: dict[str, jax.Array], images: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
        arrays = {FORMS[stage]: stored(params, images, rows, 0)}
        if mirrored:
            arrays[FORMS[stage] + FLIPPED] = stored(params, images[:, :, ::-1], rows, 1)
        return arrays

    mesh, whole, parts = make_mesh(devices=jax.local_devices()), PartitionSpec(), PartitionSpec(BATCH_AXES)
    program = jax.jit(jax.shard_map(encode, mesh=mesh, in_specs=(whole, parts, parts), out_specs=parts))
    where = batch_sharding(mesh)
    return lambda images, rows: program(found.params, *jax.device_put((images, rows.astype(np.int32)), where))
