"""From an experiment to the state and the step that train it on a mesh: one way for runs, preflight and benchmark."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ig_jax.parallel.sharding import batch_sharding
from ig_jax.training import memory
from ig_jax.training.optimizer import make_optimizer
from ig_jax.training.state import TrainState, new_state, state_layout
from ig_jax.training.step import make_train_step

if TYPE_CHECKING:  # an experiment reads data, which a machine with nothing but JAX cannot
    from ig_jax.config import Experiment


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What is compiled for a run, nothing allocated yet."""

    fit: memory.Fit  # what a config leaves open to the machine
    layout: Any  # a TrainState of ShapeDtypeStruct, each with its sharding
    new: Callable[..., TrainState]  # given weights by name -> the state at step 0
    step: Callable[..., tuple[TrainState, dict]]  # jitted (state, batch) -> (state, metrics); donates the state

    @classmethod
    def of(cls, experiment: "Experiment", mesh: Mesh, batch: int) -> "TrainProgram":
        """The program of an experiment on a mesh, for `batch` images a step.

        Raises: UserError when the loss or the process does not fit the model.
        """
        e = experiment
        transformation = make_optimizer(e.optimizer, e.run.steps, e.model)
        new = functools.partial(new_state, e.model, e.optimizer, transformation, e.ema.names, e.seed)
        layout = state_layout(lambda: new({}), mesh)
        fit = memory.fitted(e.model, e.optimizer.accumulate, layout, mesh, batch)
        model = dataclasses.replace(e.model, remat=fit.remat)
        optimizer = dataclasses.replace(e.optimizer, accumulate=fit.accumulate)
        step = make_train_step(
            layout, mesh, model=model, process=e.process, loss=e.loss, optimizer=optimizer,
            transformation=transformation, ema=e.ema, total_steps=e.run.steps, seed=e.seed,
        )
        return cls(fit, layout, new, step)

    def lower(self, experiment: "Experiment", mesh: Mesh, images: jnp.dtype) -> jax.stages.Lowered:
        """The step for the experiment's batches of `images` (uint8, or float32 for latents) and int32 labels."""
        model, rows = experiment.model, batch_sharding(mesh)
        shape = (experiment.data.batch_size, model.input_size, model.input_size, model.channels)
        batch = {"image": jax.ShapeDtypeStruct(shape, images, sharding=rows),
                 "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows)}
        return self.step.lower(self.layout, batch)
