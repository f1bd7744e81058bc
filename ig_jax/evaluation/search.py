"""A search over the keys of a recipe for the lowest FID: a coarse grid, then a finer one around its best point."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.base.errors import check
from ig_jax.base.files import append_lines
from ig_jax.pictures.plots import Page, font

Point = dict[str, Any]  # a value for each axis: of a key of the recipe's flat form, or "ema"
SIDE, MARGIN = 420, 70  # pixels of a panel, and around it


def axes(text: str) -> dict[str, list]:
    """The axes of "ig_scale=1,1.5,2;cfg_interval=0:0.7,0:1;ema=0.999,0.9999".  Raises: UserError."""
    found: dict[str, list] = {}
    for part in filter(None, text.split(";")):
        name, _, values = part.partition("=")
        try:
            listed = [value if name == "ema" else _number(value) for value in values.split(",")]
        except ValueError:
            listed = []
        expected = "axes such as ig_scale=1,1.5,2;cfg_interval=0:0.7,0:1, each with values that differ"
        check(bool(name and listed) and len(set(listed)) == len(listed), "--sweep", text, expected)
        found[name] = listed
    check(bool(found), "--sweep", text, "at least one axis, such as ig_scale=1,1.5,2")
    return found


def _number(text: str) -> float | tuple[float, ...]:
    return tuple(map(float, text.split(":"))) if ":" in text else float(text)


def grid(of: Mapping[str, Sequence]) -> list[Point]:
    """Every combination of the values of axes."""
    return [dict(zip(of, values)) for values in itertools.product(*of.values())]


def finer(of: Mapping[str, Sequence], best: Point) -> dict[str, list]:
    """The best value of each axis with the middles to its neighbours, where it is a number."""
    found = {}
    for name, values in of.items():
        numbers = sorted(value for value in values if isinstance(value, float))
        at = numbers.index(best[name]) if best[name] in numbers else 0
        near = numbers[max(at - 1, 0) : at + 2] if numbers else []
        found[name] = sorted({best[name], *((best[name] + value) / 2 for value in near)}) if near else [best[name]]
    return found


def search(of: Mapping[str, Sequence], score: Callable[[Point], dict], file: Path, what: dict) -> list[dict]:
    """Rows {point, scores} of the coarse grid and of the finer one; those in `file`, of `what`, are not scored again.

    score: a point -> at least "fid" of its samples, from the same noise for all.
    Raises: UserError if the file cannot be written.
    """
    append_lines(file, [])
    stored = [json.loads(line) for line in file.read_text().splitlines()]
    known = {json.dumps(row["point"]): row for row in stored if row["what"] == what}

    def row(point: Point) -> dict:
        key = json.dumps(point)
        if key not in known:
            known[key] = {"point": json.loads(key), **score(point), "what": what}
            append_lines(file, [known[key]])
        return known[key]

    coarse = [(row(point), point) for point in grid(of)]
    best = min(coarse, key=lambda pair: pair[0]["fid"])[1]
    rows = [found for found, _ in coarse] + [row(point) for point in grid(finer(of, best))]
    return list({json.dumps(found["point"]): found for found in rows}.values())


def table(rows: Sequence[dict]) -> str:
    """The rows by FID, the lowest first."""
    names = list(rows[0]["point"])
    head = [*names, "FID", "sFID", "IS"]
    lines = [
        [
            *(json.dumps(row["point"][name]) for name in names),
            *(f"{row[k] or np.nan:.3f}" for k in ("fid", "sfid", "inception_score")),
        ]
        for row in sorted(rows, key=lambda row: row["fid"])
    ]
    return "\n".join("  ".join(f"{cell:>12}" for cell in line) for line in [head, *lines])


def picture(rows: Sequence[dict]) -> np.ndarray:
    """FID over the first two axes that are numbers, and FID against Inception Score; uint8 (h, w, 3)."""
    page = Page(2 * (SIDE + MARGIN) + MARGIN, SIDE + 2 * MARGIN)
    panels = [page.axes(MARGIN + i * (SIDE + MARGIN), MARGIN // 2, SIDE, SIDE) for i in range(2)]
    fid = np.array([row["fid"] for row in rows])
    names = [
        n for n, v in rows[0]["point"].items() if isinstance(v, float) and len({row["point"][n] for row in rows}) > 1
    ]
    columns = [np.array([row["point"][name] for row in rows]) for name in names[:2]]
    if len(columns) == 2 and len(rows) >= 4:
        contour = panels[0].tricontour(columns[0], columns[1], fid, levels=12, cmap="viridis")
        panels[0].clabel(contour, fontsize=9)
        panels[0].plot(columns[0], columns[1], "o", color="black", ms=3)
    elif columns:
        panels[0].plot(columns[0], fid, "o", color="black", ms=4)
    panels[1].plot([row["inception_score"] for row in rows], fid, "o", color="black", ms=4)
    labels = ((names or ["point"])[0], names[1] if len(columns) == 2 else "FID"), ("Inception Score", "FID")
    panels[0].set_title("FID", font=font(12))
    for panel, (x, y) in zip(panels, labels):
        panel.set_xlabel(x, font=font(12))
        panel.set_ylabel(y, font=font(12))
    return page.pixels()
