"""Images for models of pixels in parquet files, as Hugging Face stores them."""

from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.images import open_cropped
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Source


@data_format(
    "parquet", recognise=lambda path: any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")), crops=True
)
def open_parquet(config: DataConfig, split: str, shape: tuple[int, int, int]) -> Source:
    """The images of config.folder, or of its data/, as `open_cropped` gives them.  Raises: UserError."""
    return open_cropped(config, split, shape)
