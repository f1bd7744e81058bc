"""Draw images from a checkpoint directory, with every solver and guidance.

  python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/samples --num=64 --ig_scale=2 --cfg_scale=1.25
  python -m ig_jax.sample --checkpoint=runs/xl --out=runs/xl/50k --num=50000 --preset=sit-xl-ig-cfg --labels=random
  python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/map --map='ig:1,1.5,2;cfg:1,1.25' --num=4

Writes 000000.png ..., grid.png, samples.npz (arr_0 uint8 NHWC, arr_1 labels) and recipe.json; the same
command goes on where a killed one was. Image i depends on (checkpoint, recipe, seed, i) alone, but for rounding
where the batch size or the devices change. A scale is a number (1 is off), a table over sigma 0:1,0.3:2,1:1.5
or a schedule cosine:1,2; intervals are lo,hi in sigma-time (t = 0 data, t = 1 noise).
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from ig_jax import cli, pretrained
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.errors import UserError, check
from ig_jax.generation import decode, generate, images, looking
from ig_jax.generation.folder import KINDS, Folder
from ig_jax.generation.labels import labels_for
from ig_jax.generation.presets import PRESETS, preset
from ig_jax.generation.produce import produce
from ig_jax.generation.recipe import OPTIONS, Recipe
from ig_jax.generation.record import announce, describe, nothing_to_do
from ig_jax.models.latents import LatentScaling
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import make_mesh
from ig_jax.progress import Progress

FLAGS = flags.FlagValues()
_at = {"flag_values": FLAGS}
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Work directory of a run, or one of its steps.", **_at)
OUT = flags.DEFINE_string("out", None, "Directory to write to.", **_at)
NUM = flags.DEFINE_integer("num", 64, "Images.", **_at)
SEED = flags.DEFINE_integer("seed", 0, "Seed of noise, labels and increments.", **_at)
BATCH = flags.DEFINE_integer("batch_size", 64, "Images in one pass of the program, over all devices.", **_at)
LABELS = flags.DEFINE_string(
    "labels", "", "balanced (i mod classes), random, a list 3,1,4, or a .npy or text file; where not given random with "
    "--preset, as its FID was measured, and balanced otherwise.", **_at)
EMA = flags.DEFINE_string("ema", "", "Which EMA, by its decay; the first where not given.", **_at)
SAVE = flags.DEFINE_list("save", "png,npz", "png, npz, both, or latents (to decode later).", **_at)
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Directory of a latent model's autoencoder.", **_at)
AUTO = flags.DEFINE_string("auto_checkpoint", None, "Weaker checkpoint, for autoguidance.", **_at)
# Other things than a folder of samples.
COMPARE = flags.DEFINE_bool("compare", False, "One picture of none / CFG / IG / IG+CFG on the same noise.", **_at)
MAP = flags.DEFINE_string("map", None, "One picture over two scales: ig:1,1.5,2;cfg:1,1.25.", **_at)
GAP = flags.DEFINE_bool("gap", False, "One picture of |D_f - D_i| along the trajectory.", **_at)
DECODE = flags.DEFINE_string("decode", None, "Folder of saved latents to make images of; no checkpoint.", **_at)
# Left out, each of these takes the value of the preset, or in the checkpoint's config (config.sample).
PRESET = flags.DEFINE_string("preset", None, f"A published recipe: {', '.join(PRESETS)}.", **_at)
_RECIPE = {
    "solver": flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}.", **_at),
    "steps": flags.DEFINE_integer("steps", None, "Steps of the time grid.", **_at),
    "ig_scale": flags.DEFINE_string("ig_scale", None, "w of internal guidance.", **_at),
    "cfg_scale": flags.DEFINE_string("cfg_scale", None, "s of classifier-free guidance.", **_at),
    "prefix_scale": flags.DEFINE_string(
        "prefix_scale", None, "Guidance against the null label run up to the intermediate head.", **_at),
    "auto_scale": flags.DEFINE_string("auto_scale", None, "Guidance against --auto_checkpoint.", **_at),
    "ig_interval": flags.DEFINE_list("ig_interval", None, "Where IG is on: lo,hi in sigma-time.", **_at),
    "cfg_interval": flags.DEFINE_list("cfg_interval", None, "Where CFG is on.", **_at),
    "prefix_interval": flags.DEFINE_list("prefix_interval", None, "Where prefix guidance is on.", **_at),
    "auto_interval": flags.DEFINE_list("auto_interval", None, "Where autoguidance is on.", **_at),
    "ig_head": flags.DEFINE_list("ig_head", None, "Index of the weak head, or weights of all.", **_at),
    "cfg_channels": flags.DEFINE_string("cfg_channels", None, "all, or first_three (a legacy).", **_at),
    "shift": flags.DEFINE_float("shift", None, "Time shift of an ODE grid; 1 is off.", **_at),
    "diffusion_form": flags.DEFINE_string(
        "diffusion_form", None, f"SDE: {', '.join(generate.samplers.DIFFUSION_FORMS)}.", **_at),
    "diffusion_norm": flags.DEFINE_float("diffusion_norm", None, "SDE: factor of the diffusion.", **_at),
    "last_step": flags.DEFINE_string("last_step", None, "SDE: mean, tweedie, euler or none.", **_at),
    "last_step_size": flags.DEFINE_float("last_step_size", None, "SDE: sigma-time of the last step.", **_at),
    "eta": flags.DEFINE_float("eta", None, "ddim: 0 draws no noise, 1 as much as ddpm.", **_at),
    "clip": flags.DEFINE_bool("clip", None, "ddpm, ddim: denoised data to [-1, 1], for pixels.", **_at),
    "spacing": flags.DEFINE_string("spacing", None, "ddpm, ddim: even, or ddim (every k-th).", **_at),
    "rtol": flags.DEFINE_float("rtol", None, "dopri5: relative tolerance.", **_at),
    "atol": flags.DEFINE_float("atol", None, "dopri5: absolute tolerance.", **_at),
}


def main() -> None:
    processes.initialize()
    for flag, least in ((NUM, 1), (BATCH, 1), (SEED, 0)):
        check(flag.value >= least, f"--{flag.name}", flag.value, f"at least {least}")
    check(SEED.value < 2**31, "--seed", SEED.value, "less than 2^31")
    cli.required(OUT)
    kind = _kind()
    check(kind == "samples" or jax.process_count() == 1, f"--{kind} processes", jax.process_count(), "1")
    folder = Folder(OUT.value, NUM.value, SAVE.value if kind in ("samples", "decode") else KINDS[:1])
    if kind == "decode":
        return decode_latents(folder)
    cli.required(CHECKPOINT)
    model = pretrained.load(CHECKPOINT.value, ema=EMA.value, autoencoder=AUTOENCODER.value,
                            auto_checkpoint=AUTO.value)
    recipe = chosen_recipe(model)
    model.check(recipe)
    axes = looking.parse_axes(MAP.value) if kind == "map" else None
    protocol = LABELS.value or ("random" if PRESET.value and kind == "samples" else "balanced")
    labels = labels_for(np.arange(NUM.value), protocol, model.experiment.model.num_classes, SEED.value)
    record = describe(model, recipe, kind=kind, seed=SEED.value, num=NUM.value, labels=protocol,
                      labels_sha256=hashlib.sha256(labels.tobytes()).hexdigest(), save=list(folder.save),
                      preset=PRESET.value, map=MAP.value)
    if nothing_to_do(folder, record):
        return
    if kind == "samples":
        return write_samples(model, recipe, labels, folder, record)
    caption = f"{recipe.solver}, {recipe.steps} steps, seed {SEED.value}, EMA {model.ema}, step {model.step}"
    announce(model, recipe, PRESET.value)
    {"compare": compare, "map": guidance_map, "gap": gap}[kind](model, recipe, labels, folder, caption, axes)
    folder.write_record(record)
    print(f"wrote {folder.path / kind}.png")


def _kind() -> str:
    """What was asked for."""
    asked = {"compare": COMPARE.value, "map": MAP.value, "gap": GAP.value, "decode": DECODE.value}
    kinds = [kind for kind, on in asked.items() if on]
    check(len(kinds) <= 1, ", ".join(f"--{kind}" for kind in kinds), len(kinds), "given one at a time")
    return kinds[0] if kinds else "samples"


def chosen_recipe(model: pretrained.Pretrained) -> Recipe:
    """The preset's or the checkpoint's recipe with the flags that were given put over it."""
    default = preset(PRESET.value, model.experiment.model) if PRESET.value else model.recipe
    given = {name: _value(flag) for name, flag in _RECIPE.items() if flag.value is not None}
    if given.get("solver", default.solver) != default.solver:
        given = dict.fromkeys(OPTIONS) | given  # options belong to a solver: those of another are not kept
    return dataclasses.replace(default, **given)


def _value(flag: flags.FlagHolder):
    """A flag's value as Recipe takes it."""
    if flag.name.endswith("_scale"):
        return _number(flag.value)
    if flag.name == "ig_head":
        return int(flag.value[0]) if len(flag.value) == 1 and flag.value[0].isdigit() else _numbers(flag)
    return _numbers(flag, 2) if flag.name.endswith("_interval") else flag.value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(flag: flags.FlagHolder, count: int | None = None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in flag.value)
    except ValueError:
        numbers = ()
    if not numbers or count not in (None, len(numbers)):
        example = "lo,hi such as 0.3,1" if count else "an index, or weights such as 0.5,0.5"
        raise UserError(f"--{flag.name}={','.join(flag.value)!r} must be {example}")
    return numbers


