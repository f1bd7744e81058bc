"""Image files, sample archives and grids of images.

Images are uint8 (H, W, C), with C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA).
"""

import itertools
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from ig_jax.base.errors import check
from ig_jax.base.files import atomic_file

CHANNELS = (1, 2, 3, 4)
COMFORTABLE = 48  # pixels: the side at which the strokes of an 8x8 digit are easy to judge


def comfortable_zoom(side: int) -> int:
    """The factor that enlarges images of `side` pixels to a size that is easy to look at."""
    return max(1, round(COMFORTABLE / side))


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write one image as a PNG.

    Raises: UserError for another shape or dtype, or if the file cannot be written.
    """
    check(image.dtype == np.uint8, "image.dtype", str(image.dtype), "uint8")
    known = image.ndim == 3 and image.shape[-1] in CHANNELS
    check(known, "image.shape", image.shape, "(H, W, C) with C = 1, 2, 3 or 4")
    with atomic_file(path) as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")


def write_npz(path: str | os.PathLike, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write samples in the layout FID tools read: `arr_0` uint8 (N, H, W, C), `arr_1` int64 (N,), uncompressed.

    images: uint8 (H, W, C) one by one, or an array of them, one for each label; never held all at once.
    Grey ones become three equal channels, as these tools want them.
    Raises: UserError if their shapes, dtypes or numbers disagree, or the file cannot be written.
    """
    labels = np.asarray(labels)
    whole = labels.ndim == 1 and labels.size > 0 and np.issubdtype(labels.dtype, np.integer)
    check(whole, "labels", f"{labels.dtype} {labels.shape}", "integers (N,), at least one")
    count, images = 0, map(three_channels, images)
    first = next(images)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for image in itertools.chain([first], images):
                check(image.dtype == np.uint8, "image.dtype", str(image.dtype), "uint8")
                check(image.shape == first.shape, "image.shape", image.shape, f"that of the first image, {first.shape}")
                member.write(image.tobytes())
                count += 1
        check(count == len(labels), "labels", len(labels), f"one for each of the {count} images")
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels.astype(np.int64))


def three_channels(image: np.ndarray) -> np.ndarray:
    """A grey image (H, W, 1) as three equal channels; any other as it is."""
    return image.repeat(3, -1) if image.ndim == 3 and image.shape[-1] == 1 else image


def read_npz(file: str | os.PathLike | BinaryIO) -> Iterator[np.ndarray]:
    """The images of an archive that write_npz wrote, one by one."""
    with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        for _ in range(shape[0]):
            yield np.frombuffer(member.read(math.prod(shape[1:])), dtype).reshape(shape[1:])


def grid(images: np.ndarray, *, columns: int, zoom: int = 1, gap: int = 4) -> np.ndarray:
    """Arrange images (N, H, W, C) row by row on white; uint8 (h, w, 3).

    Each pixel is enlarged to zoom x zoom; `gap` white pixels separate neighbours, with no border around the grid.
    Raises: UserError if the shape, the dtype or a number is out of range.
    """
    check(images.dtype == np.uint8, "images.dtype", str(images.dtype), "uint8 in 0..255")
    known = images.ndim == 4 and len(images) > 0 and images.shape[-1] in CHANNELS
    check(known, "images.shape", images.shape, "(N, H, W, C) with N > 0 and C = 1, 2, 3 or 4")
    for name, value, least in (("columns", columns, 1), ("zoom", zoom, 1), ("gap", gap, 0)):
        check(value >= least, name, value, f"at least {least}")
    if images.shape[-1] in (2, 4):
        alpha = images[..., -1:] / 255
        images = np.rint(images[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    down, right = height * zoom + gap, width * zoom + gap
    picture = np.full((rows * down - gap, columns * right - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down, i % columns * right
        picture[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    return picture
