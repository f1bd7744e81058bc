"""The study of internal guidance on Fashion-MNIST whose results are in configs/RESULTS.md; launch/fashion.sh calls it.

.venv/bin/python launch/fashion.py shrink FOLDER DATA    the four IDX files, padded to 32x32 and averaged to 16x16
.venv/bin/python launch/fashion.py measure OUT SEED      OUT/SEED/rows.jsonl of the networks in OUT/SEED
.venv/bin/python launch/fashion.py report OUT            OUT/table.md, OUT/fashion_mnist.json and two pictures
"""

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ig_jax.base.files import append_lines, atomic_file, write_text
from ig_jax.data.dataset import DataConfig, open_split
from ig_jax.data.formats.idx import IDX_FILES
from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels
from ig_jax.evaluation import classifier
from ig_jax.evaluation.metrics import Agreement, FrechetDistance
from ig_jax.evaluation.rows import precision_recall
from ig_jax.generation import pretrained
from ig_jax.generation.captions import guidance
from ig_jax.generation.labels import labels_for
from ig_jax.pictures.images import grid, write_png

SEEDS, CLASSES, SIDE = (0, 1, 2), 10, 16
COUNTS = {"train": 60_000, "test": 10_000}
SAMPLES, BATCH = 10_000, 250
WEAK = 500  # step of the checkpoint that guides in autoguidance
LATE, EARLY = [0.3, 1.0], [0.0, 0.7]  # intervals of sigma-time without the last steps, and without the first
PLAIN, KINDS = "no guidance", {"ig": "IG", "cfg": "CFG", "auto": "autoguidance"}
TICKS = (0.7, 1, 1.5, 2, 3, 5, 7)  # of FD-CNN in the picture
METRICS = ("fd_cnn", "agreement", "precision", "recall")


def ig(*scales: float, **more) -> list[dict]:
    return [dict(ig_scale=w, **more) for w in scales]


def cfg(*scales: float, **more) -> list[dict]:
    return [dict(cfg_scale=s, **more) for s in scales]


HEAD = [
    *ig(1.25, 1.5, 2.0, 2.5, 3.0),
    *ig(1.5, 2.0, ig_interval=LATE),
    *ig(2.0, ig_interval=EARLY),
    *cfg(1.1, 1.25, 1.5),
    *cfg(1.5, cfg_interval=EARLY),
    *(dict(auto_scale=scale) for scale in (1.25, 1.5)),
    *ig(1.25, 1.5, cfg_scale=1.1),
    *ig(1.5, cfg_scale=1.25),
]
RUNS = {  # what each network is, and the guidance of its samples beside none
    "plain": ("no head", []),
    "head1": ("head after block 1", ig(1.25, 1.5, 2.0, 3.0)),
    "head2": ("head after block 2", HEAD),
    "head4": ("head after block 4", ig(1.25, 1.5, 2.0, 3.0)),
    "accelerated": ("head after block 2, accelerated target", ig(1.25, 1.5, 2.0)),
}
NONE = dict(ig_scale=1.0, cfg_scale=1.0)
SHOWN = [NONE, *ig(2.0), *cfg(1.25), dict(auto_scale=1.5), *ig(1.5, cfg_scale=1.1)]  # rows of the picture of samples


