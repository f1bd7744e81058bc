"""Metrics that compare all feature rows of two sets: precision and recall, KID, MIND."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from ig_jax.base.errors import check

SEED = 2020  # of torch-fidelity's one RandomState
NEAREST = 3  # k of precision and recall in ADM's evaluator
SUBSETS, SUBSET = 100, 1000  # of KID in torch-fidelity
PROJECTIONS = 1000  # of MIND
_BLOCK = 1 << 25  # distances in memory at once


@dataclasses.dataclass(frozen=True)
class Rows:
    """Feature rows by the index of their image, whatever the order in which batches or processes bring them."""

    feature: str
    parts: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # (index (B,), rows (B, D)) of each batch

    def update(self, batch) -> Self:
        rows = np.asarray(batch[self.feature])
        check(bool(np.isfinite(rows).all()), "features", "NaN or infinity", "finite", "look for broken images")
        return dataclasses.replace(self, parts=(*self.parts, (np.asarray(batch["index"]), rows)))

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, parts=self.parts + other.parts)

    def compute(self) -> np.ndarray:
        """All rows (N, D), in the order of the images.  Raises: UserError without any."""
        check(len(self.parts) > 0, "count", 0, "at least 1 image")
        indices, rows = (np.concatenate(column) for column in zip(*self.parts))
        return rows[np.argsort(indices, kind="stable")]


class PrecisionRecall(NamedTuple):
    """Fractions: of samples within the manifold of the reference, and the other way round."""

    precision: float
    recall: float


class Spread(NamedTuple):
    """A mean over parts, and the population standard deviation of them."""

    mean: float
    std: float


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, k: int = NEAREST, half: bool = False
) -> PrecisionRecall:
    """Precision and recall of rows (N, D) against reference rows (M, D).

    The radius of a row is the distance to its k-th nearest other row; a row is inside where the distance is at most
    that. half: squared distances in float16 as ADM's evaluator takes them; else in float64.
    Raises: UserError for k rows or fewer.
    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991); openai/guided-diffusion evaluations/evaluator.py.
    """
    for name, rows in (("samples", samples), ("reference", reference)):
        check(len(rows) > k, f"{name} count", len(rows), f"more than k={k} images for precision and recall")
    inside, covered = [], np.zeros(len(reference), bool)
    around_reference, around_samples = radii(reference, k, half), radii(samples, k, half)
    for part, distances in _distances(samples, reference, half):
        inside.append((distances <= around_reference).any(1))
        covered |= (distances <= around_samples[part, None]).any(0)
    return PrecisionRecall(float(np.concatenate(inside).mean()), float(covered.mean()))


def radii(rows: np.ndarray, k: int = NEAREST, half: bool = False) -> np.ndarray:
    """Squared distance (N,) of each row to its k-th nearest other row (itself is the nearest)."""
    return np.concatenate([np.partition(found, k, axis=1)[:, k] for _, found in _distances(rows, rows, half)])


def _distances(a: np.ndarray, b: np.ndarray, half: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of blocks of rows of a (N, D) to all rows of b (M, D)."""
    kind = np.float32 if half else np.float64
    a, b = a.astype(kind), b.astype(kind)
    size = max(1, _BLOCK // len(b))
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        yield part, (_half_block if half else _block)(a[part], b)


def _block(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)
    found = squares - 2 * (a @ b.T)
    # What rounding leaves of two equal rows is no distance.
    return np.where(found < 1e-13 * squares, 0.0, found)


def _half_block(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In ADM's float16: each product, sum and difference is rounded, sums are accumulated in float32.

    Where a number overflows, the block is done in float32 as there.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        short_a, short_b = a.astype(np.float16), b.astype(np.float16)
        squares_a, squares_b = ((x * x).sum(1, dtype=np.float32).astype(np.float16) for x in (short_a, short_b))
        product = (short_a.astype(np.float32) @ short_b.astype(np.float32).T).astype(np.float16)
        found = (squares_a[:, None] - 2 * product) + squares_b
    if not np.isfinite(found).all():
        found = (a**2).sum(1)[:, None] - 2 * (a @ b.T) + (b**2).sum(1)
    return np.maximum(found, 0).astype(np.float32)


def kernel_distance(samples: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET) -> Spread:
    """KID: the unbiased squared MMD of the kernel (a.b / D + 1)^3 over random subsets, in float64.

    Raises: UserError for fewer rows than a subset has.  Source: Binkowski et al. 2018 (arXiv:1801.01401), as drawn by
    toshas/torch-fidelity.
    """
    for name, rows in (("samples", samples), ("reference", reference)):
        check(len(rows) >= size >= 2, f"{name} count", len(rows), f"at least the {size} images of a subset of KID")
    random = np.random.RandomState(SEED)
    drawn = (  # one pair after another: all of them together are gigabytes
        [rows[random.choice(len(rows), size, replace=False)] for rows in (samples, reference)] for _ in range(subsets)
    )
    found = np.array([_squared_mmd(*pair) for pair in drawn])
    return Spread(float(found.mean()), float(found.std()))


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    others = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(others(kernel(a, a)) + others(kernel(b, b)) - 2 * kernel(a, b).mean())


def sliced_distance(samples: np.ndarray, reference: np.ndarray, projections: int = PROJECTIONS) -> float:
    """MIND: 3 D times the mean over random directions of squared differences between sorted projections.

    Of the larger set as many rows are drawn as the smaller has.  Source: arXiv:2605.06797.
    """
    random, count, features = np.random.RandomState(SEED), min(len(samples), len(reference)), samples.shape[1]
    check(count >= 1, "count", count, "at least 1 image")
    taken = [
        rows if len(rows) == count else rows[random.choice(len(rows), count, replace=False)]
        for rows in (samples, reference)
    ]
    total = 0.0
    for start in range(0, projections, 100):
        directions = random.standard_normal((features, min(100, projections - start)))
        directions /= np.linalg.norm(directions, axis=0)
        a, b = (np.sort(rows.astype(np.float64) @ directions, axis=0) for rows in taken)
        total += float(((a - b) ** 2).mean(0).sum())
    return 3 * features * total / projections
