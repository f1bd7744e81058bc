"""Sets of images to measure, read in order and never held at once: a folder, an npz in ADM's form, any data source."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import UserError, check, one_line
from ig_jax.data.images.decoding import decode_all
from ig_jax.data.images.listing import is_image
from ig_jax.data.images.opening import open_images

METADATA, ARCHIVE = "recipe.json", "samples.npz"  # of a folder that `sample` wrote
OWN = re.compile(r"\d{6}\.png")
THREADS = 4  # that read files ahead
AHEAD = 64  # files
DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images uint8 (H, W, C) of one shape, with 1 or 3 channels."""

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[int], Iterator[np.ndarray]]  # from this index on, one by one
    digest: str  # sha256 of the file, or of names and sizes of files
    made: dict[str, Any] | None = None  # what `sample` says of its samples
    notes: tuple[tuple[str, str], ...] = ()  # (name, text) of what may make a number another one

    def batches(self, start: int, size: int, stop: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices (b,), images uint8 (b, H, W, C)) of the images from `start` to `stop`."""
        count = self.count if stop is None else min(stop, self.count)
        images = self.read(start)
        for first in range(start, count, size):
            part = list(itertools.islice(images, min(size, count - first)))
            yield np.arange(first, first + len(part)), np.stack(part)


def open_set(text: str, flag: str, size: int = 0, split: str = "train") -> ImageSet:
    """The images that a flag names: a folder of images, an npz with `arr_0`, or any source that `encode` reads.

    size: pixels to which the images of such a source are cropped.  Raises: UserError for anything else.
    """
    path = None if text.startswith("tfds:") else local_copy(text, flag)
    if path is not None and path.is_dir() and not size:
        return _of_folder(path, flag)
    if path is not None and path.suffix == ".npz":
        return of_npz(path, flag)
    expected = "an existing folder of images, an npz with arr_0, or with --size a source that encode reads"
    check(size > 0 and (path is None or path.exists()), flag, text, expected)
    return _of_source(text, size, split)


def _of_folder(folder: Path, flag: str) -> ImageSet:
    """Of a folder that `sample` wrote only its samples; of any other folder all images."""
    made = _metadata(folder)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    names = [name for name in names if (OWN.fullmatch(name) if made else is_image(name))]
    if not names and (folder / ARCHIVE).is_file():
        return dataclasses.replace(of_npz(folder / ARCHIVE, flag), made=made)
    check(len(names) > 0, flag, str(folder), "a folder with images in it", "give the folder of the files themselves")
    if made:
        check(
            len(names) == made["num"],
            f"{flag} images",
            len(names),
            f"the {made['num']} of its {METADATA}",
            "sample again",
        )
    first = _picture(folder / names[0])

    def read(start: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for at in range(start, len(names), AHEAD):
                for name, image in zip(names[at:], pool.map(_picture, [folder / n for n in names[at : at + AHEAD]])):
                    check(
                        image.shape == first.shape,
                        f"{folder / name} shape",
                        image.shape,
                        f"{first.shape}, as the first",
                    )
                    yield image

    lossy = sum(not name.lower().endswith((".png", ".ppm", ".pgm", ".bmp")) for name in names)
    notes = (("jpeg", f"{lossy} of the images are JPEG or WebP files, whose losses raise FID"),) if lossy else ()
    listing = json.dumps([(name, (folder / name).stat().st_size) for name in names])
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return ImageSet(str(folder), len(names), first.shape, read, digest, made, notes)


def _metadata(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / METADATA).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(name=str(folder / METADATA), value=one_line(error), expected="readable") from error
    return found if isinstance(found, dict) and "num" in found else None


def _picture(path: Path) -> np.ndarray:
    """An image file as uint8 (H, W, 3); grey as three equal channels, as all evaluators read it."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # of many types; Pillow's decoders trust their input
        raise UserError(f"{path} cannot be decoded ({one_line(error)})", name=str(path), fix="replace it") from error


def of_npz(path: Path, flag: str) -> ImageSet:
    """The images `arr_0` of an npz, with labels `arr_1` or without.  Raises: UserError for another range or layout."""
    try:
        with zipfile.ZipFile(path) as archive:
            shape, fortran, dtype = _header(archive, "arr_0.npy")
            labels = _header(archive, "arr_1.npy")[0] if "arr_1.npy" in archive.namelist() else shape[:1]
    except DAMAGE as error:
        raise unreadable(path, flag, error) from error
    expected = "uint8 in 0..255; numbers in 0..1 or -1..1 would give a number and a wrong one"
    check(dtype == np.uint8, f"{flag} arr_0 dtype", str(dtype), expected, "save the images as uint8")
    known = len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0
    check(known, f"{flag} arr_0 shape", shape, "(N, H, W, 3), or (N, H, W, 1) for grey images, with N > 0")
    check(labels[:1] == shape[:1], f"{flag} arr_1 shape", labels, f"({shape[0]},), one label for each image")

    def read(start: int) -> Iterator[np.ndarray]:
        try:
            if fortran:
                with np.load(path, allow_pickle=False) as archive:
                    yield from archive["arr_0"][start:]
                return
            size = math.prod(shape[1:])
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                _read_header(member)
                for index in range(shape[0]):
                    data = member.read(size)
                    if index >= start:
                        yield np.frombuffer(data, np.uint8).reshape(shape[1:])
        except DAMAGE as error:
            raise unreadable(path, flag, error) from error

    return ImageSet(str(path), shape[0], (shape[1], shape[2], shape[3]), read, sha256(path))


def _header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(member) as file:
        return _read_header(file)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an array in the npy format."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def unreadable(path: Path, flag: str, error: Exception) -> UserError:
    """The error of a damaged file, for the caller to raise."""
    what = f"{path} cannot be read: it is damaged or no npz ({one_line(error)})"
    return UserError(what, name=flag, value=str(path), fix="download or copy the file again")


def sha256(path: Path) -> str:
    """The sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_source(text: str, size: int, split: str) -> ImageSet:
    """The centre crops of a source of images, as `encode` makes them."""
    images = open_images(text, split)

    def read(start: int) -> Iterator[np.ndarray]:
        for at in range(start, len(images), AHEAD):
            decoded, broken = decode_all(images.read, list(images.places[at : at + AHEAD]), size, 3)
            for number, reason in broken.items():
                name = f"{images.source}/{images.names[at + number]}"
                raise UserError(f"{name} cannot be decoded ({reason})", name=name, fix="replace it, or take it away")
            yield from decoded

    return ImageSet(images.source, len(images), (size, size, 3), read, images.digest())
