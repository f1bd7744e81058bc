"""Moments as MeanFlow's prepare_dataset.py writes them: a torch file for each image.

    ROOT/train/00000000.pt   {"image": float32 (2C, h, w), mean then standard deviation; "label": int64 ()}

The numbers of an image are not stored in the order of its axes; the reader of weight files honours the strides.
Source: Gsunshine/meanflow utils/data_util.py.
"""

import io
import itertools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError, damaged
from ig_jax.data.dataset import DataConfig
from ig_jax.data.folders import check_like, checksum, listing, opened_path, source_of, spec_of
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Arrays, Source
from ig_jax.weightfiles.files import LazyTensor, open_weights
from ig_jax.weightfiles.sets import choose

_NUMBERED = re.compile(r"\d{8}\.pt")
KEYS = ("image", "label")


def recognise(path: Path) -> bool:
    """Whether a folder or its train/ has numbered torch files."""
    return any((folder / "00000000.pt").is_file() for folder in (path, path / "train"))


@data_format("mf", recognise=recognise)
def open_mf(config: DataConfig, split: str) -> Source:
    """The moments of a folder.  Raises: UserError naming the file that is missing, surplus or damaged."""
    folder = opened_path(config.folder, split)
    names = listing(folder, ".pt")
    for row, name in enumerate(names):
        if not _NUMBERED.fullmatch(name):
            raise damaged(folder / name, "is no numbered file: its image would be read twice", "move it elsewhere")
        if int(name[:8]) != row:
            raise damaged(folder / f"{row:08d}.pt", f"is missing, and {name} is there")
    if not names:
        raise damaged(folder, "holds no 00000000.pt", "name the folder of the latents")
    place = lambda row: str(folder / names[row])
    template, _ = _example(folder / names[0], 0)
    quick = _quick_reader((folder / names[0]).read_bytes(), template)
    identity = f"mf:{checksum(template.tobytes())}:{split}[{len(names)}]"
    spec = spec_of("moments", template.shape, template.dtype, identity, place(0))

    def read(rows: np.ndarray) -> Arrays:
        moments, labels = np.empty((len(rows), *template.shape), template.dtype), np.empty(len(rows), np.int32)
        for index, row in enumerate(rows.tolist()):
            label = quick(folder / names[row], moments[index])
            if label is not None:  # nearly always
                labels[index] = label
                continue
            image, labels[index] = _example(folder / names[row], row)
            check_like(image, template, place(row), row)
            moments[index] = image
        return {"moments": moments, "label": labels}

    return source_of(spec, len(names), read, None, place)


def _example(file: Path, row: int) -> tuple[np.ndarray, int]:
    """(moments (2C, h, w), label) of one file.  Raises: UserError naming the file and what it lacks."""
    with open_weights(file) as weights:
        tensors: dict[str, LazyTensor] = choose(weights, "").tensors
        for key in KEYS:
            if key not in tensors:
                raise damaged(file, f"row {row} has no {key!r}, only {', '.join(sorted(tensors))}")
        label = tensors["label"].read()
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UserError(f"{file}: row {row} has the label {label!r}", name=str(file), fix="label it by a number")
        return tensors["image"].read(), int(label.item())


def _quick_reader(content: bytes, image: np.ndarray) -> Callable[[Path, np.ndarray], int | None]:
    """A function that reads files which differ from the first in their numbers alone, much faster than `_example`.

    It fills an array with the image and returns the label, or None for a file of another form, or a damaged one.
    content, image: of the first file.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    places = {}
    for name, info in entries.items():
        start = info.header_offset + 30 + sum(struct.unpack_from("<2H", content, info.header_offset + 26))
        places[name] = slice(start, start + info.file_size)
    storages = {name: info for name, info in entries.items() if name.startswith("data/")}
    by_size = {info.file_size: places[name] for name, info in storages.items()}
    numbers, label = (by_size.get(size, slice(0)) for size in (image.nbytes, 8))
    orders = [o for o in itertools.permutations(range(3)) if image.transpose(o).tobytes() == content[numbers]]
    plain = not any(info.compress_type for info in entries.values())
    if not plain or len(storages) != 2 or by_size.keys() != {8, image.nbytes} or len(orders) != 1:
        return lambda file, target: None
    # The pickle, which names keys, shapes and strides, and the sizes of headers.
    same = [place for name, place in places.items() if name in ("data.pkl", "byteorder")]
    same += [slice(info.header_offset + 26, info.header_offset + 30) for info in storages.values()]
    # The last place of each CRC-32 is in the directory, which ends the file.
    sums = [(places[name], content.rfind(info.CRC.to_bytes(4, "little"))) for name, info in storages.items()]
    stored, axes = image.transpose(orders[0]).shape, np.argsort(orders[0])

    def read(file: Path, target: np.ndarray) -> int | None:
        try:
            found = file.read_bytes()
        except OSError as error:
            raise damaged(file, f"cannot be read ({error.strerror})") from error
        if len(found) != len(content) or any(found[at] != content[at] for at in same):
            return None
        if any(zlib.crc32(found[at]) != int.from_bytes(found[crc : crc + 4], "little") for at, crc in sums):
            return None
        target[...] = np.frombuffer(found[numbers], image.dtype).reshape(stored).transpose(axes)
        return int.from_bytes(found[label], "little", signed=True)

    return read
