"""Measure samples: FID and its relatives with --inception, and without it a small CNN over a sweep of guidance scales.

  python -m ig_jax.evaluate --samples=runs/a --reference=VIRTUAL_imagenet256_labeled.npz --inception=IN --out=runs/fid
  python -m ig_jax.evaluate --checkpoint=runs/xl --preset=sit-xl-ig --reference=REF --inception=IN --out=runs/fid
  python -m ig_jax.evaluate --write_reference=ref.npz --images=ILSVRC --size=256 --inception=IN
  python -m ig_jax.evaluate --checkpoint=runs/xl --sweep='ig_scale=1,1.5,2;cfg_scale=1,1.25' (and as above)
  python -m ig_jax.evaluate --card=sit-xl-ig
  python -m ig_jax.evaluate --checkpoint=runs/digits --out=runs/digits/evaluation

The first ones use the InceptionV3 that `convert` wrote and write metrics.json with the whole recipe of each number;
straight from a checkpoint nothing but features is stored. Run the same command again to resume. FD-CNN of the last is
the Frechet distance on the features of a small CNN trained on the real training split (its checksum is stored with
every number). It is not FID. Writes table.txt and table.json, which grow by the checkpoints of, for instance,
--checkpoint='runs/digits/checkpoints/*'; --cfg_scales=1, or an empty list, leaves that guidance out.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ig_jax.base import cli
from ig_jax.base.copies import results_folder
from ig_jax.base.errors import UserError, check
from ig_jax.base.files import local_path, matching, write_text, writing
from ig_jax.base.progress import Progress
from ig_jax.base.versions import versions
from ig_jax.config import stored
from ig_jax.data.dataset import DataConfig, open_split
from ig_jax.data.spec import pixels
from ig_jax.diffusion.recipe import Recipe
from ig_jax.evaluation import cards, classifier, report, scoring, search, sweep
from ig_jax.evaluation.features import InceptionNet
from ig_jax.evaluation.image_sets import open_set
from ig_jax.evaluation.reference import write_reference as write
from ig_jax.generation import decode, pretrained
from ig_jax.generation.flags import check_sampling, define_request, requested
from ig_jax.generation.folder import IDENTITY
from ig_jax.generation.labels import labels_for
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import make_mesh
from ig_jax.pictures.images import write_png
from ig_jax.training.tensorboard import TensorBoard

FLAGS = flags.FlagValues()
_at: dict[str, Any] = {"flag_values": FLAGS}
define_request(FLAGS, None, "Images; by default 50,000, or 2,000 for each recipe of a sweep, class-balanced.")
FLAGS.set_default("batch_size", None)
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
SAMPLES = _text("samples", "", "Samples to measure: a folder of images (of `sample`), or an npz with arr_0.")
REFERENCE = _text("reference", "", "Reference: statistics or images in an npz, pkl or pt, or a folder of images.")
INCEPTION = _text("inception", "", "Directory of the InceptionV3 that `convert` wrote.")
WRITE_REFERENCE = _text("write_reference", "", "Reference npz in ADM's form to write from --images.")
IMAGES = _text("images", "", "Real images: a folder, an npz, or with --size any source that `encode` reads.")
SIZE = flags.DEFINE_integer("size", 0, "Pixels to which --images are cropped; 0 leaves a folder as it is.", **_at)
SWEEP = _text("sweep", "", "Grid to search for the lowest FID: ig_scale=1,1.5,2;cfg_scale=1,1.25;ema=0.999,0.9999.")
CARD = _text("card", "", "Reproduction card to show and, where all it needs is given, to run; all for a table.")
SPLIT = _text("split", "train", "Split of --images.")
cli.define_launch(FLAGS)
CLASSIFIER = flags.DEFINE_string("classifier", "", "Directory of the classifier, to share it; by default --out.", **_at)
DATA = flags.DEFINE_string("data", "", "TFDS name of labelled images; by default the training data of the run.", **_at)
IG_SCALES = flags.DEFINE_list("ig_scales", ["1.5", "2", "2.5"], "w of internal guidance to try.", **_at)
CFG_SCALES = flags.DEFINE_list("cfg_scales", ["1.1", "1.25", "1.5"], "s of classifier-free guidance to try.", **_at)


def main() -> None:
    with processes.together(FLAGS):
        evaluate()


def evaluate() -> None:
    """Measure, or write, what the flags ask for."""
    check_sampling(FLAGS, num=2)
    if WRITE_REFERENCE.value:
        return write_reference(local_path(WRITE_REFERENCE.value, "--write_reference"))
    if CARD.value:
        return reproduce(CARD.value)
    with results() as out:
        if SWEEP.value:
            explore(out)
        elif INCEPTION.value or SAMPLES.value or REFERENCE.value:
            score_each(out)
        else:
            compare(out)


def results() -> contextlib.AbstractContextManager[Path]:
    """The folder that --out names, or the copy of one in a bucket, which the first process puts back."""
    return results_folder(cli.required(FLAGS["out"]), "--out", put_back=processes.is_first())


def yardstick(out: Path) -> scoring.Yardstick:
    """--reference and --inception."""
    reference, inception = (cli.required(FLAGS[name]) for name in ("reference", "inception"))
    return scoring.Yardstick(reference, inception, FLAGS.batch_size or 64, out / "reference_features")


def check_one() -> None:
    """Raise UserError unless there are either --samples or a --checkpoint to measure."""
    both = bool(SAMPLES.value), bool(FLAGS.checkpoint)
    check(sum(both) == 1, "(--samples, --checkpoint)", (SAMPLES.value, FLAGS.checkpoint), "one of the two")


def score_each(out: Path) -> None:
    """`score` of --samples or --checkpoint; of each checkpoint of a pattern in a folder of its name, with a table."""
    check_one()
    found = matching(FLAGS.checkpoint) if FLAGS.checkpoint else []
    by = yardstick(out)
    if len(found) < 2:
        return score(out, by)
    rows = []
    for path in found:
        FLAGS["checkpoint"].value, name = path, Path(path).name
        score(out / name, by)
        rows.append({"point": {"checkpoint": name}} | json.loads((out / name / "metrics.json").read_text()))
    if processes.is_first():
        print(search.table(rows))
        write_text(out / "table.txt", search.table(rows))


def score(out: Path, by: scoring.Yardstick) -> None:
    """FID and its relatives of --samples, or of samples of --checkpoint that are never stored."""
    notes, folder, batch_size = list(by.reference.notes), out / "features", by.batch_size
    images = open_set(SAMPLES.value, "--samples") if SAMPLES.value else None
    check(images is None or FLAGS.num in (None, images.count), "--num", FLAGS.num, "left out with --samples: all count")
    net = by.net
    if images is not None:
        notes += images.notes
        size, made = images.shape[:2], {"name": images.name, "digest": images.digest, "recipe": images.made}
        if images.made is None:
            notes.append(("no_recipe", f"{images.name} does not say how its images were made"))
        scoring.check_same(out, made)
        measured = scoring.measure_set(net, images, batch_size, folder)
    else:
        request = requested(
            FLAGS, "evaluation", ["npz"], lambda model: (50_000, "random" if FLAGS.preset else "balanced")
        )
        request.model.check_images()
        size, made = request.model.image_shape[:2], {"recipe": request.metadata}
        scoring.check_same(out, made)
        if processes.is_first():
            print(request.model.summary(request.recipe), flush=True)
        what = {key: request.metadata[key] for key in (*IDENTITY, "labels_sha256") if key in request.metadata}
        asked = request.model, request.recipe, request.labels, request.seed
        batches = functools.partial(scoring.sampled, *asked, batch_size)
        measured = scoring.measure(net, batches, len(request.labels), folder, what)
    reference = by.measured
    numbers, how = scoring.results(measured, reference, size, notes)
    scoring.report(notes)
    processes.wait_for_all("the features are no longer needed")
    if processes.is_first():
        found = numbers | {"recipe": scoring.recipe_of(made, reference, net, how, notes)}
        write_text(out / "metrics.json", json.dumps(found, indent=2))
        for key, value in numbers.items():
            print(f"{key:<20}  {'not measured' if value is None else format(value, ',.7g')}")
        shutil.rmtree(folder, ignore_errors=True)
        by.forget()


def reproduce(name: str) -> None:
    """Show a card, and judge the samples of --checkpoint by it where they can be measured."""
    if name == "all":
        return print(cards.table())
    card = cards.card(name)
    print(card.page(), flush=True)
    missing = [f"--{flag}" for flag in ("checkpoint", "reference", "inception", "out") if not FLAGS[flag].value]
    if missing:
        return print(f"not run here: give {', '.join(missing)}")
    for flag in card.flags:
        key, value = flag.removeprefix("--").split("=", 1)
        if not FLAGS[key].present:
            FLAGS[key].parse(value)
    check_one()
    with results() as out:
        score(out, yardstick(out))
        if processes.is_first():
            verdict = card.judge(json.loads((out / "metrics.json").read_text()))
            write_text(out / "card.json", json.dumps({"card": name, "verdict": verdict}, indent=2))
            print(verdict)


def explore(out: Path) -> None:
    """FID over a grid of recipes and a finer one around its best, all from the same noise."""
    axes, by = search.axes(SWEEP.value), yardstick(out)
    what: dict[str, Any] = {"reference": by.reference.digest}  # read before anything large
    request = requested(FLAGS, "sweep", ["npz"], lambda model: (10_000, "random" if FLAGS.preset else "balanced"))
    models = {request.model.ema: request.model}
    for ema in axes.get("ema", ()):
        if ema not in models:
            other = pretrained.load(FLAGS.checkpoint, ema=ema)
            models[ema] = dataclasses.replace(request.model, params=other.params, ema=ema)
    for point in search.grid(axes):
        request.model.check(request.recipe.replace(**{key: point[key] for key in point if key != "ema"}))
    net, reference = by.net, by.measured
    what |= {key: request.metadata[key] for key in (*IDENTITY, "labels_sha256") if key in request.metadata}
    what |= {"inception": net.digest, "count": len(request.labels)}

    def score_point(point: search.Point) -> dict:
        recipe = request.recipe.replace(**{key: value for key, value in point.items() if key != "ema"})
        asked = models[point.get("ema", request.model.ema)], recipe, request.labels, request.seed
        if processes.is_first():
            print(f"sweep       {json.dumps(point)}", flush=True)
        batches = functools.partial(scoring.sampled, *asked, by.batch_size)
        found = scoring.measure(net, batches, len(request.labels), out / "features", what | {"point": point})
        numbers = scoring.distances(found, reference) | {"inception_score": found.in_order.mean}
        processes.wait_for_all("the point is measured")
        if processes.is_first():
            shutil.rmtree(out / "features")
        return numbers | {"recipe": recipe.flat()}

    rows = search.search(axes, score_point, out / "rows.jsonl", json.loads(json.dumps(what)))
    if processes.is_first():
        text, best = search.table(rows), min(rows, key=lambda row: row["fid"])
        write_text(out / "table.txt", text)
        write_text(out / "best.json", json.dumps(best | request.metadata, indent=2))
        picture = search.picture(rows)
        write_png(out / "sweep.png", picture)
        with TensorBoard(out) as tensorboard:
            tensorboard.image(request.model.step, "sweep", picture)
        print(text)


def write_reference(path: Path) -> None:
    """Statistics of all --images, and the first 10,000 of them, in ADM's form."""
    check(path.suffix == ".npz", "--write_reference", str(path), "an .npz file")
    images = open_set(cli.required(FLAGS["images"]), "--images", SIZE.value, SPLIT.value)
    net, batch_size = InceptionNet(cli.required(FLAGS["inception"]), make_mesh()), FLAGS.batch_size or 64
    folder = path.with_name(f"{path.stem}_features")
    found = scoring.measure_set(net, images, batch_size, folder)
    if processes.is_first():
        names = {"mu": "pool", "mu_s": "spatial"}
        arrays = {name: found.moments(feature).mean for name, feature in names.items()}
        arrays |= {name.replace("mu", "sigma"): found.moments(feature).cov for name, feature in names.items()}
        kept = min(found.count, 10_000)
        arrays |= {"count": np.array(found.count), "feats": found.rows[:kept].astype(np.float32)}
        made = {"images": images.name, "digest": images.digest, "size": images.shape[:2], "inception": net.digest}
        write(path, arrays, images, kept, made | {"versions": versions()})
        shutil.rmtree(folder, ignore_errors=True)
        print(f"wrote {path}: statistics of {found.count:,} images, the first {kept:,} of them")


