"""One train step: noise a batch, run the network once, dual loss, optimizer, EMA. The loss is `batch_loss`.

Imports only jax, flax, optax, einops and the floor below, so that it runs where nothing else is installed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.diffusion import gaussian, losses
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.errors import check
from ig_jax.models import dit, latents
from ig_jax.parallel.sharding import batch_sharding, on_mesh, replicated
from ig_jax.training.optimizer import EmaConfig, OptimizerConfig, learning_rate
from ig_jax.training.state import Params, TrainState, partition


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The dual loss, its accelerated target and its direction term."""

    inter_weight: tuple[float, ...]  # lambda, one for each intermediate head
    label_drop: float  # probability of the null label
    accelerate: bool  # move the final head's target by omega * sg(final - intermediate)
    omega: float
    gap_source: str  # who computes the gap: "ema" (the first EMA, one more forward pass) | "online" (free)
    start_step: int  # first step with the accelerated target
    direction_weight: float  # of mean(1 - cos) between prediction and target over channels; 0 for none
    direction_intermediate: bool  # whether the intermediate heads have that term too (times their lambda)

    def __post_init__(self):
        for weight in self.inter_weight:
            check(weight >= 0, "inter_weight", weight, "at least 0")
        check(0 <= self.label_drop < 1, "label_drop", self.label_drop, "in [0, 1)")
        check(0 <= self.omega < 1, "omega", self.omega, "in [0, 1)",
              "the fixed point has w = 1 / (1 - omega) built in, omega >= 1 diverges")
        check(self.gap_source in ("ema", "online"), "gap_source", self.gap_source, "ema or online")
        check(self.start_step >= 0, "start_step", self.start_step, "at least 0 steps")
        check(self.direction_weight >= 0, "direction_weight", self.direction_weight, "at least 0 (0 is off)")

    @property
    def ema_forward(self) -> bool:
        """Whether a step runs the network of the EMA too."""
        return self.accelerate and self.gap_source == "ema"

    def check_model(self, model: dit.DiTConfig) -> None:
        """Raise UserError when the loss wants something of the model that it does not have."""
        check(len(self.inter_weight) == len(model.inter_depth), "loss.inter_weight", self.inter_weight,
              f"one weight for each of model.inter_depth={model.inter_depth}")
        check(not self.accelerate or model.inter_depth, "loss.accelerate", self.accelerate,
              "False for a model without an intermediate head")
        check(not self.direction_weight or model.channels > 1, "loss.direction_weight",
              self.direction_weight, "0 for a model of 1 channel", "one number has a sign, no direction")


def draw(
    process: ProcessConfig, seed: int, step: jax.Array, x: jax.Array, y: jax.Array, label_drop: float,
    null_label: int,
):
    """(eps, t, y) of a global batch x [B, H, W, C], y [B]: each example's from (seed, step, position)."""
    eps = jax.random.normal(address(seed, Purpose.NOISE, step), x.shape, jnp.float32)
    t = process.draw_times(address(seed, Purpose.TIME, step), y.shape)
    dropped = jax.random.bernoulli(address(seed, Purpose.LABEL_DROP, step), label_drop, y.shape)
    return eps, t, jnp.where(dropped, null_label, y)


