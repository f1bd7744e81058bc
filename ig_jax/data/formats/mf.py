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
from dataclasses import dataclass
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
    form = _Form.of((folder / names[0]).read_bytes(), template)
    identity = f"mf:{checksum(template.tobytes())}:{split}[{len(names)}]"
    spec = spec_of("moments", template.shape, template.dtype, identity, place(0))

    def read(rows: np.ndarray) -> Arrays:
        moments, labels = np.empty((len(rows), *template.shape), template.dtype), np.empty(len(rows), np.int32)
        for index, row in enumerate(rows.tolist()):
            label = form.read(folder / names[row], moments[index]) if form else None
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


@dataclass(frozen=True)
class _Form:
    """The first file, by which others are read that differ from it in their numbers alone, forty times as fast."""

    content: bytes
    same: list[slice]  # the pickle, which names keys, shapes and strides, and the sizes of headers
    image: slice
    label: slice
    sums: list[tuple[slice, slice]]  # (numbers, their CRC-32)
    stored: tuple[int, ...]  # the shape in which the numbers of the image lie, and
    axes: tuple[int, ...]  # how it is transposed
    dtype: np.dtype

    @classmethod
    def of(cls, content: bytes, image: np.ndarray) -> "_Form | None":
        """The form of a file whose image is known; None for one in which the numbers cannot be told apart."""
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        places = {}
        for info in entries.values():
            start = info.header_offset + 30 + sum(struct.unpack_from("<2H", content, info.header_offset + 26))
            places[info] = slice(start, start + info.file_size)
        storages = [info for name, info in entries.items() if name.startswith("data/")]
        images = [info for info in storages if info.file_size == image.nbytes]
        labels = [info for info in storages if info.file_size == 8]
        if len(storages) != 2 or len(images) != 1 or len(labels) != 1:
            return None
        numbers = np.frombuffer(content[places[images[0]]], image.dtype)
        matching = []
        for order in itertools.permutations(range(3)):
            stored, axes = tuple(image.shape[axis] for axis in order), tuple(np.argsort(order).tolist())
            if (numbers.reshape(stored).transpose(axes) == image).all():
                matching.append((stored, axes))
        if len(matching) != 1 or any(info.compress_type for info in entries.values()):
            return None
        headers = [slice(info.header_offset + 26, info.header_offset + 30) for info in storages]
        fixed = [places[info] for name, info in entries.items() if name in ("data.pkl", "byteorder")]
        # The last place of each sum is in the directory, which ends the file.
        sums = [content.rfind(info.CRC.to_bytes(4, "little")) for info in storages]
        checked = [(places[info], slice(at, at + 4)) for info, at in zip(storages, sums)]
        place, label = places[images[0]], places[labels[0]]
        return cls(content, [*fixed, *headers], place, label, checked, *matching[0], image.dtype)

    def read(self, file: Path, target: np.ndarray) -> int | None:
        """Read the image into `target` and return the label; None for a file of another form, or a damaged one."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise damaged(file, f"cannot be read ({error.strerror})") from error
        if len(content) != len(self.content) or any(content[at] != self.content[at] for at in self.same):
            return None
        if any(zlib.crc32(content[at]) != int.from_bytes(content[crc], "little") for at, crc in self.sums):
            return None
        numbers = np.frombuffer(content, self.dtype, target.size, self.image.start)
        target[...] = numbers.reshape(self.stored).transpose(self.axes)
        return int.from_bytes(content[self.label], "little", signed=True)
