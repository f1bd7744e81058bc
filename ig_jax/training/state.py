"""What a run is at one moment: plain pytrees of arrays by parameter name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models import dit
from ig_jax.parallel.sharding import with_shardings
from ig_jax.training.optimizer import OptimizerConfig

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; keys of `ema` are the decays as written in the config."""

    step: jax.Array  # int32 scalar, updates done
    params: Params
    ema: dict[str, Params]
    opt_state: optax.OptState


def partition(params: Params, trains: Callable[[str], bool]) -> tuple[Params, Params]:
    """(trained, fixed) parameters by name; their union is `params`."""
    fixed = {name: value for name, value in params.items() if not trains(name)}
    return {name: value for name, value in params.items() if name not in fixed}, fixed


def new_state(
    model: dit.DiTConfig, config: OptimizerConfig, optimizer: optax.GradientTransformation,
    ema_names: tuple[str, ...], seed: int, given: Params,
) -> TrainState:
    """Step 0: the given parameters, fresh ones for the rest, and every EMA a copy of them."""
    params = dit.init(model, address(seed, Purpose.INIT)) | given
    # Copies, because the state is donated and a buffer can be donated only once.
    params, *averages = (jax.tree.map(jnp.copy, params) for _ in ("params", *ema_names))
    ema = dict(zip(ema_names, averages))
    return TrainState(jnp.int32(0), params, ema, optimizer.init(partition(params, config.trains)[0]))


def state_layout(make_state, mesh: Mesh):
    """`make_state()`'s shapes and dtypes with a sharding on each leaf, nothing allocated."""
    return with_shardings(jax.eval_shape(make_state), mesh)


def born_sharded(make_state, layout, *arguments) -> TrainState:
    """`make_state(*arguments)`, each array created on the devices that keep it."""
    return jax.jit(make_state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, layout))(*arguments)
