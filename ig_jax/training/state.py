"""What a run is at one moment: plain pytrees of arrays by parameter name."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models import dit
from ig_jax.parallel.sharding import tree_shardings

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; keys of `ema` are the decays as written in the config."""

    step: jax.Array  # int32 scalar, updates done
    params: Params
    ema: dict[str, Params]
    opt_state: optax.OptState


def partition(params: Params) -> tuple[Params, Params]:
    """(trainable, frozen) parameters; their union is `params`."""
    frozen = {name: value for name, value in params.items() if name in dit.FROZEN}
    return {name: value for name, value in params.items() if name not in frozen}, frozen


def new_state(
    model: dit.DiTConfig, optimizer: optax.GradientTransformation, ema_names: tuple[str, ...], seed: int
) -> TrainState:
    """Step 0: fresh parameters, every EMA a copy of them."""
    params = dit.init(model, address(seed, Purpose.INIT))
    # Copies, because the state is donated and a buffer can be donated only once.
    ema = {name: jax.tree.map(jnp.copy, params) for name in ema_names}
    return TrainState(jnp.int32(0), params, ema, optimizer.init(partition(params)[0]))


def state_layout(make_state, mesh: Mesh):
    """`make_state()`'s shapes and dtypes with a sharding on each leaf, nothing allocated."""
    shapes = jax.eval_shape(make_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def born_sharded(make_state, layout) -> TrainState:
    """The state, each array created on the devices that keep it."""
    return jax.jit(make_state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, layout))()
