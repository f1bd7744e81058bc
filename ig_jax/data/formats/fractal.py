"""Two-dimensional points on the branches of two trees, a class each: data whose every error an eye can see.

Our own generator, after the toy example of autoguidance (arXiv 2406.02507), on which the paper on internal guidance
shows what it does. A point is a latent of one pixel and two channels.
"""

import dataclasses

import numpy as np

from ig_jax.data.dataset import DataConfig
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Source
from ig_jax.data.spec import BatchSpec
from ig_jax.models.latents import LatentScaling

SCALING = LatentScaling("points", (0.0, 0.0), (2.0, 2.0), "half")  # both coordinates get a deviation of about 1
SEEDS = {"train": 0, "test": 1}
POINTS = 100_000  # of a split
LEVELS, ANGLE, LENGTH, WIDTH = 6, 0.52, 0.62, 0.035  # of a tree, and in radians and units of its first branch
SHORTER, THINNER = 0.73, 0.72  # a branch than the one it grows from


@dataclasses.dataclass(frozen=True)
class Tree:
    """The branches of one class: line segments from `start` to `end` (N, 2), with the width (N,) of each."""

    start: np.ndarray
    end: np.ndarray
    width: np.ndarray

    def points(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points float64 (count, 2), as many on a branch as its area is large."""
        area = np.linalg.norm(self.end - self.start, axis=1) * self.width
        branch = rng.choice(len(area), count, p=area / area.sum())
        along, across = rng.uniform(size=(count, 1)), rng.normal(size=(count, 2))
        start, end = self.start[branch], self.end[branch]
        return start + along * (end - start) + 0.35 * self.width[branch, None] * across


def trees() -> tuple[Tree, ...]:
    """The trees of classes 0 and 1, which grow down and up from next to each other."""
    rng = np.random.default_rng(3)

    def grown(start, direction, length, width, level):
        end = start + length * np.array([np.cos(direction), np.sin(direction)])
        found = [(start, end, width)]
        for side in (-1, 1) if level > 1 else ():
            turned = direction + side * ANGLE * rng.uniform(0.8, 1.2)
            found += grown(end, turned, length * SHORTER * rng.uniform(0.88, 1.1), width * THINNER, level - 1)
        return found

    roots = (np.array([-0.1, -0.12]), -np.pi / 2), (np.array([0.1, 0.12]), np.pi / 2)
    return tuple(Tree(*map(np.array, zip(*grown(*root, LENGTH, WIDTH, LEVELS)))) for root in roots)


def samples(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 (N, 2) of a split in units of the trees, and labels int32 (N,), half of them of each class."""
    rng = np.random.default_rng(SEEDS[split])
    points = [tree.points(POINTS // 2, rng) for tree in trees()]
    return np.concatenate(points).astype(np.float32), np.repeat(np.arange(2, dtype=np.int32), POINTS // 2)


@data_format("fractal")
def open_fractal(config: DataConfig, split: str) -> Source:
    """The points of a split, "train" or "test"; nothing is read."""
    points, labels = samples(split)
    spec = BatchSpec("latents", (1, 1, 2), "float32", False, SCALING, ("lower tree", "upper tree"), f"fractal:{split}")
    read = lambda rows: {"latent": points[rows, None, None], "label": labels[rows]}
    return Source(spec, len(points), read, labels)
