"""Draw images from a checkpoint directory, with internal and classifier-free guidance.

  python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/samples --num=64 --ig_scale=2 --cfg_scale=1.25
  python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/compare --compare --ig_scale=2 --cfg_scale=1.25

Writes 000000.png ..., grid.png, samples.npz (arr_0 uint8 NHWC, arr_1 labels) and recipe.json. Image i depends
on (checkpoint, recipe, seed, i) alone. Scale 1 is off; intervals are lo,hi in sigma-time (t = 0 data, t = 1 noise).
"""

import dataclasses
import importlib.metadata
import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ig_jax import cli, pretrained
from ig_jax.errors import UserError, check
from ig_jax.generation import images
from ig_jax.generation.labels import labels_for
from ig_jax.generation.recipe import Recipe
from ig_jax.progress import Progress

FLAGS = flags.FlagValues()
_define = {"flag_values": FLAGS}
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Work directory of a run, or one of its steps.", **_define)
OUT = flags.DEFINE_string("out", None, "Directory to write to.", **_define)
NUM = flags.DEFINE_integer("num", 64, "Images.", **_define)
SEED = flags.DEFINE_integer("seed", 0, "Seed of noise, labels and increments.", **_define)
BATCH = flags.DEFINE_integer("batch_size", 64, "Images in one pass of the program, over all devices.", **_define)
LABELS = flags.DEFINE_string("labels", "balanced", "balanced (i mod classes), random, or a list: 3,1,4.", **_define)
EMA = flags.DEFINE_string("ema", "", "Which EMA, by its decay; the first where not given.", **_define)
COMPARE = flags.DEFINE_bool("compare", False, "One picture of none / CFG / IG / IG+CFG on the same noise.", **_define)
# Left out, each of these takes the value in the checkpoint's config (config.sample).
SOLVER = flags.DEFINE_string("solver", None, "euler, heun or sde.", **_define)
STEPS = flags.DEFINE_integer("steps", None, "Steps of the time grid.", **_define)
IG_SCALE = flags.DEFINE_float("ig_scale", None, "w of internal guidance.", **_define)
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "s of classifier-free guidance.", **_define)
IG_INTERVAL = flags.DEFINE_list("ig_interval", None, "Where internal guidance is on: lo,hi in sigma-time.", **_define)
CFG_INTERVAL = flags.DEFINE_list("cfg_interval", None, "Where CFG is on: lo,hi in sigma-time.", **_define)

PACKAGES = ("ig_jax", "jax", "flax", "numpy")


def main() -> None:
    for flag, least in ((NUM, 1), (BATCH, 1), (SEED, 0)):
        check(flag.value >= least, f"--{flag.name}", flag.value, f"at least {least}")
    check(SEED.value < 2**31, "--seed", SEED.value, "less than 2^31")
    cli.required(CHECKPOINT), cli.required(OUT)
    model = pretrained.load(CHECKPOINT.value, ema=EMA.value)
    recipe = chosen_recipe(model.recipe)
    recipe.check_model(model.experiment.model)
    labels = labels_for(np.arange(NUM.value), LABELS.value, model.experiment.model.num_classes, SEED.value)
    record = describe(model, recipe)
    out = Path(OUT.value).expanduser().absolute()
    if already_there(out, record):
        print(f"nothing to do: {out} already holds these images")
        return
    draw = compare if COMPARE.value else write_samples
    seconds = draw(model, recipe, labels, out)
    record |= {"images_per_second": round(NUM.value / seconds, 2), "seconds": round(seconds, 2)}
    # Written last: a directory with a recipe is complete.
    with images.atomic_file(out / "recipe.json") as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    print(f"wrote {out}: {NUM.value} images, {NUM.value / seconds:.1f} images/s")


def chosen_recipe(default: Recipe) -> Recipe:
    """The checkpoint's recipe with the flags that were given put over it."""
    given = {
        "solver": SOLVER.value, "steps": STEPS.value, "ig_scale": IG_SCALE.value, "cfg_scale": CFG_SCALE.value,
        "ig_interval": _interval(IG_INTERVAL), "cfg_interval": _interval(CFG_INTERVAL),
    }
    return dataclasses.replace(default, **{key: value for key, value in given.items() if value is not None})


def _interval(flag: flags.FlagHolder) -> tuple[float, float] | None:
    if flag.value is None:
        return None
    try:
        low, high = (float(part) for part in flag.value)
    except ValueError:
        raise UserError(f"--{flag.name}={','.join(flag.value)!r} must be lo,hi such as 0.3,1") from None
    return low, high


