"""A checkpoint directory of a network too small to be good, with no weight that is zero."""

import dataclasses
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import toy

from ig_jax.base.schema import bind
from ig_jax.checkpoints.steps import Checkpoints
from ig_jax.config.experiment import Experiment
from ig_jax.optim.optimizer import make_optimizer
from ig_jax.training.state import TrainState, new_state


def experiment(**model) -> Experiment:
    """The digits experiment with two blocks and two intermediate heads; `model` overrides its network."""
    config = toy.load_config("digits", "runlocal")
    config.model.update({"depth": 2, "width": 32, "inter_depth": (1, 2)} | model)
    config.loss.inter_weight = (0.5,) * len(config.model.inter_depth)
    config.sample.update(solver="euler", steps=4)
    if not config.model.inter_depth:
        config.sample.ig_scale = 1.0
    channels = config.model.channels
    if channels != 1:
        config.run.preview_images = 0
        config.latents.update(name="sd_vae", shift=(0.0,) * channels, scale=(1.0,) * channels, uint8_rule="sit")
        config.data.update(holds="latents", dtype="float32")
    return bind(Experiment, config)


def state(e: Experiment, seed: int = 0) -> TrainState:
    """What training leaves at step 0, but with noise on every weight."""

    @jax.jit
    def make(key):
        fresh = new_state(e.model, e.optimizer, make_optimizer(e.optimizer, 1, e.model), e.ema.names, e.seed, {})
        keys = jax.random.split(key, len(fresh.params))
        params = {
            name: value + 0.1 * jax.random.normal(key, value.shape, jnp.float32)
            for key, (name, value) in zip(keys, fresh.params.items())
        }
        return dataclasses.replace(fresh, params=params, ema=dict.fromkeys(e.ema.names, params))

    return make(jax.random.key(seed))


def write(directory: Path, e: Experiment, seed: int = 0) -> Path:
    """A work directory with one step, as training writes it."""
    meta = {
        "config": e.as_dict(),
        "data": {},
        "labels": [str(i) for i in range(e.model.num_classes)],
        "versions": {"jax": importlib.metadata.version("jax")},
        "devices": 1,
    }
    with Checkpoints(directory / "checkpoints", keep=1) as saver:
        saver.save(0, state(e, seed).items(), meta)
    return directory
