"""Inception Score, streamed: of each part of the images only sums over its probabilities are kept."""

import dataclasses
from typing import Self

import numpy as np

from ig_jax.base.errors import check
from ig_jax.evaluation.rows import SEED, Spread

PART = 5000  # images in a part of ADM's evaluator
SHUFFLED = 10  # parts of torch-fidelity


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """exp(mean KL(p(class | image) || mean p)) over the parts of N images, by their "index" and "logits" (B, classes).

    Source: Salimans et al. 2016 (arXiv:1606.03498), in float64.
    """

    part: np.ndarray  # int (N,), of each image
    sums: np.ndarray | None = None  # float64 (parts, classes), of probabilities
    negentropy: np.ndarray | None = None  # float64 (parts,), sum of p log p
    counts: np.ndarray | None = None  # int (parts,)

    @classmethod
    def in_order(cls, count: int) -> Self:
        """ADM's parts of 5,000 images; a shorter last one counts as much as a full one."""
        return cls(np.arange(count) // PART)

    @classmethod
    def shuffled(cls, count: int) -> Self:
        """torch-fidelity's ten parts, which do not depend on the order of the images.

        Raises: UserError for fewer images than parts.
        """
        check(count >= SHUFFLED, "count", count, f"at least {SHUFFLED} images for the shuffled Inception Score")
        part, cuts = np.empty(count, int), [i * count // SHUFFLED for i in range(SHUFFLED + 1)]
        order = np.random.RandomState(SEED).permutation(count)
        for i, rows in enumerate(np.split(order, cuts[1:-1])):
            part[rows] = i
        return cls(part)

    def update(self, batch) -> Self:
        logits = np.asarray(batch["logits"], np.float64)
        check(bool(np.isfinite(logits).all()), "logits", "NaN or infinity", "finite", "look for broken images")
        logs = logits - logits.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        p, part, parts = np.exp(logs), self.part[batch["index"]], int(self.part.max()) + 1
        sums, negentropy = np.zeros((parts, p.shape[1])), np.zeros(parts)
        np.add.at(sums, part, p)
        np.add.at(negentropy, part, (p * logs).sum(1))
        return self.merge(
            dataclasses.replace(self, sums=sums, negentropy=negentropy, counts=np.bincount(part, minlength=parts))
        )

    def merge(self, other: Self) -> Self:
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        added = {name: getattr(self, name) + getattr(other, name) for name in ("sums", "negentropy", "counts")}
        return dataclasses.replace(self, **added)

    def compute(self) -> Spread:
        """Raises: UserError unless every image was counted once."""
        counted = 0 if self.counts is None else int(self.counts.sum())
        check(counted == len(self.part), "count", counted, f"the {len(self.part)} images of the score")
        assert self.sums is not None and self.negentropy is not None and self.counts is not None
        mean = self.sums / self.counts[:, None]
        logs = np.log(mean, out=np.zeros_like(mean), where=mean > 0)  # 0 log 0 = 0
        scores = np.exp(self.negentropy / self.counts - (mean * logs).sum(1))
        return Spread(float(scores.mean()), float(scores.std()))
