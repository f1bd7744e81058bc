"""One train step: prepare the batch, gradients of the objective, optimizer, EMA.

Imports only jax, flax, optax and rooms below, so that it runs where nothing else is installed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.data.spec import ENCODER, FLIPPED, LOG_VARIANCES, BatchSpec
from ig_jax.diffusion import curves
from ig_jax.diffusion.loss import NoisyBatch, Objective
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models import autoencoder, latents
from ig_jax.optim.ema import EmaConfig
from ig_jax.optim.optimizer import OptimizerConfig, learning_rate
from ig_jax.parallel.mesh import BATCH_AXES, batch_shards
from ig_jax.parallel.sharding import batch_sharding, mean_of_shards, of_shards, on_mesh, one_shard, replicated
from ig_jax.training.state import Params, TrainState, partition


def prepare(spec: BatchSpec, batch: dict[str, Any], seed: int, step: jax.Array) -> jax.Array:
    """Normalised inputs x (B, H, W, C) float32 of a global batch: mirrored, sampled from the posterior, normalised.

    Each example's choice of its mirror image and its latent depend on (seed, step, position) alone. Images are mirrored
    before they are encoded, since the encoding of a mirrored image is not the mirrored encoding.
    batch: the arrays of `spec`, and under ENCODER the weights of its encoder, if it has one.
    """
    count, x = len(batch["label"]), batch[spec.array]
    if spec.mirrored:
        mirror = jax.random.bernoulli(address(seed, Purpose.MIRROR, step), 0.5, (count, 1, 1, 1))
        flipped = x[:, :, ::-1] if spec.holds == "pixels" else batch[spec.array + FLIPPED]
        x = jnp.where(mirror, flipped, x)
    if spec.encoder:
        encoder, weights = spec.encoder, batch[ENCODER]
        encode = lambda images: autoencoder.moments(encoder.config, weights, images, encoder.compute)
        x = autoencoder.by_chunks(encode, x, autoencoder.CHUNK * batch_shards(jax.sharding.get_abstract_mesh()))
    elif spec.holds == "pixels":
        return latents.from_uint8(x)
    if spec.channels_first:
        x = jnp.moveaxis(x, 1, -1)
    if spec.holds == "moments" or spec.encoder:
        mean, std = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        if spec.spread == "logvar":
            std = jnp.exp(jnp.clip(std, *LOG_VARIANCES) / 2)
        noise = jax.random.normal(address(seed, Purpose.POSTERIOR, step), mean.shape, jnp.float32)
        x = latents.sample(mean, std, noise)
    return spec.scaling.normalise(x)


def accumulated_gradients(
    objective: Callable, trainable: Params, batch: NoisyBatch, accumulate: int
) -> tuple[Params, dict[str, Any]]:
    """Gradients and metrics of objective(trainable, batch), averaged over `accumulate` micro-batches.

    A micro-batch takes every accumulate-th example, so that no example moves to another device, and each shard of the
    batch adds up its own gradients, so that they are exchanged once and not for each micro-batch.
    """
    gradient = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        return gradient(trainable, batch)
    mesh = jax.sharding.get_abstract_mesh()
    shards = batch_shards(mesh)
    micro_batches = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(shards, len(a) // accumulate // shards, accumulate, *a.shape[1:]), 2, 0), batch
    )

    def of_each_shard(micro_batch):
        if shards == 1:
            return jax.tree.map(lambda a: a[None], gradient(trainable, jax.tree.map(lambda a: a[0], micro_batch)))
        with one_shard():
            gradients, metrics = jax.vmap(gradient, (None, 0), spmd_axis_name=BATCH_AXES)(trainable, micro_batch)
        return of_shards(gradients), metrics

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, of_each_shard(micro_batch)), None

    first = jax.tree.map(lambda a: a[0], micro_batches)
    shapes = jax.eval_shape(of_each_shard, first)
    gradients, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zero = of_shards(gradients) if shards > 1 else gradients, metrics
    (gradients, metrics), _ = jax.lax.scan(add, zero, micro_batches)
    gradients = mean_of_shards(gradients) if shards > 1 else {name: array[0] for name, array in gradients.items()}
    return jax.tree.map(lambda a: a / accumulate, (gradients, jax.tree.map(lambda a: a.mean(0), metrics)))


def updated(
    state: TrainState,
    gradients: Params,
    *,
    optimizer: optax.GradientTransformation,
    trains: Callable[[str], bool],
    ema: EmaConfig,
) -> tuple[TrainState, Params]:
    """(the state after one update by the gradients of its trained parameters, what was added to them).

    The optimizer, then every EMA.
    """
    trainable, frozen = partition(state.params, trains)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    params = optax.apply_updates(trainable, updates) | frozen
    averages = ema.updated(state.ema, params, state.step)
    return TrainState(state.step + 1, params, averages, opt_state, state.guard), updates


def _squares(arrays: Params) -> dict[str, jax.Array]:
    """The squared norm of each array."""
    return {name: jnp.sum(jnp.square(array.astype(jnp.float32))) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One update of the train state by one global batch."""

    spec: BatchSpec
    objective: Objective
    optimizer: OptimizerConfig
    transformation: optax.GradientTransformation  # what `make_optimizer` makes of it
    ema: EmaConfig
    total_steps: int
    seed: int
    leap: float = 0.0  # of the loss at which a step is skipped, in standard deviations; 0 for never

    def __call__(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The next state and the metrics of this step; the batch is as `prepare` takes it."""
        x = prepare(self.spec, batch, self.seed, state.step)
        noisy = self.objective.noised(x, batch["label"], self.seed, state.step)
        trainable, frozen = partition(state.params, self.optimizer.trains)
        ema = state.ema[self.ema.names[0]]

        def objective(trainable: Params, noisy: NoisyBatch):
            return self.objective(trainable | frozen, ema, noisy, state.step)

        gradients, metrics = accumulated_gradients(objective, trainable, noisy, self.optimizer.accumulate)
        if "gap_square" in metrics:  # the root is taken once the micro-batches are averaged
            metrics["gap_norm"] = jnp.sqrt(metrics.pop("gap_square"))
        squares = _squares(gradients)
        metrics["gradient_norm"] = jnp.sqrt(sum(squares.values()))
        metrics["learning_rate"] = learning_rate(self.optimizer, self.total_steps)(state.step)
        trains = self.optimizer.trains
        new, updates = updated(state, gradients, optimizer=self.transformation, trains=trains, ema=self.ema)
        metrics |= {"gradient": curves.by_depth(squares), "update": curves.by_depth(_squares(updates))}
        taken, guard = state.guard.judged(state.step, metrics["loss/total"], squares, self.leap)
        kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, state)
        return dataclasses.replace(kept, step=new.step, guard=guard), metrics

    def jitted(self, layout: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
        """The jitted, sharded step for states of `layout` on `mesh`; it donates the state it is called with."""

        def sharded(state, batch):
            with on_mesh(mesh):
                return self(state, batch)

        state_shardings, rows = jax.tree.map(lambda leaf: leaf.sharding, layout), batch_sharding(mesh)
        batch_shardings = dict.fromkeys(self.spec.arrays, rows) | {ENCODER: replicated(mesh)}
        return jax.jit(
            sharded,
            in_shardings=(state_shardings, batch_shardings if self.spec.encoder else rows),
            out_shardings=(state_shardings, replicated(mesh)),
            donate_argnums=0,
        )
