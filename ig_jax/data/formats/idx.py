"""MNIST-style IDX files: a folder with the four files of a data set, compressed or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.data.dataset import DataConfig
from ig_jax.data.folders import existing_path
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file, whatever its name
MAX_IDX_BYTES = 2**31  # an IDX file is held in memory; a header that asks for more is damaged or hostile


@data_format("idx")
def open_idx(config: DataConfig, split: str) -> Source:
    """The images of config.folder, split "train" or "test", as uint8 (H, W, 1) held in memory.

    Raises: UserError naming the file that is missing, damaged or does not fit the others.
    """
    check(split in IDX_FILES, "split", split, f"one of {sorted(IDX_FILES)} for IDX files")
    root = existing_path(config.folder)
    files = {part: [_file(root, name) for name in names] for part, names in IDX_FILES.items()}
    images_file, labels_file = files[split]
    images, labels = _read_idx(images_file, rank=3)[..., None], _read_idx(labels_file, rank=1)
    if len(images) != len(labels):
        problem = f"holds {len(images)} images but {labels_file.name} holds {len(labels)} labels"
        raise _unusable(images_file, problem, "both must come from the same data set")
    # The files do not say how many classes there are: both splits together show every label.
    classes = 1 + max(int(_read_idx(labels_file, rank=1).max()) for _, labels_file in files.values())
    checksum = zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes()))
    labels = labels.astype(np.int32)
    class_names = tuple(map(str, range(classes)))
    identity = f"idx:{checksum:08x}:{split}[{len(images)}]"
    return Source(
        spec=pixels(images.shape[1:], class_names, config.mirrored, identity),
        length=len(images),
        read=lambda rows: {"image": images[rows], "label": labels[rows]},
    )


def _file(root: Path, name: str) -> Path:
    """The file of that name, with a dot before "idx" or a hyphen, with the ending .gz or without it."""
    found = [root / f"{spelling}{gz}" for gz in (".gz", "") for spelling in (name, name.replace("-idx", ".idx"))]
    for path in found:
        if path.is_file():
            return path
    raise _unusable(found[0], "is missing", f"{root} must hold the four files of a data set, with .gz or without")


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array with `rank` dimensions in an IDX file, never reading more than it announces.

    Raises: UserError on a bad magic number, impossible sizes, missing or surplus bytes, or broken gzip.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == GZIP
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            header, magic = file.read(4 * (1 + rank)), bytes([0, 0, 8, rank])  # uint8 data, and big-endian sizes
            if len(header) != 4 * (1 + rank) or header[:4] != magic:
                expected = f"{magic.hex()!r} and {rank} sizes (uint8 data of {rank} dimensions)"
                raise _unusable(path, f"starts with {header[:4].hex()!r}, expected {expected}")
            shape = struct.unpack(f">{rank}I", header[4:])
            if not 0 < math.prod(shape) <= MAX_IDX_BYTES:
                raise _unusable(path, f"announces sizes {shape}, expected 1 to {MAX_IDX_BYTES} bytes")
            size = math.prod(shape)
            content = file.read(size + 1)  # one more than announced: also makes gzip verify its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, f"cannot be read ({one_line(error)})") from error
    if len(content) != size:
        found = f"only {len(content)}" if len(content) < size else "more"
        raise _unusable(path, f"announces {size} bytes of data and holds {found}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _unusable(path: Path, problem: str, fix: str = "download it again") -> UserError:
    return UserError(f"IDX file {path} {problem}", name=str(path), fix=fix)
