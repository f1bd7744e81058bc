"""Moments as REPA's preprocessing writes them, and EDM2's in the same form: a .npy file for each image.

    ROOT/vae-sd/00000/img-mean-std-00000000.npy   float32 (2C, h, w), mean then standard deviation
    ROOT/vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]}

or the same names in a zip file. REPA encodes images in -1..1 and EDM2 images in 0..1. Nothing but the numbers
says which: the statistics of the SD autoencoder are known.
Source: sihyun-yu/REPA preprocessing/dataset_tools.py; NVlabs/edm2 training/encoders.py.
"""

import dataclasses
import io
import json
import os
import struct
import weakref
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError, damaged, one_line
from ig_jax.data import statistics
from ig_jax.data.dataset import AUTO, DataConfig
from ig_jax.data.folders import check_like, checksum, opened_path, source_of, spec_of
from ig_jax.data.formats.registry import data_format
from ig_jax.data.images.listing import class_ids
from ig_jax.data.sources import Arrays, Source
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling

INDEX = "dataset.json"
STEM = "img-mean-std-"
# Of images in 0..1, at a standard deviation of 0.5. Source: NVlabs/edm2 training/encoders.py
EDM2_SCALING = LatentScaling(
    SD_VAE_SCALING.name,
    statistics.SD_VAE_OF_UNIT_IMAGES.mean,
    tuple(0.5 / std for std in statistics.SD_VAE_OF_UNIT_IMAGES.std),
    "unit",
)


def root_of(path: Path) -> Path | None:
    """The folder or zip file with the moments in or at `path`, None where there is none."""
    if path.is_file():
        return path if path.suffix == ".zip" else None
    inside = sorted(path.glob("vae-*")) if path.is_dir() else []
    for folder in [path, *inside]:
        if any(folder.glob(f"00000/{STEM}*.npy")):
            return folder
    return next((file for file in sorted(path.glob("*.zip")) if _has_moments(file)), None)


def _has_moments(file: Path) -> bool:
    """Whether the first member of a zip file has a name of this format, its directory whole or not."""
    with file.open("rb") as opened:
        return STEM.encode() in opened.read(100)


def recognise(path: Path) -> bool:
    """Whether the names are those of this format."""
    root = root_of(path)
    return root is not None and (root.is_dir() or _has_moments(root))


@data_format("repa", recognise=recognise)
def open_repa(config: DataConfig, split: str) -> Source:
    """The moments of a folder or zip file; left to "auto", those of EDM2 where the numbers are EDM2's.

    Raises: UserError naming the file that is missing, surplus or damaged.
    """
    source = open_moments(config, split)
    if config.source != AUTO:
        return source
    known = statistics.identified(source.spec, source.read(statistics.sample_rows(source)))
    if known is None:
        raise UserError(
            f"data.source={AUTO!r}: nothing in {config.folder} says whether its images were in -1..1 or 0..1",
            name="data.source",
            value=config.source,
            expected="repa (-1..1) or edm2 (0..1)",
            fix="set --config.data.source=repa (-1..1) or edm2 (0..1)",
        )
    return source if known is not statistics.SD_VAE_OF_UNIT_IMAGES else of_unit_images(source)


def of_unit_images(source: Source) -> Source:
    """The same moments as those of images in 0..1: EDM2's, with its normalisation."""
    identity = source.spec.identity.replace("repa:", "edm2:", 1)
    return dataclasses.replace(source, spec=dataclasses.replace(source.spec, scaling=EDM2_SCALING, identity=identity))


def open_moments(config: DataConfig, split: str) -> Source:
    """The source of a folder or zip file, taken for REPA's."""
    path = opened_path(config.folder, split)
    root = root_of(path)
    if root is None:
        raise damaged(path, f"holds no 00000/{STEM}00000000.npy", "name the folder or zip file of the latents")
    files = ZipMembers(root) if root.is_file() else FolderMembers(root)
    labels = _labels(files, root)
    place = lambda row: f"{root}/{files.names[row]}"
    first = files.read(0)
    template = _array(first, place(0), 0)
    identity = f"repa:{checksum(files.read_index(), first)}:{split}[{len(labels)}]"
    numbers, classes = class_ids(labels, place)
    spec = spec_of("moments", template.shape, template.dtype, identity, place(0), class_names=classes)
    header = first[: len(first) - template.nbytes]

    def read(rows: np.ndarray) -> Arrays:
        moments = np.empty((len(rows), *template.shape), template.dtype)
        for target, row in zip(moments, rows.tolist()):
            data = files.read(row)
            if len(data) == len(first) and data.startswith(header):  # nearly always
                target[...] = np.frombuffer(data, template.dtype, offset=len(header)).reshape(template.shape)
                continue
            found = _array(data, place(row), row)
            check_like(found, template, place(row), row)
            target[...] = found
        return {"moments": moments, "label": numbers[rows].astype(np.int32)}

    return source_of(spec, len(labels), read, numbers, place)


