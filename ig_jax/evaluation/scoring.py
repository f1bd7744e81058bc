"""All metrics of one set of images against a reference, on the features of Inception."""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.base.errors import check
from ig_jax.base.progress import Progress
from ig_jax.base.versions import versions
from ig_jax.diffusion.recipe import Recipe
from ig_jax.evaluation import rows as row_metrics
from ig_jax.evaluation.features import InceptionNet, Store, stream
from ig_jax.evaluation.frechet import GaussianStats, frechet_distance
from ig_jax.evaluation.image_sets import ImageSet
from ig_jax.evaluation.inception_score import SHUFFLED, InceptionScore
from ig_jax.evaluation.metrics import FrechetDistance
from ig_jax.evaluation.reference import Moments, Reference, read_reference
from ig_jax.generation.folder import IDENTITY
from ig_jax.generation.pretrained import Pretrained
from ig_jax.models.inception import FEATURES
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import make_mesh

Batches = Callable[[int], Iterator[tuple[np.ndarray, Any]]]  # from an index on: (indices (b,), images (B, H, W, C))
Notes = list[tuple[str, str]]
# The numbers of metrics.json, in its order; null where one was not asked for or cannot be had.
KEYS = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std", "mind")
FEW = 10_000  # images below which FID is seldom reported
SORTED = 0.05  # relative difference of the two Inception Scores that the order of the images explains


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the metrics need of one set of images."""

    count: int
    stats: dict[str, GaussianStats]  # of "pool" and "spatial"
    rows: np.ndarray  # float32 (N, 2048)
    in_order: row_metrics.Spread  # Inception Score in ADM's parts
    shuffled: row_metrics.Spread | None  # in torch-fidelity's; None below 10 images

    def moments(self, feature: str) -> Moments:
        """Mean and covariance.  Raises: UserError below 2 images."""
        return Moments(self.stats[feature].mean, self.stats[feature].cov)


def measure(net: InceptionNet, batches: Batches, count: int, folder: Path, what: dict) -> Measured:
    """Measure images 0..count-1; a killed run resumes from the features in `folder`, which are of `what`.

    Raises: UserError for fewer than 2 images, for features that are not finite, and for a folder of something else.
    """
    check(count >= 2, "count", count, "at least 2 images for a covariance")
    store = Store(folder, what | {"inception": net.digest, "count": count})
    metrics: dict[str, Any] = {name: FrechetDistance(name, None) for name in ("pool", "spatial")}
    metrics |= {"rows": row_metrics.Rows("pool"), "in_order": InceptionScore.in_order(count)}
    if count >= SHUFFLED:
        metrics["shuffled"] = InceptionScore.shuffled(count)
    done = store.done

    def update(part: dict[str, np.ndarray]) -> None:
        for name, metric in metrics.items():
            metrics[name] = metric.update(part)

    for part in store.parts():
        update(part)
    with Progress(count, "images", start=done) as progress:
        for part in store.collect(stream(net, batches(done) if done < count else iter(())), progress):
            update(part)
    scores = {name: metrics[name].compute() for name in ("in_order", "shuffled") if name in metrics}
    stats = {name: metrics[name].stats for name in ("pool", "spatial")}
    return Measured(count, stats, metrics["rows"].compute(), scores["in_order"], scores.get("shuffled"))


def sampled(
    model: Pretrained, recipe: Recipe, labels: np.ndarray, seed: int, batch_size: int, start: int
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Batches of images from sample `start` on, on the devices; the next one is dispatched already."""
    asked: dict[str, Any] = dict(seed=seed, batch_size=batch_size, indices=np.arange(start, len(labels)))
    return model.decoded(recipe, labels[start:].tolist(), **asked)


