"""The built-in data set, a TFDS builder of 1,797 real handwritten digits of 8x8 pixels (see DIGITS.md)."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

TEST_IMAGES_PER_CLASS = 36
_ARCHIVE = Path(__file__).with_name("digits.npz")


def load_arrays() -> tuple[np.ndarray, np.ndarray]:
    """All digits in UCI file order: images uint8 (1797, 8, 8, 1) in 0..255, labels int64 (1797,) in 0..9."""
    with np.load(_ARCHIVE) as archive:
        counts, labels = archive["images"], archive["labels"]
    # UCI counts the inked pixels of a 4x4 block, 0..16; 255/16 spreads that over the whole uint8 range.
    images = np.rint(counts[..., None] * (255 / 16)).astype(np.uint8)
    return images, labels.astype(np.int64)


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `labels` (N,) in "train" and "test", ascending; test has 36 of every class.

    The test images of a class are evenly spaced in the file, which is sorted by writer: both splits see every
    writer, and no random generator can change the split.
    """
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held_out[rows[np.arange(TEST_IMAGES_PER_CLASS) * len(rows) // TEST_IMAGES_PER_CLASS]] = True
    return {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}


class IgDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder "ig_digits": image uint8 (8, 8, 1) in 0..255, label 0..9; train 1,437 and test 360."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor, not Image: 64 bytes gain nothing from PNG, and writing PNG would import TensorFlow.
        image, label = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8), tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            description="UCI optical recognition of handwritten digits (test part), 8x8 grey images.",
            homepage="https://doi.org/10.24432/C50P49",
            license="CC BY 4.0",
            disable_shuffling=True,  # record i of a split is its i-th row of the archive
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the archive ships with the package
        images, labels = load_arrays()
        return {name: self._generate_examples(images, labels, rows) for name, rows in split_indices(labels).items()}

    def _generate_examples(self, images, labels, rows):
        for row in rows.tolist():
            yield row, {"image": images[row], "label": int(labels[row])}
