"""Text tables of an evaluation, with what is needed to read them."""

import textwrap
from collections.abc import Sequence

import numpy as np

from ig_jax.base.errors import check
from ig_jax.evaluation.metrics import METRICS
from ig_jax.evaluation.sweep import best

WIDTH = 100  # columns


def summary(rows: Sequence[dict], real: dict) -> str:
    """All rows of a sweep below the row of the real test images, then the best of each kind and what follows."""
    kinds = [kind for kind in ("none", "CFG", "IG", "IG+CFG") if any(row["kind"] == kind for row in rows)]
    chosen = {kind: best(rows, kind) for kind in kinds}
    lines = [
        table([real, *rows]),
        "",
        *_notes([real, *rows]),
        "",
        "Best of each kind. The scales were chosen by this metric on these samples, which favours every guided row:",
        table([real, *chosen.values()]),
    ]
    if "IG" in chosen:
        lines += ["", *_wrapped(conclusion(chosen["none"], chosen["IG"], real))]
    return "\n".join(lines)


def conclusion(plain: dict, guided: dict, real: dict) -> str:
    """What the best row with internal guidance shows against the row without guidance, and no more than that."""
    chance = 1 / real["num_classes"]
    for what, row in (("real test images", real), ("samples with internal guidance", guided)):
        guessing = chance + 3 * np.sqrt(chance * (1 - chance) / row["count"])  # three standard deviations above it
        if row["agreement"] <= guessing:
            share = f"the CNN finds the label of {row['agreement']:.1%} of the {what}"
            return f"No conclusion: {share}, no better than guessing ({chance:.1%})."
    before, after = plain["fd_cnn"], guided["fd_cnn"]
    if after >= before:
        return f"Internal guidance does not lower FD-CNN here: {before:.2f} without guidance, {after:.2f} at best."
    return (
        f"Internal guidance lowers FD-CNN from {before:.2f} to {after:.2f} ({guided['setting']}), with as many network "
        "evaluations as without guidance."
    )


def table(rows: Sequence[dict]) -> str:
    """Rows of Evaluator as plain text of at most 100 columns.

    Raises: UserError without rows, or if rows come from different classifiers or references.
    """
    check(len(rows) > 0, "rows", rows, "at least one")
    for key in ("classifier", "reference_count"):
        found = sorted({str(row[key]) for row in rows})
        check(len(found) == 1, key, found, "the same for all rows", "score them again with one classifier")
    few = min(row["count"] for row in rows)
    columns = {"setting": [textwrap.shorten(row["setting"], 50, placeholder="...") for row in rows]}
    for name, entry in METRICS.items():
        columns[entry.title] = [entry.shown(row[name]) for row in rows]
        if entry.biased:
            at_few = [row[name] if row["count"] == few else row[f"{name}_at_floor_n"] for row in rows]
            columns[f"at n={few:,}"] = [entry.shown(value) for value in at_few]
    columns["n"] = [f"{row['count']:,}" for row in rows]
    aligned = []
    for title, cells in columns.items():
        width = max(len(title), 8, *map(len, cells))
        aligned.append([f"{cell:<{width}}" if title == "setting" else f"{cell:>{width}}" for cell in (title, *cells)])
    header, *lines = ("  ".join(cells) for cells in zip(*aligned))
    return "\n".join([header, "-" * len(header), *lines])


def _notes(rows: Sequence[dict]) -> list[str]:
    """How to read the columns, wrapped."""
    first = rows[0]
    notes = [
        f"FD-CNN: Frechet distance to {first['reference_count']:,} real training images on the features of a small "
        "CNN; lower is better. It is not FID.",
        f"agreement: images that the CNN assigns to the requested class. The CNN is right on "
        f"{100 * first['classifier_accuracy']:.1f} % of the real test images (sha256 {first['classifier'][:8]}).",
    ]
    if len({row["count"] for row in rows}) > 1:
        notes.append("n differs between rows and fewer images raise FD-CNN: compare at equal n.")
    return [line for note in notes for line in _wrapped(note)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
