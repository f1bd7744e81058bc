"""Measure samples of a checkpoint against real held-out images, over a sweep of guidance scales.

  python -m ig_jax.evaluate --checkpoint=runs/digits --out=runs/digits/evaluation
  python -m ig_jax.evaluate --checkpoint=runs/converted --data=ig_digits --out=runs/converted/evaluation

The number is FD-CNN: the Frechet distance on the features of a small CNN trained on the real train split (its
checksum stands beside every number). It is not FID. Writes table.txt and table.json.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
from absl import flags

from ig_jax import cli, pretrained
from ig_jax.data.dataset import DataConfig, open_split
from ig_jax.errors import UserError, check
from ig_jax.evaluation import features, scores, sweep
from ig_jax.files import atomic_file, writing
from ig_jax.generation import decode
from ig_jax.generation.labels import labels_for
from ig_jax.progress import Progress

FLAGS = flags.FlagValues()
_define = {"flag_values": FLAGS}
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Work directory of a run, or one of its steps.", **_define)
OUT = flags.DEFINE_string("out", None, "Directory to write to; the classifier is kept there too.", **_define)
NUM = flags.DEFINE_integer("num", 2000, "Images for each recipe, class-balanced.", **_define)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", **_define)
BATCH = flags.DEFINE_integer("batch_size", 500, "Images in one pass of the program, over all devices.", **_define)
DATA = flags.DEFINE_string(
    "data", "", "TFDS name of labelled real images of the same classes; those it was trained on where not given, which "
    "of a converted checkpoint nobody knows.", **_define)
AUTOENCODER = flags.DEFINE_string("autoencoder", "", "Decoder of a model of latents, as for sample.", **_define)
EMA = flags.DEFINE_string("ema", "", "Which EMA, by its decay; the first where not given.", **_define)
IG_SCALES = flags.DEFINE_list("ig_scales", ["1.5", "2", "2.5"], "w of internal guidance to try.", **_define)
CFG_SCALES = flags.DEFINE_list("cfg_scales", ["1.1", "1.25", "1.5"], "s of classifier-free guidance to try.", **_define)


def main() -> None:
    cli.required(CHECKPOINT), cli.required(OUT)
    check(NUM.value >= 2, "--num", NUM.value, "at least 2 images")
    check(BATCH.value >= 1, "--batch_size", BATCH.value, "at least 1 image")
    check(0 <= SEED.value < 2**31, "--seed", SEED.value, "in [0, 2^31)")
    model = pretrained.load(CHECKPOINT.value, ema=EMA.value, autoencoder=AUTOENCODER.value or None)
    headed = model.experiment.model.inter_depth or IG_SCALES.present
    ig_scales, cfg_scales = _scales(IG_SCALES) if headed else [], _scales(CFG_SCALES)
    for w, s in itertools.product([1.0, *ig_scales], [1.0, *cfg_scales]):
        model.check(dataclasses.replace(model.recipe, ig_scale=w, cfg_scale=s))
    decode.check_decodable(model.experiment.latents, model.autoencoder)
    data = model.experiment.data
    data = dataclasses.replace(data, source="tfds", name=DATA.value, folder="", pad=0) if DATA.value else data
    out = Path(OUT.value).expanduser().absolute()
    what = {"checkpoint": model.digest, "step": model.step, "ema": model.ema, "num": NUM.value, "seed": SEED.value,
            "autoencoder": model.autoencoder.digest if model.autoencoder else None,
            "ig_scales": ig_scales, "cfg_scales": cfg_scales, "data": dataclasses.asdict(data)}
    if _already_there(out, what):
        print((out / "table.txt").read_text(), end="")
        return
    ruler = make_ruler(model, data, out)
    labels = labels_for(np.arange(NUM.value), "balanced", model.experiment.model.num_classes, SEED.value)
    recipes = sweep.count(ig_scales, cfg_scales)
    print(f"sweep       {recipes} recipes x {NUM.value:,} images, {model.recipe.solver} {model.recipe.steps} steps")
    with Progress(recipes * NUM.value, "images") as progress:
        draw = functools.partial(model.sample, labels=labels, seed=SEED.value, batch_size=BATCH.value, progress=progress)
        rows = sweep.sweep(draw, labels, ruler, model.recipe, ig_scales, cfg_scales)
    floor = ruler.floor(NUM.value)
    text = summary(rows, floor)
    with atomic_file(out / "table.txt") as file:
        file.write((text + "\n").encode())
    with atomic_file(out / "table.json") as file:
        file.write((json.dumps({"what": what, "floor": floor, "rows": rows}, indent=2) + "\n").encode())
    print(text)


def make_ruler(model: pretrained.Pretrained, data: DataConfig, out: Path) -> sweep.Ruler:
    """The classifier of this data set, trained once and kept in `out`, and the real statistics.

    Raises: UserError when the images are not there, or not of the shape or the classes of the model's.
    """
    classes = model.experiment.model.num_classes
    sources = [open_split(data, split, model.image_shape, classes) for split in (data.split, data.test_split)]
    train, test = (_arrays(source) for source in sources)
    with writing(out):  # before the work
        out.mkdir(parents=True, exist_ok=True)
    path = out / f"classifier_{name_of(sources)}.npz"
    if path.exists():
        classifier = features.load(path)
    else:
        steps = 1500
        with Progress(steps, "classifier steps") as progress:

            def report(done: int, loss: float) -> None:
                progress.advance(done - progress.done)
                if done % 500 == 0:
                    progress.show(f"loss {loss:.3f}")

            classifier = features.train_classifier(
                *train, *test, num_classes=classes, steps=steps, progress=report
            )
        features.save(classifier, path)
    print(f"classifier  right on {classifier.test_accuracy:.1%} of the real test images, "
          f"sha256 {classifier.checksum[:12]}", flush=True)
    return sweep.Ruler(classifier, scores.reference_stats(classifier, train[0]), *test)


def name_of(sources) -> str:
    """Eight characters that stand for the data, so that no classifier is taken for that of other images."""
    identity = [(source.identity, source.image_shape, source.class_names) for source in sources]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]


def _arrays(source) -> tuple[np.ndarray, np.ndarray]:
    everything = source.gather(np.arange(len(source)))
    return everything["image"], everything["label"]


def summary(rows: list[dict], floor: dict) -> str:
    """Every row, then the best of each kind beside the floor; a network without a head has no internal guidance."""
    kinds = [kind for kind in ("none", "CFG", "IG", "IG+CFG") if any(row["kind"] == kind for row in rows)]
    chosen = {kind: sweep.best(rows, kind) for kind in kinds}
    lines = [
        scores.table([floor, *rows]),
        "",
        "best of each, w and s both chosen on this metric:",
        scores.table([floor, *chosen.values()]).split("\n\n")[0],
    ]
    if "IG" in chosen:
        plain, guided = chosen["none"]["fd_cnn"], chosen["IG"]["fd_cnn"]
        lines += ["", f"internal guidance brings FD-CNN from {plain:.2f} to {guided:.2f}, {guided / plain:.2f} of it, "
                  "at no cost in network evaluations"]
    return "\n".join(lines)


def _scales(flag: flags.FlagHolder) -> list[float]:
    try:
        values = [float(part) for part in flag.value]
    except ValueError:
        raise UserError(f"--{flag.name}={','.join(flag.value)!r} must be numbers such as 1.5,2") from None
    check(values and 1.0 not in values, f"--{flag.name}", values, "one or more numbers other than 1 (1 is off)")
    return values


def _already_there(out: Path, what: dict) -> bool:
    try:
        return json.loads((out / "table.json").read_text())["what"] == what
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
