"""Text tables of an evaluation, with what is needed to read them."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ig_jax.base.errors import check
from ig_jax.base.files import write_text
from ig_jax.evaluation.metrics import METRICS
from ig_jax.evaluation.sweep import best

WIDTH = 100  # columns


def stored(out: Path, what: dict) -> dict:
    """What table.json holds, with rows of other checkpoints; no row where it is not there.

    what: all that decides the rows beside their checkpoint.
    Raises: UserError for a table of other samples, data or scales.
    """
    what = json.loads(json.dumps(what))
    if not (out / "table.json").exists():
        return {"what": what, "rows": []}
    found = json.loads((out / "table.json").read_text())
    for name in what:
        expected = f"{found['what'].get(name)!r}, as of the rows that are in {out / 'table.json'}"
        check(what[name] == found["what"].get(name), name, what[name], expected, "choose another --out")
    return found


def holds(table: dict, whose: dict, out: Path) -> bool:
    """Whether a table has the rows of a checkpoint.  Raises: UserError where it has another of the same step."""
    of_step = [row["checkpoint"] for row in table["rows"] if (row["step"], row["ema"]) == (whose["step"], whose["ema"])]
    same, expected = whose["checkpoint"] in of_step, f"that of {out / 'table.json'}, which has rows of another run"
    check(same or not of_step, f"step {whose['step']}", whose["checkpoint"][:12], expected, "choose another --out")
    return same


def write(out: Path, table: dict) -> None:
    """table.json and table.txt."""
    texts = {"table.txt": summary(table["rows"], table["real"]), "table.json": json.dumps(table, indent=2)}
    for name, text in texts.items():
        write_text(out / name, text)


def summary(rows: Sequence[dict], real: dict) -> str:
    """All rows of a sweep below the row of the real test images, then the best of each kind and what follows."""
    for key, word in (("step", "step"), ("ema", "EMA")):  # where they differ
        if len({row.get(key) for row in rows}) > 1:
            rows = [row | {"setting": f"{word} {row[key]}: {row['setting']}"} for row in rows]
    lowest = min(rows, key=lambda row: row["fd_cnn"])
    rows = [row | {"best": row is lowest} for row in rows]
    kinds = [kind for kind in ("none", "CFG", "IG", "IG+CFG") if any(row["kind"] == kind for row in rows)]
    chosen = {kind: best(rows, kind) for kind in kinds}
    lines = [
        table([real, *rows]),
        "",
        "* the lowest FD-CNN",
        *_notes([real, *rows]),
        "",
        "Best of each kind. The scales were chosen by this metric on these samples, which favours every guided row:",
        table([real, *chosen.values()]),
    ]
    if "IG" in chosen:
        guided = chosen["IG"]
        same = [row for row in rows if row.get("checkpoint") == guided.get("checkpoint")]
        lines += ["", *_wrapped(conclusion(best(same, "none"), guided, real))]
    return "\n".join(lines)


def conclusion(plain: dict, guided: dict, real: dict) -> str:
    """What the best row with internal guidance shows against the row without guidance, and no more than that."""
    chance = 1 / real["num_classes"]
    verdicts = (
        ("No conclusion", "real test images", real),
        ("Not trained yet", "samples with internal guidance", guided),
    )
    for verdict, what, row in verdicts:
        if row["agreement"] < 2 * chance:
            share = f"the CNN finds the label of {row['agreement']:.1%} of the {what}"
            return f"{verdict}: {share}, hardly better than guessing ({chance:.1%})."
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
    marks = ["* " if row.get("best") else "" for row in rows]
    columns = {"setting": [m + textwrap.shorten(row["setting"], 48, placeholder="...") for m, row in zip(marks, rows)]}
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
