"""Sources: labelled examples with random access, opened by the formats in data/formats/."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.data.spec import BatchSpec

Arrays = dict[str, np.ndarray]  # by the names of BatchSpec.arrays, each with a leading batch axis


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Source:
    """Random access to labelled examples.

    Attributes:
        spec: what a batch holds.
        length: number of examples.
        read: rows int (B,) -> the arrays of those rows, in that order.
        labels: (N,) of all rows, where they are known without reading everything.
        place: row -> the file it is in, for errors.
        class_counts: images of each class, where the labels are not known but these are.
    """

    spec: BatchSpec
    length: int
    read: Callable[[np.ndarray], Arrays]
    labels: np.ndarray | None = None
    place: Callable[[int], str] | None = None
    class_counts: np.ndarray | None = None

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return self.spec.identity

    def gather(self, rows: np.ndarray) -> Arrays:
        """The batch of `rows` int (B,): the arrays of `spec`.

        Raises: UserError when a record cannot be read or its label is outside 0..num_classes-1.
        """
        batch = self.read(rows)
        self._check_labels(batch["label"], rows)
        return batch

    def check_labels(self) -> None:
        """Check all labels, where they are known.  Raises: UserError for one outside 0..num_classes-1."""
        if self.labels is not None:
            self._check_labels(self.labels, np.arange(len(self)))

    def empty_classes(self) -> list[str]:
        """The names of classes without an image, as far as the labels are known."""
        counts = self.class_counts
        if self.labels is not None:
            counts = np.bincount(self.labels, minlength=self.spec.num_classes)
        return [] if counts is None else [self.spec.class_names[label] for label in np.flatnonzero(counts == 0)]

    def _check_labels(self, labels: np.ndarray, rows: np.ndarray) -> None:
        classes = self.spec.num_classes
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if bad.size:
            label, row = int(labels[bad[0]]), int(rows[bad[0]])
            place = f"{self.place(row)}, " if self.place else ""
            raise UserError(
                f"label={label} of {place}row {row} of {self!r} must be in 0..{classes - 1}",
                name="label",
                value=label,
                expected=f"in 0..{classes - 1}",
                fix="choose a split that has labels, or set model.num_classes",
            )


def in_memory(source: Source) -> Source:
    """The same data, read and decoded once into arrays; for sets that fit in memory."""
    arrays = {name: np.empty(form.shape, form.dtype) for name, form in source.spec.abstract(len(source)).items()}
    for rows in np.array_split(np.arange(len(source)), math.ceil(len(source) / 1024)):
        for name, values in source.gather(rows).items():
            arrays[name][rows] = values
    read = lambda rows: {name: values[rows] for name, values in arrays.items()}
    return dataclasses.replace(source, read=read, labels=arrays["label"])


def pad(source: Source, pixels: int) -> Source:
    """The same images with `pixels` zeros added on each of the four sides (28 becomes 32 with 2).

    Raises: UserError for latents, which a wider image would change.
    """
    check(isinstance(pixels, int) and pixels >= 0, "pad", pixels, "a whole number of pixels, 0 or more")
    if pixels == 0:
        return source
    check(source.spec.holds == "pixels", "pad", pixels, f"0 for {source.spec.holds}", "pad images before encoding them")
    height, width, channels = source.spec.latent_shape

    def read(rows: np.ndarray) -> Arrays:
        batch = source.read(rows)
        return batch | {"image": np.pad(batch["image"], ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))}

    spec = dataclasses.replace(
        source.spec,
        identity=f"{source!r}:pad{pixels}",
        latent_shape=(height + 2 * pixels, width + 2 * pixels, channels),
    )
    return dataclasses.replace(source, spec=spec, read=read)
