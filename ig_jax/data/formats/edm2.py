"""Moments as EDM2's dataset_tool.py writes them: REPA's form, of images in 0..1 instead of -1..1."""

from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.registry import data_format
from ig_jax.data.formats.repa import of_unit_images, open_moments
from ig_jax.data.sources import Source


@data_format("edm2")
def open_edm2(config: DataConfig, split: str) -> Source:
    """The moments of a zip file or folder, with EDM2's normalisation.  Raises: UserError as `open_moments`."""
    return of_unit_images(open_moments(config, split))
