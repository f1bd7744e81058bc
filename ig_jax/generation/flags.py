"""Command-line flags of the commands that sample, and what follows from them.

Flags of a recipe are made from the registries: whatever is registered, a solver with options or a guidance rule, has
its flags.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import UserError, check
from ig_jax.diffusion.guidance import CFG_CHANNELS, RULES
from ig_jax.diffusion.presets import PRESETS, preset
from ig_jax.diffusion.recipe import Recipe
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.generation import pretrained
from ig_jax.generation.folder import Folder, check_formats, digest
from ig_jax.generation.labels import labels_for
from ig_jax.generation.pretrained import Pretrained

DEFINE: dict[type, Any] = {
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
}


def define_recipe(flag_values: flags.FlagValues) -> None:
    """Define --preset and one flag for each key of a recipe's flat form."""
    at: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("preset", None, f"A published recipe: {', '.join(PRESETS)}.", **at)
    flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}.", **at)
    flags.DEFINE_integer("steps", None, "Steps of the time grid.", **at)
    for name, definition in RULES.items():
        flags.DEFINE_string(f"{name}_scale", None, f"{definition.doc}; 1 is off.", **at)
        flags.DEFINE_list(f"{name}_interval", None, f"Where {name} is on: lo,hi in sigma-time.", **at)
    flags.DEFINE_list("ig_head", None, "Index of the weak head, or weights of all.", **at)
    flags.DEFINE_string("cfg_channels", None, f"Channels that CFG guides: {', '.join(CFG_CHANNELS)}.", **at)
    for name, (option, solvers) in _options().items():
        text = f"{', '.join(solvers)}: {option.metadata['help']}"
        DEFINE[type(option.default)](name, None, text, **at)


def _options() -> dict[str, tuple[dataclasses.Field, list[str]]]:
    """The options of all solvers: (field, names of the solvers that have it) by name."""
    found: dict[str, tuple[dataclasses.Field, list[str]]] = {}
    for name, solver in SOLVERS.items():
        for field in dataclasses.fields(solver):
            found.setdefault(field.name, (field, []))[1].append(name)
    return found


def recipe_flags() -> list[str]:
    """The flags that are keys of a recipe's flat form."""
    rules = [f"{name}_{part}" for name in RULES for part in ("scale", "interval")]
    return ["solver", "steps", *rules, "ig_head", "cfg_channels", *_options()]


def recipe_from(flag_values: flags.FlagValues, model: Pretrained) -> Recipe:
    """The recipe of the preset or the checkpoint with the given flags applied.  Raises: UserError."""
    name = flag_values["preset"].value
    default = preset(name, model.experiment.model) if name else model.recipe
    given = {key: flag_values[key].value for key in recipe_flags() if flag_values[key].value is not None}
    return default.replace(**{key: _numbers(key, value) for key, value in given.items()})


def _numbers(name: str, value: Any) -> Any:
    """A list flag as numbers, or as the index of one head; any other value as it is."""
    if not isinstance(value, list):
        return value
    if name == "ig_head" and len(value) == 1 and value[0].isdigit():
        return int(value[0])
    try:
        return tuple(float(part) for part in value)
    except ValueError:
        raise UserError(name=f"--{name}", value=",".join(value), expected="numbers, with commas in between") from None


class Request(NamedTuple):
    """The samples 0, 1, ... of a checkpoint that are asked for, and the folder for what is made of them."""

    folder: Folder
    model: Pretrained
    recipe: Recipe
    labels: np.ndarray  # int32 (N,)
    seed: int
    batch_size: int
    metadata: dict


def define_sampling(flag_values: flags.FlagValues, num: int | None, images: str, batch_size: int = 64) -> None:
    """Define the flags of every command that samples a checkpoint, with `images` as the help of --num."""
    at: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "Work directory of a run, or one of its steps.", **at)
    flags.DEFINE_string("out", None, "Directory to write to.", **at)
    flags.DEFINE_integer("num", num, images, **at)
    flags.DEFINE_integer("seed", 0, "Seed of noise, labels and increments.", **at)
    flags.DEFINE_integer("batch_size", batch_size, "Images sampled at once, over all devices.", **at)
    flags.DEFINE_string("ema", "", "Which EMA, by its decay; by default the first.", **at)
    flags.DEFINE_string("autoencoder", None, "Directory of a latent model's autoencoder.", **at)


def check_sampling(values: flags.FlagValues, num: int = 1) -> None:
    """Raise UserError for a number of the flags that is out of range, or for less than `num` images."""
    for name, least in (("num", num), ("batch_size", 1), ("seed", 0)):
        value = values[name].value
        check(value is None or least <= value < 2**31, f"--{name}", value, f"at least {least} and less than 2^31")


def define_request(flag_values: flags.FlagValues, num: int | None, images: str) -> None:
    """Define the flags of a request, with `images` as the help of --num."""
    at: dict[str, Any] = {"flag_values": flag_values}
    define_sampling(flag_values, num, images)
    protocols = "balanced (i mod classes), random, null (no class), a list 3,1,4, or a .npy or text file"
    default = "by default balanced; random for sample --preset, as its FID was measured; 10 classes for visualize"
    flags.DEFINE_string("labels", "", f"{protocols}; {default}.", **at)
    flags.DEFINE_string("auto_checkpoint", None, "Weaker checkpoint, for autoguidance.", **at)
    define_recipe(flag_values)


def requested(
    values: flags.FlagValues, kind: str, save: list[str], default: Callable[[Pretrained], tuple[int, str]], **more: Any
) -> Request:
    """The request of a command that saves samples as `save`, with `more` in their metadata.

    default: model -> (number of samples, their labels), for flags that are not given.
    Raises: UserError for flags that do not fit each other or the checkpoint.
    """
    checkpoint, out = cli.required(values["checkpoint"]), cli.required(values["out"])
    check_sampling(values)
    check_formats(save)
    given = dict(autoencoder=values.autoencoder, auto_checkpoint=values.auto_checkpoint)
    model = pretrained.load(checkpoint, ema=values.ema, **given)
    recipe, (num, labels) = recipe_from(values, model), default(model)
    num, protocol = values.num or num, values.labels or labels
    folder = Folder(out, num, save)
    model.check(recipe)
    numbers = labels_for(np.arange(num), protocol, model.experiment.model.num_classes, values.seed)
    asked = dict(kind=kind, seed=values.seed, num=num, labels=protocol, save=list(folder.save), preset=values.preset)
    metadata = model.metadata(recipe, labels_sha256=digest(numbers), **asked, **more)
    return Request(folder, model, recipe, numbers, values.seed, values.batch_size, metadata)
