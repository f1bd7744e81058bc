"""Frechet distance between two sets of features, from statistics that accumulate in any order.

Source: Dowson and Landau 1982, equation 4; Heusel et al. 2017 (arXiv:1706.08500), equation 6.
"""

import dataclasses

import numpy as np
from scipy.linalg import lapack

from ig_jax.base.errors import check


@dataclasses.dataclass(frozen=True)
class GaussianStats:
    """Sufficient statistics of a Gaussian over D features; those of two sets merge.

    Products are taken around the mean: sums of squares would lose the digits of a spread that is small against it.
    """

    center: np.ndarray  # float64 (D,), mean of the features
    scatter: np.ndarray  # float64 (D, D), sum of the outer products of their differences from it
    count: int  # feature vectors

    @classmethod
    def empty(cls, features: int) -> "GaussianStats":
        """Statistics of an empty set of vectors of `features` numbers."""
        return cls(np.zeros(features), np.zeros((features, features)), 0)

    def add(self, batch: np.ndarray) -> "GaussianStats":
        """The statistics with a batch of features, float (B, D), included; large batches cost less.

        Raises: UserError if the shape differs or a number is not finite.
        """
        batch = np.asarray(batch, np.float64)
        check(batch.shape[1:] == self.center.shape, "features.shape", batch.shape, f"(B, {self.center.size})")
        finite = bool(np.isfinite(batch).all())
        check(finite, "features", "NaN or infinity", "finite", "look for broken images or a diverged model")
        if not len(batch):
            return self
        center = batch.mean(0)
        batch = batch - center
        return self.merge(GaussianStats(center, batch.T @ batch, len(batch)))

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        """The statistics of the union of two sets, as from two processes (Chan et al. 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.center - self.center
        scatter = self.scatter + other.scatter + np.outer(apart, apart * (self.count * other.count / count))
        return GaussianStats(self.center + apart * (other.count / count), scatter, count)

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 (D,). Raises: UserError without a vector."""
        check(self.count >= 1, "count", self.count, "at least 1 image for a mean")
        return self.center

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance, as in FID, float64 (D, D). Raises: UserError below 2 vectors."""
        check(self.count >= 2, "count", self.count, "at least 2 images for a covariance")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with mu (D,) and cov (D, D), in float64.

    |mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), never negative.
    Raises: UserError if shapes disagree, a number is not finite, or a matrix is no covariance.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    square = mu1.shape * 2
    for name, array, shape in (("mu2", mu2, mu1.shape), ("cov1", cov1, square), ("cov2", cov2, square)):
        check(array.shape == shape, f"{name}.shape", array.shape, str(shape))
    check(all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)), "mean or covariance", "NaN or infinity", "finite")
    # With cov = F F^T, the trace of (cov1 cov2)^(1/2) is the sum of the singular values of F1^T F2. No square root of
    # a rounding error is taken, so singular covariances (fewer images than features) lose no digits.
    first, second = factor(cov1, "cov1"), factor(cov2, "cov2")
    cross = first.T @ second
    if cross.shape == square:  # of full rank: symmetric eigenvalues are as exact, and 8 times as fast
        roots = np.sqrt(np.linalg.eigvalsh(cross @ cross.T).clip(0))
    else:
        roots = np.linalg.svd(cross, compute_uv=False) if cross.size else np.zeros(0)
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum()))


def factor(cov: np.ndarray, name: str) -> np.ndarray:
    """F, float64 (D, R), with F F^T = cov for a covariance (D, D) of numerical rank R: a pivoted Cholesky.

    Raises: UserError for a matrix that is not symmetric, or has a negative eigenvalue.
    """
    largest = float(np.abs(cov).max(initial=0.0))
    symmetric = float(np.abs(cov - cov.T).max(initial=0.0)) <= 1e-6 * largest
    check(symmetric, name, "not symmetric", "a symmetric covariance", "the file is damaged")
    if largest == 0:
        return np.zeros((len(cov), 0))
    lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
    found = np.zeros_like(cov)
    found[pivots - 1] = np.tril(lower)
    found = found[:, :rank]
    left = abs(float(np.trace(cov) - (found**2).sum())) if rank < len(cov) else 0.0
    check(
        left <= 1e-6 * np.abs(np.diag(cov)).sum(), name, "with a negative eigenvalue", "a covariance", "it is damaged"
    )
    return found
