"""Small folders of latents that published code has written, and how tests open them."""

from pathlib import Path

import numpy as np

from ig_jax.data import dataset
from ig_jax.data.dataset import DataConfig
from ig_jax.models.latents import SD_VAE_SCALING, identity

LATENTS = Path(__file__).parent / "data" / "latents"


def config(folder, source: str = "auto", **changes) -> DataConfig:
    """The data section of an ImageNet config."""
    fields = dict(name="", split="train", test_split="validation", batch_size=4, pad=0, in_memory=False)
    open_fields = dict(holds="auto", dtype="auto", mirrored="auto")
    return DataConfig(source=source, folder=str(folder), **fields | open_fields | changes)


def opened(folder, source="auto", *, side=32, channels=4, scaling=None, classes=1000, split="train", **changes):
    """The source of a folder, for a model of `side` x `side` x `channels` and the config of its family."""
    if scaling is None:
        scaling = SD_VAE_SCALING if channels == 4 else identity(f"va_vae_f16d{channels}", channels, "half")
    data = config(folder, source, **changes)
    return dataset.open_split(data, split, data.spec((side, side, channels), scaling, classes))


def every(source):
    """All arrays of a source."""
    return source.gather(np.arange(len(source)))