def compare(out: Path) -> None:
    """The table of FD-CNN and class agreement over a sweep of scales, of one checkpoint or of several."""
    for name, default in (("num", 2000), ("batch_size", 500)):
        FLAGS[name].value = FLAGS[name].value or default
    evaluator = None
    for checkpoint in matching(cli.required(FLAGS["checkpoint"])):
        model = pretrained.load(checkpoint, ema=FLAGS.ema, autoencoder=FLAGS.autoencoder)
        headed = model.experiment.model.inter_depth or IG_SCALES.present
        ig_scales, cfg_scales = _scales(IG_SCALES) if headed else [], _scales(CFG_SCALES)
        for w, s in itertools.product([1.0, *ig_scales], [1.0, *cfg_scales]):
            model.check(model.recipe.replace(ig_scale=w, cfg_scale=s))
        decode.check_decodable(model.experiment.latents, model.autoencoder)
        data = stored.data(model.config, checkpoint)
        if DATA.value:
            named: dict[str, Any] = dict(source="tfds", name=DATA.value, folder="", pad=0, mirrored=bool(data.mirrored))
            data = dataclasses.replace(data, **named, holds="pixels", dtype="uint8")
        what = {
            "num": FLAGS.num,
            "seed": FLAGS.seed,
            "autoencoder": model.autoencoder.digest if model.autoencoder else None,
            "ig_scales": ig_scales,
            "cfg_scales": cfg_scales,
            "data": dataclasses.asdict(data),
        }
        found = report.stored(out, what)
        whose = {"checkpoint": model.digest, "step": model.step, "ema": model.ema}
        if not report.holds(found, whose, out):
            evaluator = evaluator or make_evaluator(
                model, data, out, local_path(CLASSIFIER.value or out, "--classifier")
            )
            rows = [row | whose for row in measured(model, evaluator, ig_scales, cfg_scales)]
            found |= {"versions": versions(), "real": evaluator.real(min(FLAGS.num, len(evaluator.test)))}
            if processes.is_first():
                report.write(out, found | {"rows": found["rows"] + rows})
            processes.wait_for_all("the table is written")
    if processes.is_first():
        print((out / "table.txt").read_text(), end="")


