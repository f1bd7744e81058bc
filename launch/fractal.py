"""Guidance on points of the plane: samples of two runs of configs/fractal.py as numbers and as a picture.

  .venv/bin/python launch/fractal.py PLAIN ACCELERATED OUT      what launch/fractal.sh calls

PLAIN and ACCELERATED are work directories, without and with the accelerated loss. Writes OUT/fractal.png, with a row
for each of ITERATIONS, and OUT/fractal.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from ig_jax.base.files import atomic_file
from ig_jax.data.formats import fractal
from ig_jax.generation import pretrained

ITERATIONS = (512, 4096)  # checkpoints that are compared
GUIDANCE = {
    "no guidance": dict(ig_scale=1.0, cfg_scale=1.0),
    "CFG, s = 2": dict(ig_scale=1.0, cfg_scale=2.0),
    "internal guidance, w = 2.5": dict(ig_scale=2.5, cfg_scale=1.0),
    "IG + CFG, w = 2.5, s = 1.5": dict(ig_scale=2.5, cfg_scale=1.5),
}
ACCELERATED = "accelerated loss, no guidance"
LABEL, SAMPLES = 1, 2500
NEAR = 0.025  # units of the trees, where the trunk has a deviation of 0.012 to either side
INCHES, DPI = 3.1, 80


def main(plain: str, accelerated: str, out: str) -> None:
    points, labels = fractal.samples("test")
    truth, other = points[labels == LABEL], points[labels != LABEL]
    panels = [
        panel(run, steps, title, scales, truth)
        for steps in ITERATIONS
        for run, title, scales in [
            *((plain, title, scales) for title, scales in GUIDANCE.items()),
            (accelerated, ACCELERATED, GUIDANCE["no guidance"]),
        ]
    ]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(panels, truth, other, folder / "fractal.png")
    results = [{name: value for name, value in found.items() if name != "points"} for found in panels]
    with atomic_file(folder / "fractal.json") as file:
        file.write((json.dumps(dict(near=NEAR, samples=SAMPLES, results=results), indent=2) + "\n").encode())
    print(f"{folder / 'fractal.png'}, {folder / 'fractal.json'}")


def panel(run: str, steps: int, title: str, scales: dict[str, float], truth: np.ndarray) -> dict:
    """Points float32 (SAMPLES, 2) of one checkpoint, what is counted of them, and what made them."""
    model = pretrained.load(Path(run) / "checkpoints" / str(steps))
    recipe = model.recipe.replace(**scales)
    latents = model.latents([LABEL] * SAMPLES, recipe, batch_size=SAMPLES)
    points = np.asarray(model.experiment.latents.denormalise(latents)).reshape(-1, 2)
    found = counted(points, truth)
    print(
        f"{steps:>5} steps  {title:<30} {found['off']:5.1%} off the branches  {found['covered']:4.0%} covered",
        flush=True,
    )
    return dict(points=points, steps=steps, title=title, **found, made=model.metadata(recipe, seed=0, label=LABEL))


def counted(points: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The share of points (N, 2) off the branches, farther than NEAR from every true one (M, 2), and the share of the
    true ones that are covered, with a point within NEAR.
    """
    off = float(np.mean(cKDTree(truth).query(points)[0] > NEAR))
    return {"off": off, "covered": float(np.mean(cKDTree(points).query(truth)[0] < NEAR))}


def draw(panels: list[dict], truth: np.ndarray, other: np.ndarray, path: Path) -> None:
    """Each panel's points over the true ones, a row for each number of steps."""
    columns, rows = len(panels) // len(ITERATIONS), len(ITERATIONS)
    figure = Figure(figsize=(INCHES * columns, 1.2 * INCHES * rows))
    low, high = truth.min(0) - 0.12, truth.max(0) + 0.12
    for number, found in enumerate(panels):
        row, column = divmod(number, columns)
        left, bottom = column / columns, 1 - (row + 1) / rows
        axes = figure.add_axes((left, bottom + 0.13 / rows, 1 / columns, 0.78 / rows))
        scattered = [(other, 1.5, "#dcdcdc"), (truth, 1.5, "#ffcf99"), (found["points"], 2.2, "#1f4e9c")]
        for points, size, colour in scattered:
            axes.scatter(*points.T, s=size, color=colour, linewidths=0)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        axes.axis("off")
        middle = left + 0.5 / columns
        figure.text(middle, bottom + 0.94 / rows, found["title"], ha="center", fontsize=12, weight="bold")
        numbers = f"{found['steps']:,} steps\n{found['off']:.1%} off the branches, {found['covered']:.0%} covered"
        figure.text(middle, bottom + 0.03 / rows, numbers, ha="center", fontsize=10, color="#444444")
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main(*sys.argv[1:])
