"""Guidance scales tried one after the other on one checkpoint, and the best of each kind side by side.

Both w and s are chosen on the metric they are reported on, so that the comparison of IG with CFG is fair;
neither number is therefore an unbiased estimate, and the table says so.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ig_jax.evaluation import features, frechet, scores
from ig_jax.generation.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Ruler:
    """What samples are measured with: a classifier, the real train statistics, and the real test images."""

    classifier: features.Classifier
    reference: frechet.GaussianStats
    test_images: np.ndarray  # uint8 [M, H, W, C]
    test_labels: np.ndarray  # int [M]

    def floor(self, count: int) -> dict:
        """The row of the real test images, beside rows of `count` samples."""
        few = min(count, len(self.test_images))
        part = scores.real_floor(self.classifier, self.reference, self.test_images[:few], self.test_labels[:few])
        whole = scores.real_floor(self.classifier, self.reference, self.test_images, self.test_labels)
        return whole | {"fd_cnn_at_floor_n": part["fd_cnn"]}

    def row(self, kind: str, recipe: Recipe, images: np.ndarray, labels: np.ndarray) -> dict:
        """Scores of the samples of one recipe; `fd_cnn_at_floor_n` uses as many of them as there are test images."""
        few = min(len(self.test_images), len(images))
        return {
            "kind": kind,
            "setting": setting(recipe),
            "recipe": dataclasses.asdict(recipe),
            **scores.score(self.classifier, self.reference, images, labels),
            "fd_cnn_at_floor_n": scores.score(self.classifier, self.reference, images[:few], labels[:few])["fd_cnn"],
        }


def setting(recipe: Recipe) -> str:
    """The guidance of a recipe in a few words: "IG 2 + CFG 1.25"."""
    parts = [f"{name} {scale:g}" for name, scale in (("IG", recipe.ig_scale), ("CFG", recipe.cfg_scale)) if scale != 1]
    return " + ".join(parts) or "none"


def count(ig_scales: Sequence[float], cfg_scales: Sequence[float]) -> int:
    """How many recipes `sweep` tries."""
    each = len(ig_scales) + len(cfg_scales)
    return 1 + each + (each - 1 if ig_scales and cfg_scales else 0)


def sweep(
    draw: Callable[[Recipe], np.ndarray], labels: np.ndarray, ruler: Ruler, base: Recipe,
    ig_scales: Sequence[float], cfg_scales: Sequence[float],
) -> list[dict]:
    """Rows for no guidance, every w, every s, and w x s along the best of each (a coordinate search).

    Either list may be empty.
    `draw(recipe)` gives images uint8 [N, H, W, C] for `labels` [N]; the noise is the same for every recipe.
    """

    def measured(kind: str, w: float, s: float) -> dict:
        recipe = dataclasses.replace(base, ig_scale=w, cfg_scale=s)
        return ruler.row(kind, recipe, draw(recipe), labels)

    rows = [measured("none", 1.0, 1.0)]
    rows += [measured("IG", w, 1.0) for w in ig_scales]
    rows += [measured("CFG", 1.0, s) for s in cfg_scales]
    if not ig_scales or not cfg_scales:
        return rows
    best_w = best(rows, "IG")["recipe"]["ig_scale"]
    best_s = best(rows, "CFG")["recipe"]["cfg_scale"]
    pairs = {(w, best_s) for w in ig_scales} | {(best_w, s) for s in cfg_scales}
    return rows + [measured("IG+CFG", w, s) for w, s in sorted(pairs)]


def best(rows: Sequence[dict], kind: str) -> dict:
    """The row of one kind with the lowest FD-CNN."""
    return min((row for row in rows if row["kind"] == kind), key=lambda row: row["fd_cnn"])
