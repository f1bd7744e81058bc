"""A network and an experiment small enough to train in a test, with weights that are nowhere zero."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from ig_jax.base.schema import bind
from ig_jax.config.experiment import Experiment
from ig_jax.data.dataset import DataConfig
from ig_jax.data.spec import BatchSpec
from ig_jax.diffusion.loss import Objective
from ig_jax.diffusion.randomness import Purpose
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.generation import sampler as generate
from ig_jax.models import dit, zoo
from ig_jax.models.latents import from_factor
from ig_jax.training.step import TrainStep

ROOT = Path(__file__).parents[1]
CACHE = ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_")  # settings of tests/conftest.py
ALL = os.environ.get("IG_JAX_SLOW") == "1"
SLOW = pytest.mark.skipif(not ALL, reason="IG_JAX_SLOW=1 runs the long ones")

MODEL = dit.DiTConfig(
    **zoo.FAMILIES["sit"],
    input_size=8,
    channels=1,
    patch_size=4,
    depth=3,
    width=32,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=10,
    inter_depth=(1,),
    dtype="float32",
    scan_blocks=False,
    remat="none",
)

# What a line of metrics.jsonl says of the time since the line before.
SPEED = ("time", "steps_per_second", "data_wait")

# Seconds after which a process counts as hung: ten times what any needs, so that a busy machine breaks no test.
HANGS = 600

# Overrides that make configs/digits.py a run of seconds; as flags and as a dict.
SMALL = {
    "model.patch_size": 4,
    "model.depth": 3,
    "model.width": 32,
    "model.mlp_ratio": 2.0,
    "model.inter_depth": (1,),
    "data.batch_size": 16,
    "run.log_every": 1,
    "run.preview_every": 0,
    "run.preview_images": 0,
    "optimizer.warmup_steps": 2,
}


def params(config: dit.DiTConfig = MODEL, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters with noise on every one, so that no head, gate or bias is zero."""
    fresh = dit.init(config, jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(fresh))
    return {name: value + 0.05 * jax.random.normal(key, value.shape) for key, (name, value) in zip(keys, fresh.items())}


def batch(count: int = 16, config: dit.DiTConfig = MODEL, seed: int = 0) -> dict[str, jax.Array]:
    """Normalised latents (count, H, W, C) float32 in [-1, 1] and labels (count,), as `latent_spec` says."""
    a, b = jax.random.split(jax.random.key(seed))
    shape = (count, config.input_size, config.input_size, config.channels)
    return {
        "latent": jnp.tanh(jax.random.normal(a, shape)),
        "label": jax.random.randint(b, (count,), 0, config.num_classes),
    }


def train_step(transformation, *, model, process, loss, optimizer, ema, total_steps=1, seed=0, spec=None) -> TrainStep:
    """A step on batches of `spec`, or of normalised latents."""
    return TrainStep(
        spec=spec or latent_spec(model),
        objective=Objective(model, process, loss),
        optimizer=optimizer,
        transformation=transformation,
        ema=ema,
        total_steps=total_steps,
        seed=seed,
    )


def latent_spec(config: dit.DiTConfig = MODEL) -> BatchSpec:
    """The specification of `batch`: normalised latents."""
    shape = (config.input_size, config.input_size, config.channels)
    scaling = from_factor("toy", 1.0, config.channels, "half")
    return BatchSpec("latents", shape, "float32", False, scaling, tuple(map(str, range(config.num_classes))))


def data_config(source: str = "tfds", **changes) -> DataConfig:
    """The data section of configs/digits.py for another source."""
    return DataConfig(**{**load_config("digits").data, "source": source, "in_memory": False, **changes})


def sample_latents(params, seed, indices, labels, scales, *, model, process, solver, steps, guidance) -> jax.Array:
    """Latents of the samples `indices` with `labels`, by a solver with its own defaults."""
    program = generate.Program(model, process, SOLVERS[solver](), steps, guidance)
    x = generate.normal(seed, Purpose.SAMPLE_NOISE, indices, program.shape)
    return generate.integrate(program, params, {}, seed, indices, labels, scales, x)[0]


def load_config(name: str, arg: str = ""):
    """The ConfigDict of configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def experiment(**changes) -> Experiment:
    """configs/digits.py made small; `changes` as {"run.steps": 4} with dots for sections."""
    config = load_config("digits")
    config.update_from_flattened_dict(SMALL | changes)
    return bind(Experiment, config)


def flags(**changes) -> list[str]:
    """The same experiment as command-line overrides."""
    return [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]


def run(*command: str, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """`python -m COMMAND...` from the project root, output captured."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(devices),
        text=True,
        capture_output=True,
        timeout=HANGS,
        **options,
    )


def fresh(values: absl_flags.FlagValues) -> absl_flags.FlagValues:
    """The flags of a command as its module defines them, for one more call in this process.

    A call leaves its values there.
    """
    for name in values:
        values[name].unparse()
    values.unparse_flags()
    return values


def environment(devices: int = 1) -> dict[str, str]:
    """This process's, with another number of host devices, and programs kept where a user's are."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(CACHE)},
        # The last of two counts of devices is the one that counts.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }


def replace(config, **changes):
    """dataclasses.replace, for short lines in tests."""
    return dataclasses.replace(config, **changes)


def learnt(line: dict) -> dict:
    """A line of metrics.jsonl without what depends on the clock."""
    return {name: value for name, value in line.items() if not name.startswith(("seconds/", "goodput", *SPEED))}


def scalars(metrics: dict) -> dict[str, float]:
    """The metrics of a step that are one number, on the host."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, jax.Array)}
