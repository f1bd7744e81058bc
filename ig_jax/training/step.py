"""One train step: noise a batch, run the network once, dual loss, optimizer, EMA. The loss is `batch_loss`.

Imports only jax, flax, optax, einops and the floor below, so that it runs where nothing else is installed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.diffusion import losses, paths
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.errors import check
from ig_jax.models import dit, latents
from ig_jax.parallel.sharding import batch_sharding, on_mesh, replicated
from ig_jax.training.optimizer import EmaConfig, OptimizerConfig, learning_rate
from ig_jax.training.state import Params, TrainState, partition


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The dual loss and its accelerated target."""

    inter_weight: tuple[float, ...]  # lambda, one for each intermediate head
    label_drop: float  # probability of the null label
    accelerate: bool  # move the final head's target by omega * sg(v_f - v_i)
    omega: float
    gap_source: str  # who computes the gap: "ema" (the first EMA, one more forward pass) | "online" (free)
    start_step: int  # first step with the accelerated target

    def __post_init__(self):
        for weight in self.inter_weight:
            check(weight >= 0, "inter_weight", weight, "at least 0")
        check(0 <= self.label_drop < 1, "label_drop", self.label_drop, "in [0, 1)")
        check(0 <= self.omega < 1, "omega", self.omega, "in [0, 1)",
              "the fixed point has w = 1 / (1 - omega) built in, omega >= 1 diverges")
        check(self.gap_source in ("ema", "online"), "gap_source", self.gap_source, "ema or online")
        check(self.start_step >= 0, "start_step", self.start_step, "at least 0 steps")


def draw(seed: int, step: jax.Array, x: jax.Array, y: jax.Array, label_drop: float, null_label: int):
    """(eps, t, y) of a global batch x [B, H, W, C], y [B]: each example's from (seed, step, position)."""
    eps = jax.random.normal(address(seed, Purpose.NOISE, step), x.shape, jnp.float32)
    t = jax.random.uniform(address(seed, Purpose.TIME, step), y.shape, jnp.float32)
    dropped = jax.random.bernoulli(address(seed, Purpose.LABEL_DROP, step), label_drop, y.shape)
    return eps, t, jnp.where(dropped, null_label, y)


def batch_loss(
    model: dit.DiTConfig, path: str, loss: LossConfig, params: Params, ema: Params, step: jax.Array,
    x: jax.Array, eps: jax.Array, t: jax.Array, y: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar that is optimised and its terms by name, for latents x and noise eps [B, H, W, C], t, y [B]."""
    x_t, v_target = paths.interpolate(path, x, eps, t)
    out = dit.apply(model, params, x_t, t, y)
    final_target = v_target
    if loss.accelerate:
        gap = _gap(model, loss, out, ema, step, x_t, t, y)
        omega = jnp.where(step >= loss.start_step, loss.omega, 0.0)
        final_target = losses.accelerated_target(v_target, gap, omega)
    terms = losses.dual_loss(out, v_target, final_target, loss.inter_weight)
    total = jnp.mean(terms.total)
    metrics = {"loss/total": total, "loss/final": jnp.mean(terms.final)}
    for name, term in zip(intermediate_names(model), terms.intermediate):
        metrics[name] = jnp.mean(term)
    if out.intermediate:
        metrics["gap_norm"] = jnp.sqrt(jnp.mean(losses.guidance_gap(out) ** 2))
    return total, metrics


def _gap(model, loss, out, ema, step, x_t, t, y):
    """v_f - v_i [B, H, W, C] of this network or of its EMA; the EMA runs only once it is needed."""
    if loss.gap_source == "online":
        return losses.guidance_gap(out)
    return jax.lax.cond(
        step >= loss.start_step,
        lambda: losses.guidance_gap(dit.apply(model, ema, x_t, t, y)),
        lambda: jnp.zeros_like(out.final),
    )


def intermediate_names(model: dit.DiTConfig) -> list[str]:
    """The metric of each intermediate head's loss; several heads are told apart by their depth."""
    if len(model.inter_depth) == 1:
        return ["loss/intermediate"]
    return [f"loss/intermediate_{depth}" for depth in model.inter_depth]


def loss_and_gradients(loss_fn, trainable: Params, batch: tuple, accumulate: int):
    """Gradients and metrics of loss_fn(trainable, *batch), averaged over `accumulate` micro-batches.

    A micro-batch takes every accumulate-th example, so each device keeps its own part of the batch.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return gradient(trainable, *batch)
    pieces = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]), 0, 1), batch
    )

    def add(total, piece):
        return jax.tree.map(jnp.add, total, gradient(trainable, *piece)), None

    first = jax.tree.map(lambda a: a[0], pieces)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, trainable, *first))
    total, _ = jax.lax.scan(add, zero, pieces)
    return jax.tree.map(lambda a: a / accumulate, total)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], *, model: dit.DiTConfig, path: str, loss: LossConfig,
    optimizer: optax.GradientTransformation, schedule, trains, ema: EmaConfig, accumulate: int, seed: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from batch {"image": uint8 or normalised float32 latents [B, H, W, C], "label": int32 [B]}."""
    x = batch["image"]
    x = latents.from_uint8(x) if x.dtype == jnp.uint8 else x
    eps, t, y = draw(seed, state.step, x, batch["label"], loss.label_drop, model.num_classes)
    trainable, frozen = partition(state.params, trains)
    gap_ema = state.ema[ema.names[0]]

    def loss_fn(trainable, *batch):
        return batch_loss(model, path, loss, trainable | frozen, gap_ema, state.step, *batch)

    gradients, metrics = loss_and_gradients(loss_fn, trainable, (x, eps, t, y), accumulate)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    params = optax.apply_updates(trainable, updates) | frozen
    averages = {
        name: jax.tree.map(lambda a, p, rate=ema.rate(name, state.step): a + rate * (p - a), average, params)
        for name, average in state.ema.items()
    }
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["learning_rate"] = schedule(state.step)
    return TrainState(state.step + 1, params, averages, opt_state), metrics


def make_train_step(
    layout, mesh: Mesh, *, model: dit.DiTConfig, path: str, loss: LossConfig, optimizer: OptimizerConfig,
    transformation: optax.GradientTransformation, ema: EmaConfig, total_steps: int, seed: int,
):
    """The jitted, sharded train step for states of `layout` on `mesh`; it donates the state it is given.

    Raises: UserError when the loss and the model disagree about the number of intermediate heads.
    """
    check(len(loss.inter_weight) == len(model.inter_depth), "loss.inter_weight", loss.inter_weight,
          f"one weight for each of model.inter_depth={model.inter_depth}")
    check(not loss.accelerate or model.inter_depth, "loss.accelerate", loss.accelerate,
          "False for a model without an intermediate head")
    step = functools.partial(
        train_step, model=model, path=path, loss=loss, optimizer=transformation,
        schedule=learning_rate(optimizer, total_steps), trains=optimizer.trains, ema=ema,
        accumulate=optimizer.accumulate, seed=seed,
    )

    def sharded(state, batch):
        with on_mesh(mesh):
            return step(state, batch)

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(
        sharded,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