def write_samples(model, recipe: Recipe, labels: np.ndarray, folder: Folder, record: dict) -> None:
    """The folder of samples."""
    e, latents_only = model.experiment, folder.save == ("latents",)
    if not latents_only:
        decode.check_decodable(e.latents, model.autoencoder)
        folder.check_space(model.image_shape)
    announce(model, recipe, PRESET.value)

    def weights(evaluations: list[np.ndarray]) -> np.ndarray:
        pieces = recipe.method.pieces(e.process.kind, recipe.guidance.edges())
        each = [recipe.weight((t + end) / 2, e.model, model.weak_model) for t, end in pieces]
        return sum(weight * counts for weight, counts in zip(each, evaluations))

    produce(
        folder, record, labels,
        draw=lambda indices: model.draw(recipe, labels[indices], seed=SEED.value, batch_size=BATCH.value,
                                        indices=indices),
        finish=(lambda x: x) if latents_only else model.decode,
        check=lambda x: generate.check_finite(x, recipe),
        weights=None if hasattr(recipe.method, "rows") else weights,
    )


def decode_latents(folder: Folder) -> None:
    """Images of what --save=latents wrote; needs only that folder and the autoencoder."""
    ignored = [f"--{flag.name}" for flag in (CHECKPOINT, NUM, SEED, LABELS, EMA, AUTO, PRESET, *_RECIPE.values())
               if flag.present]
    check(not ignored, "--decode", DECODE.value, f"given without {', '.join(ignored)}", "the folder says all of that")
    source, found = Folder(DECODE.value, 1, ("latents",)), None
    if source.path.is_dir():
        found = source.record()
    check(found is not None and found["save"] == ["latents"] and bool(found["finished"]),
          "--decode", DECODE.value, "a finished folder that --save=latents wrote")
    check("latents" not in folder.save, "--save", "latents", "png, npz or both to decode")
    scaling, mesh = LatentScaling.from_json(found["latents"]), make_mesh()
    autoencoder = decode.load_autoencoder(AUTOENCODER.value, scaling) if AUTOENCODER.value else None
    decoder, labels = decode.make_decoder(mesh, scaling, autoencoder), source.labels()
    folder = Folder(folder.path, len(labels), folder.save)
    folder.check_space(decode.image_shape(source.read(0).shape, autoencoder))
    record = found | {"kind": "decode", "save": list(folder.save), "finished": None,
                      "autoencoder": autoencoder.digest if autoencoder else None}
    if nothing_to_do(folder, record):
        return
    produce(
        folder, record, labels, finish=decoder, check=lambda x: None, weights=None,
        draw=lambda indices: generate.read_batches(source.read, indices, mesh, BATCH.value),
    )


