"""Pictures and sample archives: uint8 arrays in, whole files out."""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ig_jax.errors import check
from ig_jax.files import atomic_file

WHITE, BLACK, GREY = (255, 255, 255), (24, 24, 24), (110, 110, 110)
COMFORTABLE = 48  # pixels a side at which the strokes of an 8x8 digit are easy to judge


def comfortable_zoom(side: int) -> int:
    """How many times to enlarge images of `side` pixels for people to look at."""
    return max(1, round(COMFORTABLE / side))


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write one image, uint8 (H,W), (H,W,1) or (H,W,3), as a PNG.

    Raises: UserError if the shape or dtype is another or the file cannot be written.
    """
    image = np.asarray(image)
    check(image.dtype == np.uint8, "image.dtype", str(image.dtype), "uint8")
    check(image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 3)), "image.shape", image.shape,
          "(H, W), (H, W, 1) or (H, W, 3)")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def write_npz(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Write samples in the layout FID tools read: `arr_0` uint8 (N,H,W,C), `arr_1` int64 (N,).

    Uncompressed and streamed in blocks, so 50,000 images of 256x256x3 need no second copy in memory; a
    memory-mapped array is never read in whole.
    Raises: UserError if shapes or dtypes are others or the file cannot be written.
    """
    images = _checked(images)
    labels = np.asarray(labels)
    check(labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer), "labels",
          f"{labels.dtype} {labels.shape}", f"integers of shape {images.shape[:1]}, one for each image")
    with atomic_file(path) as file:
        np.savez(file, arr_0=images, arr_1=labels.astype(np.int64))


def stream_npz(path: str | os.PathLike, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """As write_npz, from images uint8 (H,W,C) that come one by one, as many as there are labels."""
    images = iter(images)
    first = np.asarray(next(images))
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(first.tobytes())
            for image in images:
                member.write(image.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64))


def grid(images: np.ndarray, *, columns: int, zoom: int = 1, gap: int = 4) -> np.ndarray:
    """Lay images, uint8 (N,H,W,C) with C = 1 or 3, row by row on white; uint8 (h,w,3).

    Each pixel becomes zoom x zoom by nearest neighbour; `gap` pixels part neighbours, none surround the
    whole, and places left over in the last row stay white.
    Raises: UserError if the shape, dtype or a number is out of range.
    """
    images = _checked(images)
    for name, value, least in (("columns", columns, 1), ("zoom", zoom, 1), ("gap", gap, 0)):
        check(value >= least, name, value, f"at least {least}")
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    down, right = height * zoom + gap, width * zoom + gap
    picture = np.full((rows * down - gap, columns * right - gap, 3), WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down, i % columns * right
        picture[top:top + height * zoom, left:left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    return picture


def comparison(panels: Mapping[str, np.ndarray], *, row_labels: Sequence[str], zoom: int | None = None,
               caption: str = "") -> np.ndarray:
    """Draw one panel for each guidance setting side by side, with titles and row labels; uint8 (h,w,3).

    panels: title -> uint8 (N,H,W,C), C = 1 or 3, all of one shape; lines of a title after the first are
    printed small. N is a multiple of R = len(row_labels): images [r * N/R, (r + 1) * N/R) fill row r of every
    panel, so the same place shows the same noise. zoom: screen pixels a pixel; None enlarges a side to about
    48. caption: a line under the whole, such as the sampler and the seed.
    Raises: UserError if there is no panel or shapes disagree.
    """
    check(len(panels) > 0, "panels", list(panels), "at least one")
    arrays = [_checked(images) for images in panels.values()]
    count, height, width, _ = arrays[0].shape
    for title, array in zip(panels, arrays):
        check(array.shape == arrays[0].shape, f"panels[{title!r}].shape", array.shape,
              f"that of the first panel, {arrays[0].shape}")
    check(len(row_labels) > 0 and count % len(row_labels) == 0, "row_labels", list(row_labels),
          f"so many that they divide the {count} images of a panel")
    if zoom is None:
        zoom = comfortable_zoom(height)
    # Strokes of small images reach the edge: a thin gap would let neighbours run into one another.
    gap = max(2, min(height * zoom // 8, 8))
    grids = [grid(array, columns=count // len(row_labels), zoom=zoom, gap=gap) for array in arrays]
    return _typeset(dict(zip(panels, grids)), list(row_labels), side=height * zoom, gap=gap, caption=caption)


def _typeset(blocks: dict[str, np.ndarray], row_labels: list[str], *, side: int, gap: int,
             caption: str) -> np.ndarray:
    """Set blocks, uint8 (h,w,3), in a row on a white page; image rows are `side` pixels high, `gap` apart."""
    body = int(np.clip(side // 3, 13, 28))
    large, small = ImageFont.load_default(size=round(1.25 * body)), ImageFont.load_default(size=body)
    heads = [title.split("\n") for title in blocks]
    margin, between, leading = 2 * body, 2 * body, round(1.45 * body)
    label_width = max(text_width(label, small) for label in row_labels) + body
    # A title may be wider than its block (one column of small images): the panel then grows to hold it.
    block_height, block_width = next(iter(blocks.values())).shape[:2]
    panel = max([block_width] + [text_width(line, large if i == 0 else small) for head in heads
                                 for i, line in enumerate(head)])
    top = margin + 2 * body + leading * (max(map(len, heads)) - 1)
    bottom = top + block_height + (2 * leading if caption else 0) + margin
    right = margin + label_width + len(blocks) * (panel + between) - between
    right = max(right, margin + label_width + text_width(caption, small)) + margin
    page = Image.new("RGB", (right, bottom), WHITE)
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(row_labels):
        middle = top + row * (side + gap) + side // 2
        draw.text((margin + label_width - body, middle), label, GREY, font=small, anchor="rm")
    for i, (head, block) in enumerate(zip(heads, blocks.values())):
        left = margin + label_width + i * (panel + between)
        draw.text((left, margin), head[0], BLACK, font=large, anchor="la")
        for j, line in enumerate(head[1:]):
            draw.text((left, margin + round(1.6 * body) + j * leading), line, GREY, font=small, anchor="la")
        page.paste(Image.fromarray(block), (left, top))
    draw.text((margin + label_width, bottom - margin), caption, GREY, font=small, anchor="ld")
    return np.asarray(page)


def text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Width of one line of text in pixels, rounded up."""
    return int(np.ceil(font.getlength(text)))


def _checked(images: np.ndarray) -> np.ndarray:
    """Return images as an array, sure to be uint8 (N,H,W,C) with N > 0 and C = 1 or 3.

    Raises: UserError otherwise.
    """
    images = np.asanyarray(images)
    check(images.dtype == np.uint8, "images.dtype", str(images.dtype), "uint8 in 0..255")
    check(images.ndim == 4 and images.shape[0] > 0 and images.shape[-1] in (1, 3), "images.shape",
          images.shape, "(N, H, W, C) with N > 0 and C = 1 or 3")
    return images
