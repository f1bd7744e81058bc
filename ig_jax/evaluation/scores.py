"""FD-CNN and class agreement of samples, the floor real images reach, and the table that shows them."""

import textwrap
from collections.abc import Sequence

import numpy as np

from ig_jax.errors import check
from ig_jax.evaluation import features, frechet


def reference_stats(classifier: features.Classifier, train_images: np.ndarray) -> frechet.GaussianStats:
    """Feature statistics of the real train split, uint8 (N,H,W,C): what every FD-CNN is measured against."""
    return _stats(features.features_and_predictions(classifier, train_images)[0])


def score(classifier: features.Classifier, reference: frechet.GaussianStats, images: np.ndarray,
          labels: np.ndarray) -> dict:
    """Score images, uint8 (N,H,W,C), made for the labels, integers (N,).

    Returns fd_cnn (Frechet distance of CNN features to the reference, at least 0), agreement (fraction 0..1
    to which the CNN gives the asked label), count and reference_count (images), classifier (checksum) and
    classifier_accuracy (fraction 0..1 on real test images): all that is needed to read the numbers later.
    Raises: UserError if there are fewer than 2 images, or shapes disagree.
    """
    labels = np.asarray(labels)
    check(labels.shape == (len(images),), "labels.shape", labels.shape, f"({len(images)},), one an image")
    found, predictions = features.features_and_predictions(classifier, images)
    stats = _stats(found)
    return {
        "fd_cnn": frechet.frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov),
        "agreement": float((predictions == labels).mean()),
        "count": stats.count,
        "reference_count": reference.count,
        "classifier": classifier.checksum,
        "classifier_accuracy": classifier.test_accuracy,
    }


def real_floor(classifier: features.Classifier, reference: frechet.GaussianStats, test_images: np.ndarray,
               test_labels: np.ndarray) -> dict:
    """Score all held-out real images, uint8 (N,H,W,C), as if they were samples: a row for `table`."""
    return {"setting": "real test images", **score(classifier, reference, test_images, test_labels)}


def table(rows: Sequence[dict]) -> str:
    """Lay out rows of `score`, each with a `setting`, as plain text of at most 100 columns with notes below.

    Rows of more images than the smallest also need `fd_cnn_at_floor_n`, their FD-CNN at that smallest count.

    Raises: UserError without rows, or if rows come from different classifiers or references.
    """
    check(len(rows) > 0, "rows", rows, "at least one")
    for key in ("classifier", "reference_count"):
        found = sorted({str(row[key]) for row in rows})
        check(len(found) == 1, key, found, "the same for all rows", "score them again with one classifier")
    settings = [textwrap.shorten(row["setting"], 50, placeholder="...") for row in rows]
    width = max(map(len, [*settings, "setting"]))
    few = min(row["count"] for row in rows)
    lines = [f"{'setting':<{width}}  {'FD-CNN':>8}  {f'at n={few:,}':>10}  {'agreement %':>11}  {'n':>7}"]
    lines.append("-" * len(lines[0]))
    for setting, row in zip(settings, rows):
        at_few = row["fd_cnn"] if row["count"] == few else row["fd_cnn_at_floor_n"]
        lines.append(f"{setting:<{width}}  {row['fd_cnn']:>8.2f}  {at_few:>10.2f}  "
                     f"{100 * row['agreement']:>11.1f}  {row['count']:>7,}")
    return "\n".join([*lines, "", *_notes(rows)])


def _notes(rows: Sequence[dict]) -> list[str]:
    """Sentences that say how to read the rows, wrapped at 100 columns."""
    first = rows[0]
    notes = [
        f"FD-CNN: Frechet distance to {first['reference_count']:,} real training images on the "
        f"{features.FEATURES} features of a small CNN; lower is better. It is not FID.",
        f"agreement: images to which the CNN gives the label asked for. The CNN is right on "
        f"{100 * first['classifier_accuracy']:.1f} % of real test images (sha256 {first['classifier'][:8]}).",
    ]
    if len({row["count"] for row in rows}) > 1:
        notes.append("n differs between rows and fewer images raise FD-CNN: compare with the real images in the "
                     "column of equal n.")
    return [line for note in notes for line in textwrap.wrap(note, 100, subsequent_indent="  ")]


def _stats(found: np.ndarray) -> frechet.GaussianStats:
    """Statistics of features, float32 (N,64)."""
    return frechet.GaussianStats.empty(found.shape[1]).add(found)