def compare(model, recipe, labels, folder, caption, axes) -> None:
    """compare.png and one archive for each variant."""
    with _drawing(model, labels, len(looking.variants(recipe))) as draw:
        picture, panels = looking.compare(draw, recipe, labels, model.class_names, caption)
    images.write_png(folder.path / "compare.png", picture)
    order = np.argsort(labels, kind="stable")
    for title, panel in panels.items():
        name = title.split("\n")[0].lower().replace(" + ", "_")
        images.write_npz(folder.path / f"{name}.npz", panel, labels[order])


def guidance_map(model, recipe, labels, folder, caption, axes) -> None:
    """map.png."""
    places = [place for row in looking.map_recipes(recipe, axes) for place in row]
    for place in places:
        model.check(place)
    with _drawing(model, labels, len(places)) as draw:
        picture = looking.guidance_map(draw, recipe, axes, caption)
    images.write_png(folder.path / "map.png", picture)


def gap(model, recipe, labels, folder, caption, axes) -> None:
    """gap.png."""
    e = model.experiment
    program = generate.Program.of(recipe, e.model, e.process, model.weak_model)
    found = looking.gap_along(program, model.params, recipe.scales, labels, SEED.value)
    decodable = model.autoencoder is not None or not decode.needs_autoencoder(e.latents)
    names = [model.class_names[label] for label in labels]
    images.write_png(folder.path / "gap.png",
                     looking.gap_picture(found, model.to_images if decodable else None, names, caption))


@contextlib.contextmanager
def _drawing(model: pretrained.Pretrained, labels: np.ndarray, recipes: int) -> Iterator[looking.Draw]:
    """What draws the same samples by each of so many recipes."""
    with Progress(recipes * len(labels), "images") as progress:
        yield lambda recipe: model.sample(recipe, labels, seed=SEED.value, batch_size=BATCH.value, progress=progress)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
