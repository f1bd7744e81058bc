"""Tables of images, heat maps and curves as figures: arrays in, uint8 (h, w, 3) out.

Matplotlib draws them through its object interface and with the font it brings, so that nothing depends on the state
or the fonts of the machine. Images appear pixel for pixel, enlarged by whole factors.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from ig_jax.pictures import images

DPI = 72  # one point is one pixel
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
BLACK, GREY, LINE, BLUE, LIGHT_BLUE = "#181818", "#6e6e6e", "#dedede", "#1f5fbf", "#b4c8e8"
HEAT = matplotlib.colormaps["inferno"]  # perceptually uniform: dark is none
WIDEST = 1600  # pixels of a picture, where its rows can be broken
NARROWEST = 360  # pixels of a line of text


class Page:
    """A white figure measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)

    def image(self, left: int, top: int, pixels: np.ndarray) -> None:
        """Place pixels, uint8 (h, w, 3), as they are."""
        self.figure.figimage(pixels, left, self.height - top - len(pixels), origin="upper")

    def text(self, x: float, y: float, text: str, size: float, colour: str = BLACK, *, ha="left", va="center") -> None:
        """Write one line of plain text."""
        at = x / self.width, 1 - y / self.height
        self.figure.text(*at, text, font=font(size), color=colour, ha=ha, va=va, parse_math=False)

    def lines(self, left: float, top: float, lines: Sequence[str], size: float) -> None:
        """Write lines of grey text, the first one centred at the height `top`."""
        for i, line in enumerate(lines):
            self.text(left, top + 1.53 * size * i, line, size, GREY)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose data area is this box."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def pixels(self) -> np.ndarray:
        """The page, uint8 (height, width, 3)."""
        self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


def font(size: float) -> FontProperties:
    """The bundled font at a size in pixels."""
    return FontProperties(fname=FONT, size=size)


def text_width(text: str, size: float) -> int:
    """Width of one line of plain text in pixels."""
    return int(np.ceil(text_to_path.get_text_width_height_descent(text, font(size), ismath=False)[0]))


def wrapped(text: str, size: float, width: float) -> list[str]:
    """The lines of a text, broken at `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        first, *rest = paragraph.split() or [""]
        lines.append(first)
        for word in rest:
            if text_width(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return lines


class Table(NamedTuple):
    """A page with a table of images, and the place of the table in pixels."""

    page: Page
    text: int  # height of the text
    centres: list[int]  # of the columns
    top: int
    bottom: int


def table(
    cells: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    notes: Sequence[Sequence[str]] = (),
    across: int = 1,
    group: int = 1,
    caption: str = "",
    right: int = 0,
    below: int = 0,
) -> Table:
    """Draw images in rows and columns, with a title over each column and a label before each row.

    cells: rows of batches uint8 (K, H, W, C), each drawn as a grid with `across` images in a row, or with fewer where
    the page would be wider than WIDEST; rows of smaller images are enlarged more. columns: titles; their lines after
    the first are grey. notes: a line of text under each cell. group: how many consecutive rows stand close together,
    unless their cells are broken into lines. right, below: free space next to and under the table, in lines of text.
    """
    tallest = max(row[0].shape[1] for row in cells)
    side = tallest * images.comfortable_zoom(tallest)
    text, gap = max(18, side // 7), max(2, min(side // 8, 8))
    titles = [title.split("\n") for title in columns]
    between = 2 * text if across > 1 else gap
    left = text + max(text_width(label, text) for label in rows) + text
    room = (WIDEST - left - (1 + right) * text + between) // len(columns) - between
    blocks, broken = _fitted(cells, across, room, side, gap)
    words = [text_width(line, text) for lines in (*titles, *notes) for line in lines]
    width = max(words + [block.shape[1] for row in blocks for block in row])
    centres = [left + width // 2 + i * (width + between) for i in range(len(columns))]
    edge = left + len(columns) * (width + between) - between

    top = text + round(1.4 * text) * max(map(len, titles))
    tops = [top]
    for i, row in enumerate(blocks):
        after = gap if (i + 1) % group and not broken else text
        tops.append(tops[-1] + row[0].shape[0] + (round(1.6 * text) if notes else 0) + after)
    bottom = tops.pop() - after
    described = wrapped(caption, 0.85 * text, max(edge + right * text - left, NARROWEST))
    edge = max([edge + right * text, *(left + text_width(line, 0.85 * text) for line in described)])
    page = Page(edge + text, bottom + round((below + 1.4 + 1.3 * len(described)) * text))
    for x, title in zip(centres, titles, strict=True):
        for i, line in enumerate(title):
            page.text(x, (1.5 + 1.4 * i) * text, line, text, GREY if i else BLACK, ha="center")
    for i, (y, label, row) in enumerate(zip(tops, rows, blocks, strict=True)):
        page.text(left - text, y + row[0].shape[0] / 2, label, text, ha="right")
        for j, (x, block) in enumerate(zip(centres, row, strict=True)):
            page.image(x - block.shape[1] // 2, y, block)
            if notes:
                page.text(x, y + block.shape[0] + 0.8 * text, notes[i][j], 0.85 * text, GREY, ha="center")
    page.lines(left, bottom + (below + 1.2) * text, described, 0.85 * text)
    return Table(page, text, centres, top, bottom)


def _fitted(cells: Sequence[Sequence[np.ndarray]], across: int, room: int, side: int, gap: int):
    """(the cells as grids with `across` images in a row, or fewer to be at most `room` pixels wide; whether fewer)."""
    for lines in range(1, across + 1):
        each = math.ceil(across / lines)
        # Strokes of small images reach the edge: a thin gap would let neighbours run into one another.
        blocks = [
            [images.grid(cell, columns=each, zoom=max(1, side // cell.shape[1]), gap=gap) for cell in row]
            for row in cells
        ]
        if max(block.shape[1] for row in blocks for block in row) <= room:
            break
    return blocks, lines > 1


def stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures one above the other on white; uint8 (h, w, 3)."""
    width = max(picture.shape[1] for picture in pictures)
    wider = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.concatenate([np.pad(one, pad, constant_values=255) for one, pad in zip(pictures, wider)])