def shrink(folder: str, data: str) -> None:
    """IDX files of 28x28 images as IDX files of 16x16 ones."""
    Path(data).mkdir(parents=True, exist_ok=True)
    for split, names in IDX_FILES.items():
        found = opened(folder, split, side=2 * SIDE, pad=2).gather(np.arange(COUNTS[split]))
        images = found["image"].reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4), dtype=np.float32)
        for name, array in zip(names, (np.round(images).astype(np.uint8), found["label"].astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            with atomic_file(Path(data) / f"{name}.gz") as file:
                file.write(gzip.compress(header + array.tobytes(), mtime=0))


def opened(folder: str | Path, split: str, side: int = SIDE, pad: int = 0) -> Source:
    """One split of the four IDX files in a folder."""
    config = DataConfig("idx", "", str(folder), "train", "test", BATCH, pad, True, "pixels", "uint8", False)
    return open_split(config, split, pixels((side, side, 1), tuple(map(str, range(CLASSES))), mirrored=False))


def measure(out: str, seed: str) -> None:
    """A line for each network and guidance, all from the same noise; what is there is not measured again."""
    train, test = (opened(Path(out) / "data", split) for split in ("train", "test"))
    net = classifier.trained_once(train, test, Path(out))
    reference, nearest = FrechetDistance("features", None), np.empty((0, classifier.FEATURES), np.float32)
    for images, _ in classifier.batches(train):
        found = net(images)
        reference, nearest = reference.update(found), np.concatenate([nearest, found["features"]])[:SAMPLES]

    def numbers(images: np.ndarray, labels: np.ndarray) -> dict:
        found = net(images) | {"label": labels}
        distance = FrechetDistance("features", reference.stats).update(found).compute()
        within = precision_recall(found["features"], nearest)
        agreement = Agreement().update(found).compute()
        return dict(fd_cnn=distance, agreement=agreement, precision=within.precision, recall=within.recall)

    rows, labels = Path(out) / seed / "rows.jsonl", labels_for(np.arange(SAMPLES), "balanced", CLASSES, 0)
    done = [(row["run"], row["asked"]) for row in read(rows)]
    if ("real", {}) not in done:
        real = test.gather(np.arange(SAMPLES))
        append(rows, dict(run="real", asked={}, setting="test images", **numbers(real["image"], real["label"])))
    for run, (_, guided) in RUNS.items():
        model = trained(out, seed, run)
        for asked in (asked for asked in [NONE, *guided] if (run, asked) not in done):
            recipe = model.recipe.replace(**(NONE | asked))
            images = model.sample(labels, recipe, batch_size=BATCH)
            row = dict(run=run, asked=asked, setting=guidance(recipe), **numbers(images, labels))
            append(rows, row | dict(made=model.metadata(recipe, seed=0, classifier=net.checksum)))


def trained(out: str, seed: str, run: str) -> pretrained.Pretrained:
    """The network of a run, and its own checkpoint of step WEAK for autoguidance."""
    folder = Path(out) / seed / run
    return pretrained.load(folder, auto_checkpoint=folder / "checkpoints" / str(WEAK))


def read(rows: Path) -> list[dict]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def append(rows: Path, row: dict) -> None:
    append_lines(rows, [row])
    print(f"{row['run']:<12} {row['setting']:<32} " + "  ".join(f"{key} {row[key]:.3f}" for key in METRICS), flush=True)


def report(out: str) -> None:
    """The mean and the standard deviation over the seeds of every number, as a table and a picture."""
    folder = Path(out)
    found = [read(folder / str(seed) / "rows.jsonl") for seed in SEEDS]
    lines = [dict(network=dict(RUNS, real=("", []))[row["run"]][0], **row) for row in found[0]]
    for line in lines:
        same = [row for rows in found for row in rows if (row["run"], row["asked"]) == (line["run"], line["asked"])]
        line |= {key: [row[key] for row in same] for key in METRICS}
        line["checkpoints"] = [row["made"]["checkpoint"]["digest"] for row in same if "made" in row]  # one a seed
    write_text(folder / "table.md", table(lines))
    write_text(folder / "fashion_mnist.json", json.dumps(lines, indent=1))
    draw(lines, folder / "fashion_mnist.png")
    samples(out, folder / "fashion_mnist_samples.png")
    print((folder / "table.md").read_text())


def table(lines: list[dict]) -> str:
    """Markdown, a row for each network and guidance."""
    rows = ["| network | guidance | FD-CNN | agreement % | precision | recall |", "|---|---|---|---|---|---|"]
    for line in lines:
        cells = [
            spread(line["fd_cnn"], ".2f"),
            spread([100 * value for value in line["agreement"]], ".1f"),
            spread(line["precision"], ".3f"),
            spread(line["recall"], ".3f"),
        ]
        rows.append(f"| {line['network']} | {line['setting'].replace('AUTO', 'autoguidance')} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(values: list[float], form: str) -> str:
    """The mean, and unless all are the same the standard deviation."""
    mean = format(np.mean(values), form)
    return mean if len(set(values)) == 1 else f"{mean} ± {np.std(values, ddof=1):{form}}"


def draw(lines: list[dict], path: Path) -> None:
    """FD-CNN against w for each head, and against class agreement for each kind of guidance."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in ("head1", "head2", "head4", "accelerated"):
        chosen = [line for line in lines if line["run"] == run and set(line["asked"]) <= set(NONE)]
        points = [(line["asked"]["ig_scale"], line["fd_cnn"]) for line in chosen if kind(line) in (PLAIN, "IG")]
        w, found = zip(*sorted(points))
        left.errorbar(w, np.mean(found, 1), np.std(found, 1, ddof=1), marker="o", capsize=3, label=RUNS[run][0])
    left.set(xlabel="scale w of internal guidance (1 is none)", ylabel="FD-CNN, lower is better", yscale="log")
    for name in (PLAIN, "IG", "CFG", "autoguidance", "IG + CFG"):
        chosen = [line for line in lines if line["run"] == "head2" and kind(line) == name]
        points = [(100 * np.mean(line["agreement"]), np.mean(line["fd_cnn"])) for line in chosen]
        right.scatter(*zip(*points), label=name)
    right.set(xlabel="class agreement, % (head after block 2, every setting)", ylabel="FD-CNN", yscale="log")
    for axes in (left, right):
        axes.set_yticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=80, format="png")


def kind(line: dict) -> str:
    """The guidance rules of a row, by their names."""
    on = [name for name in KINDS if line["asked"].get(f"{name}_scale", 1.0) != 1.0]
    return " + ".join(KINDS[name] for name in on) or PLAIN


def samples(out: str, path: Path) -> None:
    """Two images of each class, a row for each of SHOWN, from the same noise."""
    model = trained(out, "0", "head2")
    labels = np.repeat(np.arange(CLASSES), 2)
    rows = [model.sample(labels, model.recipe.replace(**(NONE | asked))) for asked in SHOWN]
    write_png(path, grid(np.concatenate(rows), columns=len(labels), zoom=3))


if __name__ == "__main__":
    {"shrink": shrink, "measure": measure, "report": report}[sys.argv[1]](*sys.argv[2:])