def describe(model: pretrained.Pretrained, recipe: Recipe) -> dict:
    """What fixes the images, as JSON."""
    return {
        "checkpoint": {"digest": model.digest, "step": model.step, "ema": model.ema,
                       "experiment": model.experiment.name},
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "evaluations_per_image": recipe.evaluations_per_image(model.experiment.path, model.experiment.model),
        "seed": SEED.value, "num": NUM.value, "labels": LABELS.value, "compare": COMPARE.value,
        "latents": model.experiment.latents.to_json(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
    }


def already_there(out: Path, record: dict) -> bool:
    """Whether `out` holds exactly these images.  Raises: UserError when it holds others."""
    if not out.exists():
        return False
    check(out.is_dir(), "--out", str(out), "a directory, not a file")
    try:
        found = json.loads((out / "recipe.json").read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"--out={str(out)!r} has a recipe.json that cannot be read; choose another --out") from error
    for key in ("checkpoint", "recipe", "seed", "num", "labels", "compare"):
        if found.get(key) != record[key]:
            raise UserError(f"--out={str(out)!r} holds images of another {key} ({found.get(key)}); "
                            "choose another --out")
    return True


def write_samples(model: pretrained.Pretrained, recipe: Recipe, labels: np.ndarray, out: Path) -> float:
    """PNGs, grid and npz; the seconds the images took."""
    began, drawn = time.monotonic(), []
    announce(model, {"recipe": recipe})
    with Progress(len(labels), "images") as progress:
        for indices, batch in model.generate(recipe, labels, seed=SEED.value, batch_size=BATCH.value):
            for index, image in zip(indices, batch):
                images.write_png(out / f"{index:06d}.png", image)
            drawn.append(batch)
            progress.advance(len(batch))
            progress.show(f"{progress.rate():.1f} images/s")
    seconds = time.monotonic() - began
    everything = np.concatenate(drawn)
    images.write_npz(out / "samples.npz", everything, labels)
    zoom = max(1, round(images.COMFORTABLE / everything.shape[1]))
    shown = everything[:100]
    images.write_png(out / "grid.png", images.grid(shown, columns=min(10, len(shown)), zoom=zoom))
    return seconds


def compare(model: pretrained.Pretrained, recipe: Recipe, labels: np.ndarray, out: Path) -> float:
    """compare.png: the same noise and labels under none / CFG / IG / IG+CFG; the seconds the images took."""
    check(recipe.ig_scale != 1 and recipe.cfg_scale != 1, "--compare with (ig_scale, cfg_scale)",
          (recipe.ig_scale, recipe.cfg_scale), "two scales other than 1", "give --ig_scale and --cfg_scale")
    variants = {
        "none\nplain model": dataclasses.replace(recipe, ig_scale=1.0, cfg_scale=1.0),
        f"CFG\ns {recipe.cfg_scale:g}": dataclasses.replace(recipe, ig_scale=1.0),
        f"IG\nw {recipe.ig_scale:g}": dataclasses.replace(recipe, cfg_scale=1.0),
        f"IG + CFG\nw {recipe.ig_scale:g}, s {recipe.cfg_scale:g}": recipe,
    }
    began = time.monotonic()
    announce(model, {title.split("\n")[0]: variant for title, variant in variants.items()})
    order = np.argsort(labels, kind="stable")
    panels = {}
    for title, variant in variants.items():
        batches = model.generate(variant, labels, seed=SEED.value, batch_size=BATCH.value)
        panels[title] = np.concatenate([batch for _, batch in batches])[order]
    classes, counts = np.unique(labels, return_counts=True)
    check(len(set(counts)) == 1, "--num", NUM.value, f"as many images of each of the {len(classes)} labels drawn",
          "use --labels=balanced and a multiple of the classes")
    caption = f"{recipe.solver}, {recipe.steps} steps, seed {SEED.value}, EMA {model.ema}, step {model.step}"
    picture = images.comparison(panels, row_labels=[model.class_names[c] for c in classes], caption=caption)
    images.write_png(out / "compare.png", picture)
    for title, panel in panels.items():
        name = title.split("\n")[0].lower().replace(" + ", "_")
        images.write_npz(out / f"{name}.npz", panel, labels[order])
    return time.monotonic() - began


def announce(model: pretrained.Pretrained, recipes: dict[str, Recipe]) -> None:
    """What is about to happen."""
    print(f"checkpoint  step {model.step}, EMA {model.ema}, sha256 {model.digest[:12]}")
    print(f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}")
    for title, recipe in recipes.items():
        print(f"{title:<11} {recipe.solver} {recipe.steps} steps, "
              f"{recipe.evaluations_per_image(model.experiment.path, model.experiment.model)} evaluations an image; "
              f"IG {recipe.ig_scale:g} on ({recipe.ig_interval[0]:g}, {recipe.ig_interval[1]:g}], "
              f"CFG {recipe.cfg_scale:g} on ({recipe.cfg_interval[0]:g}, {recipe.cfg_interval[1]:g}]", flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
