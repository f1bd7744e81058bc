"""Evaluation of one checkpoint over a sweep of guidance scales.

Both w and s are chosen on the metric that is reported, so that the comparison of IG with CFG is fair. Neither number
is therefore an unbiased estimate, and the report says so.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ig_jax.base.errors import check
from ig_jax.data.sources import Source
from ig_jax.diffusion.recipe import Recipe
from ig_jax.evaluation.classifier import Classifier, batches
from ig_jax.evaluation.metrics import METRICS, Metric
from ig_jax.generation.captions import guidance

Images = Iterable[tuple[np.ndarray, np.ndarray]]  # batches of images uint8 (B, H, W, C) and their labels int (B,)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What samples are measured with."""

    net: Classifier
    reference: dict[str, Metric]  # of the real training images
    reference_count: int  # how many these are
    test: Source  # real test images

    @classmethod
    def of(cls, net: Classifier, train: Source, test: Source) -> "Evaluator":
        """Measure the real training images."""
        fresh = {name: entry.make(None) for name, entry in METRICS.items()}
        return cls(net, _updated(fresh, net, batches(train), len(train))[0], len(train), test)

    def score(self, images: Images, count: int, few: int) -> dict:
        """All metrics of `count` images, and of the first `few` of them (`.._at_floor_n`), to compare at equal n.

        The rest of the row says what the numbers were measured with. Raises: UserError for fewer than 2 images.
        """
        fresh = {name: METRICS[name].make(metric) for name, metric in self.reference.items()}
        first, rest = _updated(fresh, self.net, images, few)
        whole = {name: metric.merge(rest[name]) for name, metric in first.items()}
        return {
            **{name: metric.compute() for name, metric in whole.items()},
            **{f"{name}_at_floor_n": metric.compute() for name, metric in first.items()},
            "count": count,
            "reference_count": self.reference_count,
            "classifier": self.net.checksum,
            "classifier_accuracy": self.net.test_accuracy,
            "num_classes": self.net.num_classes,
        }

    def real(self, few: int) -> dict:
        """The row of the real test images."""
        return {"setting": "real test images", **self.score(batches(self.test), len(self.test), few)}


def _updated(
    metrics: dict[str, Metric], net: Classifier, images: Images, first: int
) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """The metrics of the first `first` images, and of the rest."""
    parts, seen = [metrics, metrics], 0
    for batch, labels in images:
        check(len(labels) == len(batch), "labels.shape", np.shape(labels), f"({len(batch)},), one for each image")
        found = net(batch) | {"image": batch, "label": labels}
        cut = max(0, first - seen)
        for i, rows in enumerate((slice(cut), slice(cut, None))):
            part = {name: values[rows] for name, values in found.items()}
            if len(part["label"]):
                parts[i] = {name: metric.update(part) for name, metric in parts[i].items()}
        seen += len(batch)
    return parts[0], parts[1]


def count(ig_scales: Sequence[float], cfg_scales: Sequence[float]) -> int:
    """Number of recipes that `sweep` tries."""
    each = len(ig_scales) + len(cfg_scales)
    return 1 + each + (each - 1 if ig_scales and cfg_scales else 0)


def sweep(
    score: Callable[[Recipe], dict], base: Recipe, ig_scales: Sequence[float], cfg_scales: Sequence[float]
) -> list[dict]:
    """Rows for no guidance, every w, every s, and w x s along the best of each (a coordinate search).

    score: recipe -> the scores of its samples, with the same noise for every recipe. Either list may be empty.
    """

    def row(kind: str, w: float, s: float) -> dict:
        recipe = base.replace(ig_scale=w, cfg_scale=s)
        return {"kind": kind, "setting": guidance(recipe), "recipe": recipe.flat(), **score(recipe)}

    rows = [row("none", 1.0, 1.0)]
    rows += [row("IG", w, 1.0) for w in ig_scales]
    rows += [row("CFG", 1.0, s) for s in cfg_scales]
    if not ig_scales or not cfg_scales:
        return rows
    best_w = best(rows, "IG")["recipe"].get("ig_scale", 1.0)
    best_s = best(rows, "CFG")["recipe"].get("cfg_scale", 1.0)
    pairs = {(w, best_s) for w in ig_scales} | {(best_w, s) for s in cfg_scales}
    return rows + [row("IG+CFG", w, s) for w, s in sorted(pairs)]


def best(rows: Sequence[dict], kind: str) -> dict:
    """The row of one kind with the lowest FD-CNN."""
    return min((row for row in rows if row["kind"] == kind), key=lambda row: row["fd_cnn"])