def make_evaluator(model: pretrained.Pretrained, data: DataConfig, out: Path, folder: Path) -> sweep.Evaluator:
    """The real images, and the classifier of them in `folder`.

    Raises: UserError for data of another kind, and for folders that cannot be written, before hours of work.
    """
    classes = tuple(map(str, range(model.experiment.model.num_classes)))
    promise = pixels(model.image_shape, classes, bool(data.mirrored))
    train, test = (open_split(data, split, promise) for split in (data.split, data.test_split))
    for directory in (out, folder):
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
    return sweep.Evaluator.of(classifier.trained_once(train, test, folder), train, test)


def measured(
    model: pretrained.Pretrained, evaluator: sweep.Evaluator, ig_scales: list[float], cfg_scales: list[float]
) -> list[dict]:
    """The row of every recipe of the sweep."""
    labels = labels_for(np.arange(FLAGS.num), "balanced", model.experiment.model.num_classes, FLAGS.seed)
    recipes, recipe = sweep.count(ig_scales, cfg_scales), model.recipe
    if processes.is_first():
        print(f"sweep       {recipes} recipes x {FLAGS.num:,} images, {recipe.solver.name} {recipe.steps} steps")
    few = min(FLAGS.num, len(evaluator.test))
    with Progress(recipes * FLAGS.num, "images") as progress:
        given: dict[str, Any] = dict(seed=FLAGS.seed, batch_size=FLAGS.batch_size, progress=progress)

        def score(recipe: Recipe) -> dict:
            batches = model.images(recipe, labels.tolist(), **given)
            return evaluator.score(((images, labels[indices]) for indices, images in batches), FLAGS.num, few)

        return sweep.sweep(score, recipe, ig_scales, cfg_scales)


def _scales(flag: flags.FlagHolder) -> list[float]:
    """The scales of a flag; 1 is the row without that guidance, which is always there."""
    try:
        return [scale for scale in map(float, filter(None, flag.value)) if scale != 1.0]
    except ValueError:
        raise UserError(name=f"--{flag.name}", value=",".join(flag.value), expected="numbers, as 1.5,2") from None


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
