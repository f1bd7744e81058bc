"""Labelled images that are not decoded yet, in a fixed order."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ig_jax.base.errors import UserError, damaged

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "validation": ("val", "validation")}  # -> how files and folders abbreviate it
SYNSET = re.compile(r"n\d{8}")


@dataclasses.dataclass(frozen=True)
class Images:
    """Encoded images with labels. Decoding processes are sent `read` and the places of their images, nothing else."""

    source: str  # what they are, for messages and the card
    names: Sequence[str]  # path of each image inside the source
    labels: np.ndarray  # int64 (N,), ranks among the sorted classes
    class_names: tuple[str, ...]
    synsets: tuple[str, ...]  # of each class; its name again where the source has no synsets
    places: Sequence[Any] | np.ndarray  # where the bytes of each image are, in terms of `read`
    read: Callable[[Any], list[bytes]]  # the bytes at some places
    ignored: tuple[str, ...] = ()  # files of the source that are not images

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """An identity of names, labels and their order."""
        text = "\n".join(f"{label} {name}" for name, label in zip(self.names, self.labels.tolist()))
        return hashlib.sha256(text.encode()).hexdigest()

    def histogram(self) -> np.ndarray:
        """Number of images of each class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.synsets))

    def some(self, number: int) -> "Images":
        """`number` of them, evenly spaced, so that classes stay in proportion."""
        rows = (np.arange(number) * len(self) // number).tolist()
        names, places = [self.names[row] for row in rows], [self.places[row] for row in rows]
        return dataclasses.replace(self, names=names, places=places, labels=self.labels[rows])


def classes(found: Iterable[str], words: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(synsets, class names) of the classes of a source, sorted; `words` names those that are known."""
    synsets = tuple(sorted(set(found)))
    return synsets, tuple(words.get(synset, synset) for synset in synsets)


def numbered(synsets: Sequence[str], of_images: Iterable[str]) -> np.ndarray:
    """Label of each image, from the synset of each image."""
    rank = {synset: label for label, synset in enumerate(synsets)}
    return np.asarray([rank[synset] for synset in of_images], np.int64)


def class_ids(labels: Sequence[Any], place: Callable[[int], str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels int64 (N,), class names) of labels that are whole numbers, without names, or text, numbered as sorted.

    Raises: UserError naming the place of the first that is neither.
    """
    if labels and all(isinstance(label, str) for label in labels):
        found, _ = classes(labels, {})
        return numbered(found, labels), found
    for row, label in enumerate(labels):
        if not isinstance(label, int | float) or isinstance(label, bool) or label != label // 1:
            raise damaged(place(row), f"has label {label!r}, which is no whole number", "label every image, or none")
    return np.asarray(labels, np.int64), ()


def label_numbers(labels: Sequence[int | str], names: Sequence[str], source: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """As `class_ids`, with names for numbers too.  Raises: UserError, also naming an image with a negative one."""
    values, found = class_ids(labels, lambda row: names[row])
    for row in np.flatnonzero(values < 0).tolist():
        fix = f"choose a labelled split of {source}"
        raise UserError(name=f"label of {names[row]}", value=labels[row], expected="0 or more", fix=fix)
    return values, found or tuple(map(str, range(int(values.max(initial=-1)) + 1)))


def names_of(split: str) -> tuple[str, ...]:
    """What folders and files call a split."""
    return SPLITS.get(split, (split,))


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(EXTENSIONS)
