"""Images for models of pixels, decoded as they are read: class folders, and ImageNet's other forms (data/images)."""

import itertools
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.data import crop
from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.registry import data_format
from ig_jax.data.images.decoding import decode_all
from ig_jax.data.images.listing import SPLITS, is_image
from ig_jax.data.images.opening import open_images
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import pixels

ENCODE = "encode them with ig_jax.encode, or name data.source=images to encode them in the step"
SEEN = 1000  # files of a folder that are looked at to recognise it


def recognise(path: Path) -> bool:
    """Whether a folder holds class folders of images, or one such folder for a split."""
    if (path / "dataset.json").exists():  # of EDM2, whose folders are no classes
        return False
    parts = [path, *(path / name for names in SPLITS.values() for name in names)]
    return any(is_image(file.name) for part in parts for file in itertools.islice(part.glob("*/*"), SEEN))


@data_format("images", recognise=recognise, crops=True)
def open_cropped(config: DataConfig, split: str, shape: tuple[int, int, int]) -> Source:
    """The images of config.folder, scaled and cropped to the shape (H, W, C) of the network's input, 1 or 3 channels.

    Raises: UserError for another form of images or another input; when read, naming an image that cannot be decoded.
    """
    check(config.folder != "", "data.folder", config.folder, "the folder of the images", "set --config.data.folder=DIR")
    size, _, channels = shape
    check(channels in crop.MODES, "model.channels", channels, "1 or 3 for images", ENCODE)
    images = open_images(config.folder, split)
    labels = images.labels.astype(np.int32)
    place = lambda row: f"{images.source}/{images.names[row]}"

    def read(rows: np.ndarray) -> Arrays:
        decoded, broken = decode_all(images.read, [images.places[row] for row in rows.tolist()], size, channels)
        for number, reason in broken.items():
            name = place(rows[number])
            problem = f"{name}, row {rows[number]}, cannot be decoded ({reason})"
            raise UserError(problem, name=name, fix="replace it, or take it away")
        return {"image": decoded, "label": labels[rows]}

    identity = f"images:{images.digest()[:8]}:{split}[{len(images)}]"
    spec = pixels((size, size, channels), images.class_names, config.mirrored, identity)
    return Source(spec, len(images), read, images.labels, place)
