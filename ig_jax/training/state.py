"""The train state: a pytree of parameters, EMAs and optimizer state, by parameter name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.checkpoints.steps import Checkpoints
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models import dit
from ig_jax.optim.optimizer import OptimizerConfig
from ig_jax.parallel.sharding import with_shardings
from ig_jax.training.guard import Guard

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; the keys of `ema` are the decays as written in the config."""

    step: jax.Array  # int32 scalar, number of updates
    params: Params
    ema: dict[str, Params]
    opt_state: optax.OptState
    guard: Guard = dataclasses.field(default_factory=Guard.new)  # not stored

    def items(self) -> dict[str, Any]:
        """What a checkpoint stores by name, in addition to the step."""
        averages = {f"ema_{name}": average for name, average in self.ema.items()}
        return {"params": self.params, "optimizer": self.opt_state, **averages}


def partition(params: Params, trains: Callable[[str], bool]) -> tuple[Params, Params]:
    """(trained, fixed) parameters by name; their union is `params`."""
    fixed = {name: value for name, value in params.items() if not trains(name)}
    return {name: value for name, value in params.items() if name not in fixed}, fixed


def new_state(
    model: dit.DiTConfig,
    config: OptimizerConfig,
    optimizer: optax.GradientTransformation,
    ema_names: tuple[str, ...],
    seed: int,
    given: Params,
) -> TrainState:
    """The state at step 0: the given parameters, initialised ones for the rest, and every EMA a copy of them."""
    params = dit.init(model, address(seed, Purpose.INIT)) | given
    # Copies, because the state is donated and a buffer can be donated only once.
    params, *averages = (jax.tree.map(jnp.copy, params) for _ in ("params", *ema_names))
    ema = dict(zip(ema_names, averages))
    return TrainState(jnp.int32(0), params, ema, optimizer.init(partition(params, config.trains)[0]))


def state_layout(make_state, mesh: Mesh):
    """Shapes, dtypes and shardings of `make_state()`, without allocating anything."""
    return with_shardings(jax.eval_shape(make_state), mesh)


def born_sharded(make_state, layout, *arguments) -> TrainState:
    """`make_state(*arguments)`, each array created on the devices that hold it."""
    return jax.jit(make_state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, layout))(*arguments)


def restored(
    checkpoints: Checkpoints, layout: TrainState, before_reading: Callable[[dict], None] = lambda meta: None
) -> TrainState | None:
    """The newest whole state in the given layout, or None for a fresh run; see Checkpoints.restore_newest.

    An average that the checkpoint does not hold begins with its parameters.
    """

    def stored(meta: dict) -> dict[str, Any]:
        added = [f"ema_{name}" for name in layout.ema if f"ema_{name}" not in meta["arrays"]]
        return {name: item for name, item in layout.items().items() if name not in added}

    found = checkpoints.restore_newest(stored, before_reading=before_reading)
    if found is None:
        return None
    items, meta = found
    step, guard = jax.device_put((jnp.int32(meta["step"]), Guard.new()), layout.step.sharding)
    copy = functools.partial(jax.tree.map, jnp.copy)  # a donated buffer belongs to one array
    averages = {name: items.get(f"ema_{name}") or copy(items["params"]) for name in layout.ema}
    return TrainState(step, items["params"], averages, items["optimizer"], guard)
