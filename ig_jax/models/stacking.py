"""Equal trees as one tree of stacked arrays, and back, in a form that compiles quickly."""

import functools

import jax
import jax.numpy as jnp

from ig_jax.parallel.sharding import platform


@jax.custom_vjp
def stacked(trees: list):
    """L trees of arrays [...] -> one tree of arrays [L, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree) -> list:
    """One tree of arrays [L, ...] -> L trees of arrays [...]."""
    some = jax.tree.leaves(tree)[0]
    known = lambda: tuple(jnp.int32(i) for i in range(len(some)))  # noqa: E731
    # XLA's CPU compiler builds equal kernels once, but a constant position makes each of these copies (and
    # whatever it is fused with) a kernel of its own: a scan over 28 blocks took three times as long to
    # compile. So there the positions come out of a conditional, which nothing is fused with.
    positions = jax.lax.cond(some.ravel()[0] > 0, known, known) if platform() == "cpu" else known()
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return [jax.tree.map(lambda leaf, i=i: take(leaf, i), tree) for i in positions]


def _stacked_forward(trees):
    return stacked(trees), None


def _stacked_backward(_, gradient):
    return (unstacked(gradient),)


stacked.defvjp(_stacked_forward, _stacked_backward)
