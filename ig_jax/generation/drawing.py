"""A table of pictures, heat maps and a curve, drawn with Pillow: arrays in, uint8 [h, w, 3] out."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ig_jax.generation.images import BLACK, GREY, WHITE, text_width

LINE, BLUE = (222, 222, 222), (31, 95, 191)
TEXT = 18  # pixels
SMOOTH = 3  # a curve is drawn this much larger and reduced, for smooth edges

# From none to most: dark blue, purple, orange, pale yellow; its lightness rises all the way.
HEAT = np.array(
    [(8, 8, 32), (70, 15, 105), (160, 40, 100), (225, 90, 50), (250, 170, 50), (252, 250, 190)], float)


def heat(values: np.ndarray, most: float) -> np.ndarray:
    """values [H, W] in 0..most -> colours uint8 [H, W, 3]."""
    place = np.clip(values / max(most, 1e-12), 0, 1)
    knots = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(place, knots, channel) for channel in HEAT.T], -1).round().astype(np.uint8)


def table(
    cells: Sequence[Sequence[np.ndarray]], *, columns: Sequence[str], rows: Sequence[str], corner: str = "",
    caption: str = "",
) -> np.ndarray:
    """Pictures uint8 [h, w, 3] of one size in rows, with a title over each column and before each row."""
    font, small = ImageFont.load_default(size=TEXT), ImageFont.load_default(size=round(0.85 * TEXT))
    height, width = cells[0][0].shape[:2]
    wide = max([width] + [text_width(title, font) for title in columns])
    margin, gap = 2 * TEXT, TEXT // 2
    left = margin + max(text_width(title, font) for title in (*rows, corner)) + TEXT
    top = margin + 2 * TEXT
    right = max(left + len(columns) * (wide + gap) - gap, margin + text_width(caption, small)) + margin
    bottom = top + len(rows) * (height + gap) + (2 * TEXT if caption else 0) + margin
    page = Image.new("RGB", (right, bottom), WHITE)
    draw = ImageDraw.Draw(page)
    draw.text((left - TEXT, top - TEXT // 2), corner, GREY, font=font, anchor="rd")
    for c, title in enumerate(columns):
        middle = left + c * (wide + gap) + wide // 2
        draw.text((middle, top - TEXT // 2), title, BLACK, font=font, anchor="md")
    for r, title in enumerate(rows):
        y = top + r * (height + gap)
        draw.text((left - TEXT, y + height // 2), title, BLACK, font=font, anchor="rm")
        for c, picture in enumerate(cells[r]):
            page.paste(Image.fromarray(picture), (left + c * (wide + gap) + (wide - width) // 2, y))
    draw.text((left, page.height - margin), caption, GREY, font=small, anchor="ld")
    return np.asarray(page)


def curve(x: np.ndarray, y: np.ndarray, *, x_title: str, title: str, caption: str, width: int) -> np.ndarray:
    """y against x in [0, 1], from 1 at the left to 0 at the right: the way a sample goes."""
    scale, height = SMOOTH, 300
    page = Image.new("RGB", (width * scale, height * scale), WHITE)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=TEXT * scale)
    small = ImageFont.load_default(size=round(0.85 * TEXT) * scale)
    margin = 2 * TEXT * scale
    box = (margin + 3 * TEXT * scale, margin + TEXT * scale, width * scale - margin,
           height * scale - margin - 3 * TEXT * scale)
    step = _nice_step(float(np.max(y)))
    most = max(step, np.ceil(np.max(y) / step) * step)
    at_x = lambda value: box[2] - value * (box[2] - box[0])  # noqa: E731
    at_y = lambda value: box[3] - value / most * (box[3] - box[1])  # noqa: E731
    for value in np.arange(0, most + step / 2, step):
        draw.line([(box[0], at_y(value)), (box[2], at_y(value))], LINE, scale)
        draw.text((box[0] - TEXT * scale // 2, at_y(value)), f"{value:g}", GREY, font=small, anchor="rm")
    for value in np.arange(0, 1.01, 0.2):
        draw.text((at_x(value), box[3] + TEXT * scale // 2), f"{value:.1f}", GREY, font=small, anchor="ma")
    points = [(at_x(a), at_y(b)) for a, b in zip(x, y)]
    draw.line(points, BLUE, 3 * scale, joint="curve")
    for a, b in points:
        draw.ellipse([a - 5 * scale, b - 5 * scale, a + 5 * scale, b + 5 * scale], BLUE)
    draw.text((box[0], box[1] - TEXT * scale // 2), title, BLACK, font=font, anchor="ld")
    draw.text((box[2], box[3] + 2 * TEXT * scale), x_title, BLACK, font=font, anchor="ra")
    draw.text((box[0], box[3] + 2 * TEXT * scale), caption, GREY, font=small, anchor="la")
    return np.asarray(page.resize((width, height), Image.Resampling.LANCZOS))


def _nice_step(most: float) -> float:
    """1, 2 or 5 times a power of ten that makes about four steps up to `most`."""
    rough = max(most, 1e-12) / 4
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= rough))
