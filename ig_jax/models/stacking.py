"""Stacking of equal trees into one tree of arrays with a leading axis, and back."""

import functools

import jax
import jax.numpy as jnp

from ig_jax.models import cpu
from ig_jax.models.derivatives import linear


def stacked(trees: list):
    """L trees of arrays (...) -> one tree of arrays (L, ...)."""
    leaves, structure = jax.tree.flatten(trees)
    one = jax.tree.structure(trees[0])

    def stack(*leaves):
        return tuple(
            jax.tree.leaves(jax.tree.map(lambda *each: jnp.stack(each), *jax.tree.unflatten(structure, leaves)))
        )

    unstack = lambda *gradients: tuple(jax.tree.leaves(unstacked(jax.tree.unflatten(one, gradients))))
    return jax.tree.unflatten(one, linear(stack, unstack, (), tuple(leaves)))


def unstacked(tree) -> list:
    """One tree of arrays (L, ...) -> L trees of arrays (...)."""
    positions = cpu.unfused_positions(jax.tree.leaves(tree)[0])
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return [jax.tree.map(lambda leaf, i=i: take(leaf, i), tree) for i in positions]
