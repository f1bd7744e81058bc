"""Which labelled images an experiment uses, and how they are opened."""

import dataclasses

from ig_jax.data import sources
from ig_jax.errors import check


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where labelled images come from."""

    source: str  # "tfds" | "idx" (a folder with the four MNIST-style .gz files)
    name: str  # TFDS name, for source "tfds"
    folder: str  # TFDS data directory ("" for the TFDS default), or the IDX folder
    split: str  # to train on
    test_split: str  # held out, for evaluation
    batch_size: int  # global, images a step
    pad: int  # zero pixels added on each side
    in_memory: bool  # decode everything once (small sets)

    def __post_init__(self):
        check(self.source in ("tfds", "idx"), "source", self.source, "tfds or idx")
        check(self.source != "tfds" or self.name, "name", self.name, "a TFDS data set name")
        check(self.source != "idx" or self.folder, "folder", self.folder, "the folder of the IDX files",
              "set --config.data.folder")
        for name in ("split", "test_split"):
            check(getattr(self, name) != "", name, getattr(self, name), "a split name")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 image")
        check(self.pad >= 0, "pad", self.pad, "at least 0 pixels")


def open_split(config: DataConfig, split: str, image_shape: tuple[int, int, int], num_classes: int):
    """The ImageSource of one split, with the shape and classes a model wants.

    Raises: UserError when the data cannot be opened or do not fit the model.
    """
    if config.source == "tfds":
        source = sources.open_tfds(config.name, split, config.folder or None)
    else:
        source = sources.open_idx(config.folder, split)
    source = sources.pad(source, config.pad) if config.pad else source
    check(tuple(source.image_shape) == image_shape, "data image shape", tuple(source.image_shape),
          f"{image_shape}, the model's input_size and channels", "set data.pad or the model's input_size")
    check(source.num_classes == num_classes, "model.num_classes", num_classes,
          f"{source.num_classes}, the classes of {source.identity}")
    return sources.in_memory(source) if config.in_memory else source