def measure_set(net: InceptionNet, images: ImageSet, batch_size: int, folder: Path) -> Measured:
    """Measure a set of images."""

    def batches(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for indices, part in images.batches(start, batch_size):
            yield indices, net.padded(part, batch_size)

    return measure(net, batches, images.count, folder, {"images": images.digest})


def completed(reference: Reference, net: InceptionNet, batch_size: int, folder: Path) -> Reference:
    """The reference with statistics and rows measured from its images where it has none.

    Raises: UserError for statistics of another feature net.
    """
    same, fix = reference.net in (None, net.digest), "write it again with --write_reference"
    check(same, f"{reference.name} inception", reference.net, f"{net.digest}, the digest of --inception", fix)
    if reference.images is None or reference.rows is not None and reference.moments:
        return reference
    found = measure_set(net, reference.images, batch_size, folder)
    moments = reference.moments or {name: found.moments(name) for name in found.stats}
    return dataclasses.replace(reference, moments=moments, rows=found.rows)


class Yardstick:
    """What images are measured by, a reference and a feature net, each prepared when it is first needed, and once.

    batch_size: images that the net sees at once; folder: of the features of the reference while they are measured.
    """

    def __init__(self, reference: str, inception: str, batch_size: int, folder: Path):
        self.batch_size = batch_size
        self._reference, self._inception, self._folder = reference, inception, folder

    @functools.cached_property
    def reference(self) -> Reference:
        """The reference as it is stored.  Raises: UserError where it cannot be read."""
        return read_reference(self._reference)

    @functools.cached_property
    def net(self) -> InceptionNet:
        """The feature net, on all devices."""
        return InceptionNet(self._inception, make_mesh())

    @functools.cached_property
    def measured(self) -> Reference:
        """The reference with statistics and rows, of its images where it has none; see `completed`."""
        return completed(self.reference, self.net, self.batch_size, self._folder)

    def forget(self) -> None:
        """Remove the features of the reference from the disk."""
        shutil.rmtree(self._folder, ignore_errors=True)


def distances(samples: Measured, reference: Reference) -> dict[str, float | None]:
    """FID and sFID; None where the reference has no such statistics."""
    found: dict[str, float | None] = {"fid": None, "sfid": None}
    for key, feature in (("fid", "pool"), ("sfid", "spatial")):
        if feature in reference.moments:
            found[key] = frechet_distance(*samples.moments(feature), *reference.moments[feature])
    return found


def results(samples: Measured, reference: Reference, size: tuple[int, int] | None, notes: Notes) -> tuple[dict, dict]:
    """(the numbers by KEYS with the counts, how each was computed); what to mind is added to `notes`."""
    found: dict[str, Any] = dict.fromkeys(KEYS) | distances(samples, reference)
    how: dict[str, Any] = {}
    found["inception_score"] = samples.in_order.mean
    parts = -(-samples.count // 5000)
    found["inception_score_std"] = samples.in_order.std if parts > 1 else None
    how["inception_score"] = {"parts": parts, "of": 5000, "order": "as given", "logits": "without bias"}
    how["inception_score"]["shuffled_10_parts"] = samples.shuffled._asdict() if samples.shuffled else None
    if reference.rows is not None:
        found |= _of_rows(samples.rows, reference.rows, how, notes)
    found |= {"count": samples.count, "reference_count": reference.count}
    if reference.count is None and reference.rows is not None:
        found["reference_count"] = len(reference.rows)
    if not samples.stats["pool"].scatter.any():
        notes.append(("no_variance", "all samples have the same features"))
    if samples.count <= FEATURES:
        notes.append(("rank_deficient", f"{samples.count} images for {FEATURES} features: FID is far above its value"))
    elif samples.count < FEW:
        notes.append(("few_samples", f"FID of {samples.count:,} images is above that of 50,000"))
    if reference.size and size and reference.size != size:
        notes.append(("another_size", f"samples of {size}, reference images of {reference.size} pixels"))
    if samples.shuffled and parts > 1 and samples.in_order.mean < (1 - SORTED) * samples.shuffled.mean:
        notes.append(("sorted", "the Inception Score in order is far below the shuffled one: sorted by class?"))
    return found, how


def _of_rows(samples: np.ndarray, reference: np.ndarray, how: dict, notes: Notes) -> dict[str, float]:
    """Precision, recall, KID and MIND, as far as there are enough images."""
    found, least = {"mind": row_metrics.sliced_distance(samples, reference)}, min(len(samples), len(reference))
    how["mind"] = {"projections": row_metrics.PROJECTIONS, "seed": row_metrics.SEED, "images": least}
    if least > row_metrics.NEAREST:
        found |= row_metrics.precision_recall(samples, reference)._asdict()
        half = row_metrics.precision_recall(samples, reference, half=True)
        how["precision_recall"] = {"k": row_metrics.NEAREST, "arithmetic": "float64", "adm_float16": half._asdict()}
        how["precision_recall"]["reference_images"] = len(reference)
    if least >= 2:
        size = min(row_metrics.SUBSET, least)
        found["kid"], found["kid_std"] = row_metrics.kernel_distance(samples, reference, size=size)
        how["kid"] = {"subsets": row_metrics.SUBSETS, "size": size, "seed": row_metrics.SEED}
        if size < row_metrics.SUBSET:
            notes.append(("small_subsets", f"KID on subsets of {size} images, not {row_metrics.SUBSET}"))
    return found


def recipe_of(made: dict, reference: Reference, net: InceptionNet, how: dict, notes: Notes) -> dict:
    """Everything a number needs beside it."""
    return {
        "samples": made,
        "reference": {"name": reference.name, "digest": reference.digest, "size": reference.size},
        "inception": net.digest,
        "resize": "TensorFlow 1 bilinear to 299, in float32",
        "metrics": how,
        "warnings": [{"name": name, "text": text} for name, text in notes],
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def check_same(out: Path, made: dict) -> None:
    """Raise UserError where metrics.json has the numbers of other samples."""
    if (out / "metrics.json").exists():
        there = json.loads((out / "metrics.json").read_text())["recipe"]["samples"]
        keys = (*IDENTITY, "num", "labels_sha256")
        what = lambda made: made.get("digest") or {key: made["recipe"].get(key) for key in keys}
        expected = "a directory without the numbers of other samples"
        check(what(there) == what(made), "--out", str(out), expected, "choose another --out")


def report(notes: Notes) -> None:
    """Print warnings by their names."""
    if processes.is_first():
        for name, text in notes:
            print(f"ig_jax: warning: {name}: {text}", file=sys.stderr, flush=True)
