"""The Frechet distance against closed forms, and its statistics against numpy over all features at once."""

import metric_cases
import numpy as np
import pytest
from refusal import refused

from ig_jax.evaluation.frechet import GaussianStats, frechet_distance


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def spd(size, seed):
    a = np.random.default_rng(seed).normal(size=(size, size + 3))
    return a @ a.T / size


def test_shifted_mean_alone_is_the_squared_distance():
    cov = spd(6, 0)
    shift = np.arange(6.0)
    assert frechet_distance(np.ones(6), cov, np.ones(6) + shift, cov) == pytest.approx(55.0, rel=1e-13)


def test_diagonal_gaussians():
    a, b = np.array([4.0, 9.0, 0.25, 1e-6]), np.array([1.0, 16.0, 0.0, 1e-2])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 4 * 0.5**2
    found = frechet_distance(np.zeros(4), np.diag(a), np.full(4, 0.5), np.diag(b))
    assert found == pytest.approx(expected, rel=1e-13)


def test_scalar_gaussians_by_hand():
    assert frechet_distance([1.0], [[9.0]], [3.0], [[4.0]]) == pytest.approx(4 + (3 - 2) ** 2, rel=1e-14)


def test_commuting_covariances():
    basis, rng = rotation(20), np.random.default_rng(1)
    a, b = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20)
    found = frechet_distance(np.zeros(20), basis * a @ basis.T, np.zeros(20), basis * b @ basis.T)
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_two_by_two_that_do_not_commute():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    # The eigenvalues p, q of AB are positive: (sqrt p + sqrt q)^2 = tr AB + 2 sqrt(det AB).
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(np.trace(a + b) - 2 * cross, rel=1e-13)


def test_rank_one_covariances_lose_no_digits():
    rng = np.random.default_rng(2)
    u, v = rng.normal(size=(2, 64))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    found = frechet_distance(np.zeros(64), np.outer(u, u), np.zeros(64), np.outer(v, v))
    assert found == pytest.approx(expected, rel=1e-13)
    v -= u * (u @ v) / (u @ u)  # no direction in common: the cross term vanishes
    found = frechet_distance(np.zeros(64), np.outer(u, u), np.zeros(64), np.outer(v, v))
    assert found == pytest.approx(u @ u + v @ v, rel=1e-13)


def test_fewer_images_than_features():
    features = np.random.default_rng(3).normal(size=(12, 100))
    stats = GaussianStats.empty(100).add(features)
    assert frechet_distance(stats.mean, stats.cov, stats.mean, stats.cov) < 1e-11
    found = frechet_distance(stats.mean, stats.cov, stats.mean + 0.1, stats.cov)
    assert found == pytest.approx(1.0, rel=1e-11)
    # Scaling the features by c moves every standard deviation by the same factor.
    found = frechet_distance(stats.mean, stats.cov, stats.mean, 2.25 * stats.cov)
    assert found == pytest.approx(0.25 * np.trace(stats.cov), rel=1e-11)


def test_point_masses():
    zero = np.zeros((3, 3))
    assert frechet_distance([0, 0, 0], zero, [1, 2, 2], zero) == 9.0
    assert frechet_distance([0, 0, 0], zero, [0, 0, 0], np.eye(3)) == pytest.approx(3.0, rel=1e-14)


def test_common_rotation_and_exchange_change_nothing():
    turn, a, b = rotation(30, 5), spd(30, 6), spd(30, 7)
    mu = np.random.default_rng(8).normal(size=30)
    plain = frechet_distance(mu, a, np.zeros(30), b)
    assert plain > 1
    assert frechet_distance(turn @ mu, turn @ a @ turn.T, np.zeros(30), turn @ b @ turn.T) == pytest.approx(
        plain, rel=1e-12
    )
    assert frechet_distance(np.zeros(30), b, mu, a) == pytest.approx(plain, rel=1e-12)


def test_streaming_equals_one_shot_in_any_order():
    # A mean far larger than the spread, in float32 as a network gives it.
    features = (np.random.default_rng(9).normal(size=(1003, 16)) + 100).astype(np.float32)
    exact = features.astype(np.float64)
    streamed = GaussianStats.empty(16)
    for start in range(0, 1003, 100):
        streamed = streamed.add(features[start : start + 100])
    shuffled = GaussianStats.empty(16)
    for part in np.array_split(np.random.default_rng(10).permutation(features), 7):
        shuffled = shuffled.add(part)
    merged = GaussianStats.empty(16).add(features[:1]).merge(GaussianStats.empty(16).add(features[1:]))
    for stats in (streamed, shuffled, merged):
        assert stats.count == 1003 and stats.scatter.dtype == np.float64
        np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-13)
        np.testing.assert_allclose(stats.cov, np.cov(exact, rowvar=False), atol=1e-9)
        assert frechet_distance(stats.mean, stats.cov, exact.mean(0), np.cov(exact, rowvar=False)) < 1e-8


def test_adding_leaves_the_old_statistics_alone():
    empty = GaussianStats.empty(2)
    empty.add(np.ones((3, 2)))
    assert empty.count == 0 and not empty.center.any() and not empty.scatter.any()


@pytest.mark.parametrize("name", metric_cases.CASES["frechet"])
def test_the_cases_of_the_published_evaluators(name):
    case = metric_cases.CASES["frechet"][name]
    x, y = (metric_cases.features(*case[key]) for key in "xy")
    whole, parts = GaussianStats.empty(x.shape[1]).add(x), GaussianStats.empty(x.shape[1])
    for part in np.array_split(y[::-1], 3):
        parts = parts.add(part)
    found = frechet_distance(whole.mean, whole.cov, parts.mean, parts.cov)
    assert found == pytest.approx(case["exact"], rel=1e-11, abs=1e-11)


def test_what_is_no_covariance_is_refused():
    bad, good = np.eye(3), (np.zeros(3), np.eye(3))
    bad[0, 1] = 0.1
    with refused("cov1", expected="symmetric"):
        frechet_distance(np.zeros(3), bad, *good)
    with refused("cov1", "with a negative eigenvalue"):
        frechet_distance(np.zeros(3), np.diag([1.0, 2.0, -1.0]), *good)


def test_what_cannot_be_measured_is_refused():
    empty = GaussianStats.empty(2)
    with refused("count", 0):
        _ = empty.mean
    with refused("count", 1):
        _ = empty.add(np.ones((1, 2))).cov
    with refused("features", expected="finite"):
        empty.add(np.array([[1.0, np.nan]]))
    with refused("features.shape", (3, 4)):
        empty.add(np.ones((3, 4)))
    with refused("cov2.shape", (3, 3)):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(3))
    with refused("mean or covariance", expected="finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.inf]), np.eye(2))
