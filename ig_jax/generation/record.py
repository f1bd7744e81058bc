"""What is said of a folder of samples: recipe.json beside them, and a few lines before the work begins."""

import dataclasses
import importlib.metadata
import json

import jax

from ig_jax.errors import UserError
from ig_jax.generation.folder import Folder
from ig_jax.generation.presets import PRESETS
from ig_jax.generation.recipe import GUIDANCES, Recipe
from ig_jax.parallel import processes

PACKAGES = ("ig_jax", "jax", "flax", "numpy")
# What is fixed of a folder.
FIXED = ("kind", "checkpoint", "weak", "autoencoder", "recipe", "seed", "num", "labels", "labels_sha256", "save", "map")


def describe(model, recipe: Recipe, **asked) -> dict:
    """What fixes the images of a pretrained model, what was asked for, and what they were made with, as
    JSON.
    """
    e, method = model.experiment, recipe.method
    fixed_grid = hasattr(method, "rows")
    return json.loads(json.dumps(asked | {
        "checkpoint": _identity(model), "weak": _identity(model.weak) if model.weak else None,
        "autoencoder": model.autoencoder.digest if model.autoencoder and asked["save"] != ["latents"] else None,
        "recipe": dataclasses.asdict(recipe), "solver": dataclasses.asdict(method),
        # Sigma-times at which the network runs; an adaptive solver chooses them.
        "grid": [t for row in method.rows(e.process.kind, recipe.steps) for t in row.lookup] if fixed_grid else None,
        "evaluations_per_image": recipe.evaluations_per_image(e.process.kind, e.model, model.weak_model),
        "latents": e.latents.to_json(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
        "processes": jax.process_count(),
        "finished": None,
    }))


def _identity(model) -> dict:
    return {"digest": model.digest, "step": model.step, "ema": model.ema, "experiment": model.experiment.name}


def nothing_to_do(folder: Folder, record: dict) -> bool:
    """Whether the folder is finished.  Raises: UserError when it holds something else."""
    found = folder.record()
    samples = record["kind"] in ("samples", "decode")
    if found is None or samples and not found["finished"] and folder.missing().all():
        return False  # nothing is there, or what was begun has come to nothing
    for key in FIXED:
        if found.get(key) != record.get(key):
            raise UserError(f"--out={str(folder.path)!r} holds images of another {key} "
                            f"({_difference(found.get(key), record.get(key))}); choose another --out")
    # A sample or an archive that someone removed is made again.
    if not found["finished"] or samples and not folder.whole():
        return False
    if processes.is_first():
        print(f"nothing to do: {folder.path} already holds these images")
    return True


def _difference(stored, asked) -> str:
    """What the folder has, or of two sections the first entry that differs."""
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return str(stored)
    name = next(name for name in stored | asked if stored.get(name) != asked.get(name))
    return f"{name} is {stored.get(name)}"


def announce(model, recipe: Recipe, preset: str | None) -> None:
    """Print what is about to happen."""
    if not processes.is_first():
        return
    e = model.experiment
    count = recipe.evaluations_per_image(e.process.kind, e.model, model.weak_model)
    cost = f"{count:g} evaluations an image" if count else "as many evaluations as the tolerance takes"
    print(f"checkpoint  step {model.step}, EMA {model.ema}, sha256 {model.digest[:12]}")
    kind = jax.devices()[0].device_kind
    print(f"devices     {jax.device_count()} x {kind}, {jax.process_count()} process(es)")
    print(f"solver      {recipe.solver}, {recipe.steps} steps, {cost}")
    for name in GUIDANCES:
        scale, (low, high) = getattr(recipe, f"{name}_scale"), getattr(recipe, f"{name}_interval")
        if scale != 1:
            print(f"{name:<11} {scale} on ({low:g}, {high:g}]")
    if preset:
        print(f"preset      {preset}: FID {PRESETS[preset].fid} published, {PRESETS[preset].source}")
    print(end="", flush=True)
