"""What comes next to ImageNet's images: class names, and the labels of the flat validation set.

Kaggle's download has LOC_synset_mapping.txt and LOC_val_solution.csv, image-net.org the ILSVRC2012_devkit_t12.
"""

import csv
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ig_jax.base.errors import damaged, one_line

MAPPING, SOLUTION, DEVKIT = "LOC_synset_mapping.txt", "LOC_val_solution.csv", "ILSVRC2012_devkit_t12"
LEVELS = 5  # Kaggle's files lie four folders above its validation images


class Devkit(NamedTuple):
    """words: synset -> class name; validation: synset of each validation image, in the order of their numbers."""

    words: dict[str, str]
    validation: list[str]


def class_words(folder: Path) -> dict[str, str]:
    """synset -> class name, from the mapping or devkit in `folder` or above it; empty where there is none."""
    for file in _nearby(folder, MAPPING):
        lines = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
        return {line[0]: line[-1].strip() for line in lines}
    devkit = find_devkit(folder)
    return devkit.words if devkit else {}


def validation_synsets(folder: Path) -> tuple[dict[str, str], set[str]]:
    """(stem of a validation image -> its synset, all synsets), from Kaggle's solution or the devkit.

    Raises: UserError when neither lies in `folder` or above it, or it is damaged.
    """
    for file in _nearby(folder, SOLUTION):
        with file.open(newline="") as opened:
            rows = list(csv.reader(opened))
        if not rows or rows[0] != ["ImageId", "PredictionString"]:
            raise damaged(file, "does not start with ImageId,PredictionString", "download it again")
        found = {image: boxes.split()[0] for image, boxes in rows[1:]}
        return found, set(class_words(folder)) or set(found.values())
    devkit = find_devkit(folder)
    if devkit is None:
        fix = f"put Kaggle's {SOLUTION} or {DEVKIT}.tar.gz next to them"
        raise damaged(folder, "holds validation images without labels", fix)
    names = (f"ILSVRC2012_val_{number:08d}" for number in range(1, len(devkit.validation) + 1))
    return dict(zip(names, devkit.validation)), set(devkit.words)


def find_devkit(folder: Path) -> Devkit | None:
    """The devkit in `folder` or above it, as a .tar.gz or extracted.  Raises: UserError when it is damaged."""
    metadata, truth = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
    for file in _nearby(folder, DEVKIT):
        return _devkit(file, (file / metadata).read_bytes(), (file / truth).read_bytes())
    for file in _nearby(folder, f"{DEVKIT}.tar.gz"):
        try:
            with tarfile.open(file) as archive:
                parts = {member.name.partition("/")[2]: member for member in archive}
                contents = [archive.extractfile(parts[name]) for name in (metadata, truth)]
                return _devkit(file, *(content.read() for content in contents if content))
        except (OSError, EOFError, LookupError, tarfile.TarError) as error:
            raise damaged(file, f"cannot be read ({one_line(error)})", "download it again") from error
    return None


def _devkit(file: Path, metadata: bytes, truth: bytes) -> Devkit:
    from scipy.io import loadmat  # late: it takes long to import

    try:
        rows = loadmat(io.BytesIO(metadata), squeeze_me=True)["synsets"]
        leaves = [row for row in rows if not row["num_children"]]  # the rest are groups of classes
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        return Devkit(words, [synsets[int(number)] for number in truth.split()])
    except Exception as error:  # of many types
        raise damaged(file, f"cannot be read ({one_line(error)})", "download it again") from error


def _nearby(folder: Path, name: str) -> Iterator[Path]:
    """`name` in the folder and in those above it, where it exists."""
    for place in [folder, *folder.parents][:LEVELS]:
        if (place / name).exists():
            yield place / name
