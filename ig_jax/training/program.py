"""The train state and step of an experiment on a mesh, shared by training, preflight and benchmark."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ig_jax.config.experiment import Experiment
from ig_jax.data.spec import ENCODER, BatchSpec
from ig_jax.diffusion.loss import Objective
from ig_jax.models import autoencoder
from ig_jax.optim.optimizer import make_optimizer
from ig_jax.parallel.sharding import batch_sharding, replicated
from ig_jax.training import memory
from ig_jax.training.state import TrainState, new_state, state_layout
from ig_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What is compiled for a run; nothing is allocated."""

    fit: memory.Fit  # remat and micro-batches, chosen where the config leaves them open
    layout: Any  # a TrainState of ShapeDtypeStruct, each with its sharding
    batch: dict[str, Any]  # a global batch and the weights of its encoder, if any, each array with its sharding
    new: Callable[..., TrainState]  # weights by name -> the state at step 0
    step: jax.stages.Wrapped  # (state, batch) -> (state, metrics); donates the state

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mesh, spec: BatchSpec, batch: int) -> "TrainProgram":
        """The program of an experiment on a mesh, for `batch` examples per step as `spec` describes them.

        Raises: UserError when the loss or the process does not fit the model.
        """
        e = experiment
        transformation = make_optimizer(e.optimizer, e.run.steps, e.model)
        new = functools.partial(new_state, e.model, e.optimizer, transformation, e.ema.names, e.seed)
        layout = state_layout(lambda: new({}), mesh)
        arrays: dict[str, Any] = dict(spec.abstract(batch, batch_sharding(mesh)))
        if spec.encoder:
            shapes = autoencoder.of_encoder(autoencoder.shapes(spec.encoder.config))
            place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))
            arrays[ENCODER] = jax.tree.map(place, shapes)
        fit = memory.fitted(e.model, e.optimizer.accumulate, layout, arrays, mesh, batch)
        optimizer = dataclasses.replace(e.optimizer, accumulate=fit.accumulate)
        objective = Objective(dataclasses.replace(e.model, remat=fit.remat), e.process, e.loss)
        step = TrainStep(
            spec=spec,
            objective=objective,
            optimizer=optimizer,
            transformation=transformation,
            ema=e.ema,
            total_steps=e.run.steps,
            seed=e.seed,
            leap=e.run.skip_leaps,
        )
        return cls(fit, layout, arrays, new, step.jitted(layout, mesh))

    def lower(self) -> jax.stages.Lowered:
        """The step, ready to be compiled."""
        return self.step.lower(self.layout, self.batch)
