"""Metrics: any batches, several processes, storage, and new ones added in one place."""

import dataclasses
import pickle

import numpy as np
import pytest
from refusal import refused

from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels
from ig_jax.evaluation import metrics, report, sweep
from ig_jax.evaluation.frechet import frechet_distance


@dataclasses.dataclass(frozen=True)
class Brightness:
    """A toy metric: the mean pixel, less that of the reference images."""

    reference: float = 0.0
    total: float = 0.0
    count: int = 0

    def update(self, batch):
        total = self.total + batch["image"].mean((1, 2, 3), dtype=np.float64).sum()
        return dataclasses.replace(self, total=total, count=self.count + len(batch["image"]))

    def merge(self, other):
        return dataclasses.replace(self, total=self.total + other.total, count=self.count + other.count)

    def compute(self):
        return self.total / self.count - self.reference


class Halves:
    """A feature network that needs no training: the mean of each half, and the brighter one as the class."""

    checksum, test_accuracy, num_classes = "ab" * 32, 1.0, 2

    def __call__(self, images):
        halves = images.reshape(len(images), 2, -1).mean(-1, dtype=np.float64)
        return {"features": halves, "prediction": halves.argmax(-1)}


def data(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), rng.integers(0, 2, count)


def source(images, labels):
    return Source(
        pixels((4, 4, 1), ("0", "1")), len(images), lambda rows: {"image": images[rows], "label": labels[rows]}
    )


def batches(count, size, seed=0):
    images, labels = data(count, seed)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        yield Halves()(images[rows]) | {"image": images[rows], "label": labels[rows]}


def updated(metric, found):
    for batch in found:
        metric = metric.update(batch)
    return metric


def fresh(name):
    entry = metrics.METRICS[name]
    return entry.make(updated(entry.make(None), batches(50, 50, seed=1)))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_batches_processes_and_files_change_nothing(name):
    whole = updated(fresh(name), batches(60, 60)).compute()
    assert whole > 0
    assert updated(fresh(name), batches(60, 7)).compute() == pytest.approx(whole, rel=1e-12)
    found = list(batches(60, 10))
    first, second = updated(fresh(name), found[:2]), updated(fresh(name), found[2:])
    first = pickle.loads(pickle.dumps(first))  # as stored, or sent by another process
    assert first.merge(second).compute() == pytest.approx(whole, rel=1e-12)
    assert second.merge(first).merge(fresh(name)).compute() == pytest.approx(whole, rel=1e-12)
    assert fresh(name).merge(first).merge(second).compute() == pytest.approx(whole, rel=1e-12)


def test_the_metrics_are_what_they_are_called():
    images, labels = data(60, 0)
    found, other = Halves()(images), Halves()(data(50, 1)[0])["features"]
    own = found["features"]
    distance = frechet_distance(own.mean(0), np.cov(own.T), other.mean(0), np.cov(other.T))
    assert updated(fresh("fd_cnn"), batches(60, 60)).compute() == pytest.approx(distance, rel=1e-12)
    agreement = (found["prediction"] == labels).mean()
    assert updated(fresh("agreement"), batches(60, 60)).compute() == agreement


def test_a_sum_of_many_features_is_kept_in_float64():
    metric = metrics.METRICS["fd_cnn"].make(None)
    for _ in range(100):
        metric = metric.update({"features": np.full((1000, 1), 1.1, np.float32)})
    assert metric.stats.mean[0] == pytest.approx(float(np.float32(1.1)), rel=1e-14)


def test_too_few_images_are_refused():
    for name in metrics.METRICS:
        with refused("count", 0):
            fresh(name).compute()


def test_a_metric_is_added_by_one_entry(monkeypatch):
    """Registered from outside the package, it is measured, compared with the reference, stored and printed."""
    toy = metrics.Entry(
        lambda reference: Brightness(reference.compute() if reference else 0.0), "brightness", "{:+.1f}".format
    )
    monkeypatch.setitem(metrics.METRICS, "brightness", toy)
    train, test, (images, labels) = data(50, 1), data(30, 2), data(60, 0)
    evaluator = sweep.Evaluator.of(Halves(), source(*train), source(*test))
    row = {"setting": "none", **evaluator.score([(images, labels)], 60, few=30)}
    assert row["brightness"] == pytest.approx(images.mean() - train[0].mean())
    assert row["brightness_at_floor_n"] == pytest.approx(images[:30].mean() - train[0].mean())
    table = report.table([evaluator.real(30), row])
    assert "brightness" in table.splitlines()[0] and f"{row['brightness']:+.1f}" in table.splitlines()[3]