def batch_loss(
    model: dit.DiTConfig, process: ProcessConfig, loss: LossConfig, params: Params, ema: Params,
    step: jax.Array, x: jax.Array, eps: jax.Array, t: jax.Array, y: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar that is optimised and its terms by name, for latents x and noise eps [B, H, W, C], t, y [B].

    loss/total is the sum of the other loss/ metrics, each times the weight `loss_terms` gives it.
    """
    x_t, target = process.noised(x, eps, t)
    out = dit.apply(model, params, x_t, t, y)
    predictions, _ = process.split(out)
    final_target = target
    if loss.accelerate:
        gap = _gap(model, process, loss, predictions, ema, step, x_t, t, y)
        omega = jnp.where(step >= loss.start_step, loss.omega, 0.0)
        final_target = losses.accelerated_target(target, gap, omega)
    terms = loss_terms(model, process, loss, out, target, final_target, x, eps, t)
    total = jnp.mean(losses.total(terms))
    metrics = {"loss/total": total} | {name: jnp.mean(term.value) for name, term in terms.items()}
    if out.intermediate:
        metrics["gap_square"] = jnp.mean(losses.guidance_gap(predictions) ** 2)
    return total, metrics


def loss_terms(
    model: dit.DiTConfig, process: ProcessConfig, loss: LossConfig, out: dit.DiTOutput, target: jax.Array,
    final_target: jax.Array, x: jax.Array, eps: jax.Array, t: jax.Array,
) -> dict[str, losses.Term]:
    """Every term of every head with its weight: squared error, then _direction and _vb where they are on.

    x and eps make the variational bound (_vb) that teaches each head of the gaussian process its variance.
    """
    names = intermediate_names(model)
    predictions, variances = process.split(out)
    terms = losses.dual_terms(
        predictions, target, final_target, names=names, inter_weight=loss.inter_weight,
        direction_weight=loss.direction_weight, direction_intermediate=loss.direction_intermediate,
    )
    if variances is None:
        return terms
    heads = lambda out: (out.final, *out.intermediate)  # noqa: E731
    for name, noise, variance in zip(["loss/final", *names], heads(predictions), heads(variances)):
        bound = gaussian.variational_bound(noise, variance, x, eps, t)
        terms[f"{name}_vb"] = losses.Term(terms[name].weight, bound)
    return terms


def _gap(model, process, loss, predictions, ema, step, x_t, t, y):
    """final - intermediate [B, H, W, C] of this network or of its EMA, which runs only once it is needed."""
    if loss.gap_source == "online":
        return losses.guidance_gap(predictions)
    return jax.lax.cond(
        step >= loss.start_step,
        lambda: losses.guidance_gap(process.split(dit.apply(model, ema, x_t, t, y))[0]),
        lambda: jnp.zeros_like(predictions.final),
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
    state: TrainState, batch: dict[str, jax.Array], *, model: dit.DiTConfig, process: ProcessConfig,
    loss: LossConfig, optimizer: optax.GradientTransformation, schedule, trains, ema: EmaConfig,
    accumulate: int, seed: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from batch {"image": uint8 or normalised float32 [B, H, W, C], "label": int32 [B]}."""
    x = batch["image"]
    x = latents.from_uint8(x) if x.dtype == jnp.uint8 else x
    eps, t, y = draw(process, seed, state.step, x, batch["label"], loss.label_drop, model.num_classes)
    trainable, frozen = partition(state.params, trains)
    gap_ema = state.ema[ema.names[0]]

    def loss_fn(trainable, *batch):
        return batch_loss(model, process, loss, trainable | frozen, gap_ema, state.step, *batch)

    gradients, metrics = loss_and_gradients(loss_fn, trainable, (x, eps, t, y), accumulate)
    if "gap_square" in metrics:  # the root is taken once the micro-batches are averaged
        metrics["gap_norm"] = jnp.sqrt(metrics.pop("gap_square"))
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["learning_rate"] = schedule(state.step)
    return updated(state, gradients, optimizer=optimizer, trains=trains, ema=ema), metrics


def updated(
    state: TrainState, gradients: Params, *, optimizer: optax.GradientTransformation, trains, ema: EmaConfig,
) -> TrainState:
    """The state after one update by the gradients of its trained parameters: the optimizer, then every EMA."""
    trainable, frozen = partition(state.params, trains)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    params = optax.apply_updates(trainable, updates) | frozen
    averages = {
        name: jax.tree.map(lambda a, p, rate=ema.rate(name, state.step): a + rate * (p - a), average, params)
        for name, average in state.ema.items()
    }
    return TrainState(state.step + 1, params, averages, opt_state)


def make_train_step(
    layout, mesh: Mesh, *, model: dit.DiTConfig, process: ProcessConfig, loss: LossConfig,
    optimizer: OptimizerConfig, transformation: optax.GradientTransformation, ema: EmaConfig,
    total_steps: int, seed: int,
):
    """The jitted, sharded train step for states of `layout` on `mesh`; it donates the state it is given.

    Raises: UserError when the loss or the process does not fit the model.
    """
    process.check_model(model)
    loss.check_model(model)
    step = functools.partial(
        train_step, model=model, process=process, loss=loss, optimizer=transformation,
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