def sheet(batch: np.ndarray, *, columns: int, caption: str) -> np.ndarray:
    """Draw images (N, H, W, C) in rows of `columns` with a margin and a caption below; uint8 (h, w, 3)."""
    block, text = images.grid(batch, columns=columns, zoom=images.comfortable_zoom(batch.shape[1])), 18
    height, width = block.shape[0], max(block.shape[1], NARROWEST)
    lines = wrapped(caption, 0.85 * text, width)
    page = Page(width + 2 * text, height + round((2.4 + 1.3 * len(lines)) * text))
    page.image(text, text, block)
    page.lines(text, height + 2.2 * text, lines, 0.85 * text)
    return page.pixels()


def gap(
    final: np.ndarray | None,
    difference: np.ndarray,
    rms: np.ndarray,
    sigma: np.ndarray,
    *,
    names: Sequence[str],
    caption: str = "",
) -> np.ndarray:
    """Draw where two heads disagree along a trajectory: a heat map at each time, and a curve below; uint8 (h, w, 3).

    final: images uint8 (S, N, H, W, C) that the final head denoises to, shown above each heat map where given.
    difference: |D_f - D_i|, float (S, N, h, w). rms: of the whole difference, float (S, N). sigma: times (S,).
    names: N labels of the samples.
    """
    most = float(difference.max())
    heat = HEAT(difference / (most or 1.0), bytes=True)[..., :3]
    cells, rows = [], []
    for n, name in enumerate(names):
        if final is not None:
            cells.append(list(final[:, n, None]))
        cells.append(list(heat[:, n, None]))
        rows += [name] if final is None else [name, ""]
    drawn = table(
        cells,
        columns=[f"{s:.2f}" for s in sigma],
        rows=rows,
        group=len(rows) // len(names),
        caption=caption,
        right=7,
        below=13,
    )
    text, page = drawn.text, drawn.page
    bar = page.axes(page.width - 7 * text, drawn.top, text, min(drawn.bottom - drawn.top, 20 * text))
    scale = page.figure.colorbar(ScalarMappable(Normalize(0, most or 1.0), HEAT), cax=bar)
    scale.set_label("$|D_f - D_i|$", font=font(text), color=BLACK)
    first, last = drawn.centres[0], drawn.centres[-1]
    curve = page.axes(first, drawn.bottom + 2 * text, max(last - first, text), 8 * text)
    curve.plot(rms, color=LIGHT_BLUE, linewidth=text / 10)
    curve.plot(rms.mean(1), color=BLUE, linewidth=text / 6, marker="o", markersize=text / 2, clip_on=False)
    curve.set_xticks(range(len(sigma)), [f"{s:.2f}" for s in sigma])
    curve.set_xlim(0, max(len(sigma) - 1, 1))
    curve.set_ylim(0, None)
    curve.set_xlabel(r"$\sigma$: from noise to data", font=font(text), color=BLACK)
    curve.set_ylabel("$D_f - D_i$, rms", font=font(text), color=BLACK)
    curve.spines[["top", "right"]].set_visible(False)
    curve.grid(axis="y", color=LINE)
    for axes in (bar, curve):
        axes.tick_params(labelsize=0.85 * text, colors=GREY, labelfontfamily="DejaVu Sans")
    return page.pixels()
