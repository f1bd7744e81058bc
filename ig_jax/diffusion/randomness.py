"""Randomness is addressed, not consumed: every draw is a function of (seed, purpose, indices) alone.

A training example's noise, time and label drop belong to (seed, step, position in the global batch); a
sample's noise, label and increments to (seed, sample index, step). No generator has a state to save.
"""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a draw is for. Numbers are part of every checkpoint's meaning: append, never reorder."""

    INIT = 0
    NOISE = 1
    TIME = 2
    LABEL_DROP = 3
    SAMPLE_NOISE = 4
    SAMPLE_LABEL = 5
    SAMPLE_INCREMENT = 6


def address(seed: int, purpose: Purpose, *indices: jax.Array | int) -> jax.Array:
    """The key of one draw; `indices` (step, sample index) are folded in in order and may be traced."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
