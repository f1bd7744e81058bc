"""Folders of images: class folders, and Kaggle's layout with its flat validation folder."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ig_jax.base.errors import damaged, one_line
from ig_jax.data.images import imagenet
from ig_jax.data.images.listing import SPLITS, Images, classes, is_image, names_of, numbered

KAGGLE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # where a download holds its parts


def open_folder(root: Path, split: str) -> Images:
    """The images below `root`: class folders, or a folder of them for each split; names are relative to it.

    The flat validation folder of ImageNet takes its labels from Kaggle's solution or the devkit.
    Raises: UserError for another layout.
    """
    part = _part(root, split)
    entries = sorted(part.iterdir())
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    beside = [entry.name for entry in entries if entry.name not in folders]
    flat = [name for name in beside if is_image(name)]
    if flat and folders:
        raise damaged(part / flat[0], "is an image beside the class folders", "move it into one of them")
    if flat:
        return _flat_validation(root, part, flat, [name for name in beside if not is_image(name)])
    if not folders:
        raise damaged(part, "holds no class folders", "name the folder that holds one folder for each class")
    synsets, class_names = classes(folders, imagenet.class_words(part))
    names: list[str] = []
    labels: list[int] = []
    ignored = beside
    for label, folder in enumerate(synsets):
        files = _files(part / folder)
        found = [file for file in files if is_image(file)]
        ignored += [f"{folder}/{file}" for file in files if not is_image(file)]
        names += [f"{folder}/{file}" for file in found]
        labels += [label] * len(found)
    if not names:
        raise damaged(part, "holds class folders without images", "name the folder of the images")
    read = functools.partial(read_files, part)
    return Images(str(part), names, np.asarray(labels), class_names, synsets, names, read, tuple(ignored))


def find_part(root: Path, split: str) -> Path | None:
    """The folder of a split in `root`, as extracted or as Kaggle has it; None where there is none."""
    places = (root / below / name for below in KAGGLE for name in names_of(split))
    return next((place for place in places if place.is_dir()), None)


def _part(root: Path, split: str) -> Path:
    """The folder of a split: `root` itself where it is not divided into splits."""
    found = find_part(root, split)
    if found is None and any(find_part(root, other) for other in SPLITS):
        raise damaged(root, f"has no folder {' or '.join(names_of(split))}", "choose another split")
    return found or root


def _files(folder: Path) -> list[str]:
    """The files below a folder, sorted by their parts, relative to it."""
    found = [
        os.path.relpath(os.path.join(place, file), folder)
        for place, _, files in os.walk(folder, followlinks=True)
        for file in files
    ]
    return sorted(found, key=lambda name: name.split(os.sep))


def _flat_validation(root: Path, part: Path, names: list[str], ignored: list[str]) -> Images:
    found, all_synsets = imagenet.validation_synsets(part)
    unknown = next((name for name in names if Path(name).stem not in found), None)
    if unknown is not None:
        raise damaged(part / unknown, "has no label in the list of the validation images", "take it away")
    of_images = [found[Path(name).stem] for name in names]
    beside = part.with_name("train")  # with a part of the classes, both splits must number them alike
    trained = {entry.name for entry in beside.iterdir() if entry.is_dir()} if beside.is_dir() else set()
    synsets, class_names = classes(trained if trained >= set(of_images) else all_synsets, imagenet.class_words(part))
    read = functools.partial(read_files, part)
    labels = numbered(synsets, of_images)
    return Images(str(part), names, labels, class_names, synsets, names, read, tuple(ignored))


def read_files(root: Path, names: Sequence[str]) -> list[bytes]:
    """The contents of files below `root`.  Raises: UserError naming one that cannot be read."""
    contents = []
    for name in names:
        try:
            contents.append((root / name).read_bytes())
        except OSError as error:
            raise damaged(root / name, f"cannot be read ({one_line(error)})", "check the disk") from error
    return contents
