"""Latents of the SD autoencoder in LightningDiT's shards, normalised by the factor of the config."""

from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.ldit import open_shards
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Source


@data_format("ldit-sd")
def open_ldit_sd(config: DataConfig, split: str) -> Source:
    """The latents of a folder of shards.  Raises: UserError as `open_shards`."""
    return open_shards(config, split, "ldit-sd")
