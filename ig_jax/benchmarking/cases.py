"""What is measured: a network and how it is trained or sampled, a batch, a layout of devices.

By a published name, with the settings of the paper and arrays made on the device, so that nothing is needed
but JAX; or from a config file, with its data.
"""

import dataclasses
import itertools
from typing import Any

from ig_jax.diffusion.process import ProcessConfig
from ig_jax.errors import check
from ig_jax.generation.recipe import Recipe
from ig_jax.models import zoo
from ig_jax.models.dit_config import DiTConfig
from ig_jax.training.optimizer import AdamWConfig, EmaConfig, OptimizerConfig
from ig_jax.training.step import LossConfig


@dataclasses.dataclass(frozen=True)
class Length:
    """What a schedule wants to know of a run."""

    steps: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure; to TrainProgram.of it is an experiment."""

    name: str
    model: DiTConfig
    process: ProcessConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    ema: EmaConfig
    run: Length
    seed: int
    sample: Recipe
    batch: int  # global, images
    mesh: tuple[int, ...]  # of make_mesh: devices along data, fsdp, tensor; one may be -1; fsdp_up_to
    devices: int  # how many of them; 0 for all
    varied: tuple[str, ...] = ()  # what sets this case of a sweep apart, for its label
    experiment: Any = None  # the ig_jax.config.Experiment it comes from, whose data it can read

    @property
    def label(self) -> str:
        """A short name that is unique within one call of the command."""
        scan = ["scan"] if self.model.scan_blocks else []
        return " ".join([self.name, f"b{self.batch}", self.model.dtype, *scan, *self.varied])

    @property
    def work(self) -> tuple:
        """Equal for two cases that do the same work in different ways, and so are measured in turns."""
        plain = dataclasses.replace(self.model, dtype="float32", scan_blocks=False, remat="none", attention="auto")
        return self.name, plain, self.batch, self.mesh, self.devices, self.sample

    def as_dict(self) -> dict:
        """The whole recipe as JSON types."""
        return dataclasses.asdict(dataclasses.replace(self, experiment=None))


# Latent height and channels of a family's autoencoder at 256x256 pixels, and its sampler.
LATENTS = {"sit": (32, 4), "dit": (32, 4), "lightningdit": (16, 32)}
SOLVERS = {"sit": "sde", "dit": "ddpm", "lightningdit": "sde"}


def published(name: str) -> Case:
    """SiT-XL/2 and its like as arXiv 2512.24176 trains and samples it.

    Raises: UserError for a name of no published network.
    """
    settings = zoo.named(name)
    family = next(key for word, key in zoo.NAMES.items() if name.startswith(f"{word}-"))
    size, channels = LATENTS[family]
    model = DiTConfig(**settings, input_size=size, channels=channels, num_classes=1000, dtype="float32",
                      scan_blocks=False, remat="auto")
    gaussian = family == "dit"
    return Case(
        name=name, model=model,
        process=ProcessConfig(
            kind="gaussian" if gaussian else "linear", prediction="noise" if gaussian else "velocity",
            time="uniform", time_mean=0.0, time_std=1.0,
        ),
        loss=LossConfig(
            inter_weight=(0.5,) * len(model.inter_depth), label_drop=0.1, accelerate=False, omega=0.0,
            gap_source="online", start_step=0, direction_weight=0.0, direction_intermediate=False,
        ),
        optimizer=AdamWConfig(
            name="adamw", learning_rate=1e-4, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8,
            weight_decay=0.0, clip_norm=1.0, accumulate=1, train_only=(),
        ),
        ema=EmaConfig(decays=(0.9999,), warmup=False), run=Length(400_000), seed=0,
        sample=Recipe(solver=SOLVERS[family], steps=250, ig_scale=1.4, cfg_scale=1.35, ig_interval=(0.0, 1.0),
                      cfg_interval=(0.0, 0.7)),
        batch=8, mesh=(-1, 1, 1), devices=0,
    )


def of_config(path: str) -> Case:
    """The experiment of configs/NAME.py[:argument] with its own batch and mesh.

    Raises: UserError for a file that cannot be loaded or an experiment that is not whole.
    """
    from ig_jax.benchmarking.config_file import experiment_of  # late: brings ml_collections and the data

    e = experiment_of(path)
    return Case(
        name=e.name, model=e.model, process=e.process, loss=e.loss, optimizer=e.optimizer, ema=e.ema,
        run=Length(e.run.steps), seed=e.seed, sample=e.sample, batch=e.data.batch_size,
        mesh=dataclasses.astuple(e.mesh), devices=0, experiment=e,
    )


NAMED = ("depth", "width", "latent", "devices", "cfg_scale")  # in a label where they vary
ALWAYS_NAMED = ("remat", "attention")  # and these where they are given


def changed(case: Case, axis: str, value) -> Case:
    """The case with one thing other than it was.  Raises: UserError for an impossible value."""
    model, replace = case.model, dataclasses.replace
    if axis in ("batch", "devices", "mesh"):
        return replace(case, **{axis: value})
    if axis in ("solver", "steps", "ig_scale", "cfg_scale", "ig_interval", "cfg_interval"):
        return replace(case, sample=replace(case.sample, **{axis: value}))
    if axis == "width":  # of the same head dimension
        heads = model.width // model.num_heads
        check(value % heads == 0, "--width", value, f"a multiple of the head dimension {heads} of {case.name}")
        changes = dict(width=value, num_heads=value // heads)
    elif axis == "depth":
        changes = dict(depth=value, inter_depth=tuple(sorted({min(d, value) for d in model.inter_depth})))
    elif axis == "latent":
        changes = dict(input_size=value)
    else:
        changes = {{"scan": "scan_blocks"}.get(axis, axis): value}
    return replace(case, model=replace(model, **changes))


def expanded(base: Case, axes: dict[str, list]) -> list[Case]:
    """Every combination of the values of the axes; an axis without values stays as it is."""
    given = {axis: values for axis, values in axes.items() if values}
    cases = []
    for values in itertools.product(*given.values()):
        case, varied = base, []
        for axis, value in zip(given, values):
            case = changed(case, axis, value)
            named = axis in ALWAYS_NAMED or (axis in NAMED and len(given[axis]) > 1)
            varied += [f"{axis}={value}"] if named else []
        cases.append(dataclasses.replace(case, varied=tuple(varied)))
    return cases


def grouped(cases: list[Case]) -> list[list[Case]]:
    """Cases that do the same work beside each other, in the order they came."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.work, []).append(case)
    return list(groups.values())
