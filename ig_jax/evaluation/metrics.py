"""Metrics that accumulate over batches, and the networks whose features they read.

A metric is an immutable value: `update` returns it with one more batch counted, `merge` with what another process
counted. It holds sums and no images, and can be pickled. To add a metric, write its class and enter it in METRICS:
evaluate then computes, stores and prints it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, Self

import numpy as np

from ig_jax.base.errors import check
from ig_jax.evaluation.frechet import GaussianStats, frechet_distance

# "image" uint8 (B, H, W, C), "label" int (B,) as requested, and the named features (B, ...) of a FeatureNet.
Batch = Mapping[str, np.ndarray]


class FeatureNet(Protocol):
    """A network that describes images."""

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Named features (B, ...) of images uint8 (B, H, W, C)."""


class Metric(Protocol):
    """A number that describes a set of images, from statistics that do not depend on how it is cut into batches."""

    def update(self, batch: Batch) -> Self:
        """The metric with one more batch counted."""

    def merge(self, other: Self) -> Self:
        """The metric over the images of both."""

    def compute(self) -> float:
        """Its value.  Raises: UserError for too few images."""


@dataclasses.dataclass(frozen=True)
class FrechetDistance:
    """Frechet distance of one kind of features (B, D) to those of reference images."""

    feature: str
    reference: GaussianStats | None  # None while the reference itself is being measured
    stats: GaussianStats | None = None  # None before the first batch

    def update(self, batch: Batch) -> Self:
        found = batch[self.feature]
        stats = self.stats or GaussianStats.empty(found.shape[1])
        return dataclasses.replace(self, stats=stats.add(found))

    def merge(self, other: Self) -> Self:
        both = self.stats.merge(other.stats) if self.stats and other.stats else self.stats or other.stats
        return dataclasses.replace(self, stats=both)

    def compute(self) -> float:
        check(self.stats is not None, "count", 0, "at least 2 images for a covariance")
        assert self.stats and self.reference
        return frechet_distance(self.stats.mean, self.stats.cov, self.reference.mean, self.reference.cov)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Fraction of images whose predicted class is the requested label."""

    right: int = 0
    count: int = 0

    def update(self, batch: Batch) -> Self:
        right = int((batch["prediction"] == batch["label"]).sum())
        return dataclasses.replace(self, right=self.right + right, count=self.count + len(batch["label"]))

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, right=self.right + other.right, count=self.count + other.count)

    def compute(self) -> float:
        check(self.count > 0, "count", self.count, "at least 1 image")
        return self.right / self.count


class Entry(NamedTuple):
    """How evaluate makes and prints a metric.

    `make` is called with the metric of the reference images, or with None for the metric that measures those, and
    gives a fresh one. The expectation of a biased metric depends on the number of images: rows are compared at equal n.
    """

    make: Callable[[Metric | None], Metric]
    title: str
    shown: Callable[[float], str] = "{:.2f}".format
    biased: bool = False


METRICS: dict[str, Entry] = {
    "fd_cnn": Entry(lambda ref: FrechetDistance("features", getattr(ref, "stats", None)), "FD-CNN", biased=True),
    "agreement": Entry(lambda ref: Agreement(), "agreement %", lambda value: f"{100 * value:.1f}"),
}
