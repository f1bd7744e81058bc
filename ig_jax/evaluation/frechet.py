"""Frechet distance between two sets of features, from sums that can be accumulated in any order.

Source: Dowson and Landau 1982, equation 4; Heusel et al. 2017 (arXiv:1706.08500), equation 6.
"""

import dataclasses

import numpy as np

from ig_jax.errors import check


@dataclasses.dataclass(frozen=True)
class GaussianStats:
    """Sufficient statistics of a Gaussian over D features; sums of parts are the statistics of the whole.

    total: float64 (D,), sum of the features. outer: float64 (D,D), sum of their outer products.
    count: number of feature vectors.
    """

    total: np.ndarray
    outer: np.ndarray
    count: int

    @classmethod
    def empty(cls, features: int) -> "GaussianStats":
        """Statistics of no vectors of `features` numbers."""
        return cls(np.zeros(features), np.zeros((features, features)), 0)

    def add(self, batch: np.ndarray) -> "GaussianStats":
        """Return the statistics with a batch of features, floats (B,D), counted in.

        Raises: UserError if the shape differs or a number is not finite.
        """
        batch = np.asarray(batch, np.float64)
        check(batch.ndim == 2 and batch.shape[1] == self.total.size, "features.shape", batch.shape,
              f"(B, {self.total.size})")
        check(bool(np.isfinite(batch).all()), "features", "NaN or infinity", "finite",
              "look for broken images or a diverged model")
        return GaussianStats(self.total + batch.sum(0), self.outer + batch.T @ batch, self.count + len(batch))

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        """Return the statistics of both sets together, as from two hosts."""
        return GaussianStats(self.total + other.total, self.outer + other.outer, self.count + other.count)

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 (D,). Raises: UserError without a vector."""
        check(self.count >= 1, "count", self.count, "at least 1 image for a mean")
        return self.total / self.count

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance, as in FID, float64 (D,D). Raises: UserError below 2 vectors."""
        check(self.count >= 2, "count", self.count, "at least 2 images for a covariance")
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with mu (D,) and cov (D,D), in float64.

    |mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), never negative.
    Raises: UserError if shapes disagree or a number is not finite.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    square = mu1.shape * 2
    for name, array, shape in (("mu2", mu2, mu1.shape), ("cov1", cov1, square), ("cov2", cov2, square)):
        check(array.shape == shape, f"{name}.shape", array.shape, str(shape))
    check(all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)), "mean or covariance", "NaN or infinity",
          "finite")
    # With cov = F F^T, the trace of (cov1 cov2)^(1/2) is the sum of the singular values of F1^T F2. No root
    # of a rounding error is taken, so singular covariances (fewer images than features) lose no digits.
    cross = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def _factor(cov: np.ndarray) -> np.ndarray:
    """Return F, float64 (D,R), with F F^T = cov for a symmetric cov (D,D) of numerical rank R."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    # Eigenvalues below rounding are zeros of a singular covariance; their roots (1e-8 for 1e-16) are noise.
    kept = values > len(values) * np.finfo(np.float64).eps * max(values.max(), 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])