def _array(data: bytes, file: str, row: int) -> np.ndarray:
    """The array of a .npy file's bytes; nothing in them is run.  Raises: UserError naming the file."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except (ValueError, KeyError, EOFError) as error:
        raise damaged(file, f"row {row} ({len(data)} bytes) is no .npy file ({one_line(error)})") from error
    if dtype.hasobject:
        raise damaged(file, f"row {row} holds pickled objects, which are not loaded", "write it as numbers")
    wanted = stream.tell() + int(np.prod(shape)) * dtype.itemsize
    if wanted != len(data):
        raise damaged(file, f"row {row} announces {wanted} bytes and has {len(data)}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


class FolderMembers:
    """The .npy files below a folder, in the order of their names."""

    def __init__(self, root: Path):
        self._root = root
        found = []
        for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
            found += [f"{folder}/{file.name}" for file in os.scandir(root / folder) if file.name.endswith(".npy")]
        self.names = sorted(found)

    def read(self, row: int) -> bytes:
        """The bytes of one file.  Raises: UserError when it cannot be read."""
        try:
            return (self._root / self.names[row]).read_bytes()
        except OSError as error:
            raise damaged(self._root / self.names[row], f"row {row} cannot be read ({error.strerror})") from error

    def read_index(self) -> bytes:
        """The bytes of the file of labels.  Raises: UserError where there is none."""
        try:
            return (self._root / INDEX).read_bytes()
        except OSError as error:
            raise damaged(self._root / INDEX, "cannot be read: there are no labels", "copy it there") from error


class ZipMembers:
    """The .npy members of a zip file, stored or deflated, in the order of their names."""

    def __init__(self, path: Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.filename)
        except (zipfile.BadZipFile, OSError) as error:
            raise damaged(path, f"is not whole ({one_line(error)})") from error
        arrays = [member for member in members if member.filename.endswith(".npy")]
        self.names = [member.filename for member in arrays]
        twice = next((a for a, b in zip(self.names, self.names[1:]) if a == b), None)
        if twice:
            raise damaged(path, f"has the member {twice} twice")
        self._index = next((member for member in members if member.filename == INDEX), None)
        # Place, bytes, bytes once expanded, CRC-32 and method of each; a ZipInfo takes twenty times the memory.
        self._entries = np.asarray([_entry(member) for member in arrays], np.int64).reshape(-1, 5)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size

    def read(self, row: int) -> bytes:
        """The bytes of one member, checked.  Raises: UserError naming it."""
        return self._content(self.names[row], *self._entries[row].tolist())

    def read_index(self) -> bytes:
        """The bytes of the member of labels.  Raises: UserError where there is none."""
        if self._index is None:
            raise damaged(self._path, f"has no {INDEX}: there are no labels", "zip it with the arrays")
        return self._content(INDEX, *_entry(self._index))

    def _content(self, name: str, start: int, packed: int, size: int, crc: int, method: int) -> bytes:
        refusal = partial(damaged, f"{self._path}/{name}")
        header = os.pread(self._file, 30, start)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise refusal("is not where the directory of the zip file says")
        start += 30 + sum(struct.unpack("<HH", header[26:]))
        if start + packed > self._size or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refusal("runs over the end of the zip file, or is packed by an unknown method")
        data = os.pread(self._file, packed, start)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise refusal(f"cannot be expanded ({one_line(error)})") from error
        if len(data) != size:
            raise refusal(f"announces {size} bytes and has {len(data)}")
        if zlib.crc32(data) != crc:
            raise refusal("CRC-32 mismatch: its bytes have changed")
        return data


def _entry(member: zipfile.ZipInfo) -> tuple[int, int, int, int, int]:
    return member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type


def _labels(files: FolderMembers | ZipMembers, root: Path) -> list:
    """The labels in the order of the files.  Raises: UserError naming what is missing, surplus or listed twice."""
    index, content = f"{root}/{INDEX}", files.read_index()
    try:
        listed = json.loads(content)["labels"]
        pairs = None if listed is None else [(name, label) for name, label in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(index, f'is no JSON of {{"labels": [[name, label], ...]}} ({one_line(error)})') from error
    if pairs is None:
        raise damaged(index, "says that the images have no labels", "make it from images in class folders")
    labels = dict(pairs)
    if len(labels) < len(pairs):
        seen: dict = {}
        for name, label in pairs:
            if name in seen:
                raise damaged(index, f"lists {name} twice, with labels {seen[name]} and {label}", "correct it")
            seen[name] = label
    names = set(files.names)
    if missing := [name for name, _ in pairs if name not in names]:
        problem = f"is listed in {INDEX} and not there; {len(missing)} of {len(pairs)} files are missing"
        raise damaged(f"{root}/{missing[0]}", problem)
    if surplus := [name for name in files.names if name not in labels]:
        problem = f"is not listed in {INDEX}; {len(surplus)} of {len(names)} files have no label"
        raise damaged(f"{root}/{surplus[0]}", problem, "remove it, or list it")
    return [labels[name] for name in files.names]
