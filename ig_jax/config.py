"""An experiment, checked in full before anything is compiled.

A config file returns an ml_collections.ConfigDict; `bind` turns it into the frozen dataclasses below. Every
key must be there, of the right type and in range, and nothing else may be: the fields are exactly what the
code reads, so a key that nothing reads cannot exist. Defaults live in configs/ alone; what a section's class
gives a default is off or left to its reader, and may be left out.
"""

import dataclasses
import difflib
import math
import types
import typing

from ig_jax.data.dataset import DataConfig, open_split
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.errors import UserError, check
from ig_jax.generation.recipe import Recipe
from ig_jax.models.dit import DiTConfig
from ig_jax.models.latents import LatentScaling
from ig_jax.training.optimizer import AdamWConfig, EmaConfig, MuonConfig
from ig_jax.training.step import LossConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1."""

    data: int
    fsdp: int
    tensor: int
    fsdp_up_to: int = 1  # where fsdp is 1: the largest divisor of the devices up to this


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, and what is written when. Durations in steps, 0 for never."""

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    preview_every: int
    preview_images: int

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("preview_every", "preview_images"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where a new run gets its weights; a resumed run goes on from its own checkpoint instead."""

    checkpoint: str  # workdir of another run, or one of its steps; "" for fresh weights
    ema: str  # which of its averages, by decay; "" for the first

    def __post_init__(self):
        check(self.checkpoint or not self.ema, "ema", self.ema, "empty without a checkpoint",
              "set --config.init.checkpoint")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run and, in its checkpoint, everything a sampler needs."""

    name: str
    seed: int
    init: InitConfig
    model: DiTConfig
    latents: LatentScaling  # name "pixels" for a model of the images themselves
    process: ProcessConfig
    loss: LossConfig
    optimizer: AdamWConfig | MuonConfig
    ema: EmaConfig
    data: DataConfig
    mesh: MeshConfig
    run: RunConfig
    sample: Recipe  # of previews, and the default of the sample command

    def __post_init__(self):
        check(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        check(self.latents.channels == self.model.channels, "latents.scale", self.latents.scale,
              f"one factor for each of the {self.model.channels} channels of the model")
        self.process.check_model(self.model)
        self.loss.check_model(self.model)
        check(self.latents.name == "pixels" or not self.run.preview_images, "run.preview_images",
              self.run.preview_images, "0 for a model of latents", "sample from its checkpoints with an autoencoder")
        self.optimizer.check_model(self.model)
        try:
            self.sample.check_model(self.model)
        except UserError as error:
            raise UserError(f"sample.{error}") from error

    def open_split(self, split: str):
        """The images of one split, checked against the model."""
        model = self.model
        shape = (model.input_size, model.input_size, model.channels)
        return open_split(self.data, split, shape, model.num_classes)

    def as_dict(self) -> dict:
        """Plain JSON types; bind(Experiment, x.as_dict()) == x."""
        return dataclasses.asdict(self)


def bind(cls, values, prefix: str = "config"):
    """`cls` filled from a mapping, each key named in errors by its full path.

    Raises: UserError for unknown, missing, mistyped, non-finite or out-of-range keys.
    """
    hints = typing.get_type_hints(cls)
    check(hasattr(values, "keys"), prefix, values, f"a section with the keys {', '.join(hints)}")
    for key in values.keys():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            mend = f"did you mean {prefix}.{close[0]}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"{prefix}.{key} is not a setting that anything reads; {mend}")
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for key in hints:
        if key not in values and key not in optional:
            raise UserError(f"{prefix}.{key} is missing; set it in the config file")
    fields = {key: _convert(hint, values[key], f"{prefix}.{key}") for key, hint in hints.items() if key in values}
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(_prefixed(str(error), prefix)) from error


def _prefixed(message: str, prefix: str) -> str:
    """Errors of a section name its key; nested sections have already added the config path."""
    return message if message.startswith("config.") else f"{prefix}.{message}"


def _convert(hint, value, name: str):
    if typing.get_origin(hint) is types.UnionType:
        choices = typing.get_args(hint)
        if not all(map(dataclasses.is_dataclass, choices)):
            return _one_of(choices, value, name)
        hint = _named(choices, value, name)
    if dataclasses.is_dataclass(hint):
        return bind(hint, value, name)
    if typing.get_origin(hint) is typing.Literal:
        return value  # _named has chosen by it
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint), value, name)
    wanted = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}[hint]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and number,
        float: number and math.isfinite(value),
        str: isinstance(value, str),
    }[hint]
    check(fits, name, value, wanted)
    return hint(value)


def _one_of(hints: tuple, value, name: str):
    """`value` as the first of the types that takes it; None only where it is one of them."""
    if value is None and types.NoneType in hints:
        return None
    errors = []
    for hint in hints:
        try:
            return _convert(hint, value, name)
        except UserError as error:
            errors.append(str(error))
    raise UserError(errors[0])


def _named(choices: tuple, value, name: str):
    """The one of several dataclasses whose `name` is the section's; each has fields of its own."""
    check(hasattr(value, "keys") and "name" in value, name, value, "a section with a name")
    known = {typing.get_args(typing.get_type_hints(cls)["name"])[0]: cls for cls in choices}
    check(value["name"] in known, f"{name}.name", value["name"], f"one of {', '.join(known)}")
    return known[value["name"]]


def _tuple(args: tuple, value, name: str) -> tuple:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if args[-1] is Ellipsis:
        args = (args[0],) * len(values)
    check(len(values) == len(args), name, value, f"{len(args)} numbers")
    return tuple(_convert(arg, item, name) for arg, item in zip(args, values))
