"""Addressed randomness: every random number is a function of (seed, purpose, indices) alone.

Mirror, posterior, noise, time and label drop of a training example belong to (seed, step, position in the global
batch); noise, label and increments of a sample to (seed, sample index, step). There is no generator state to save.
"""

import enum

import jax


class Purpose(enum.IntEnum):
    """The use of a random number. The values are part of every checkpoint's meaning: append, never reorder."""

    INIT = 0
    NOISE = 1
    TIME = 2
    LABEL_DROP = 3
    SAMPLE_NOISE = 4
    SAMPLE_LABEL = 5
    SAMPLE_INCREMENT = 6
    MIRROR = 7
    POSTERIOR = 8
    PROBE = 9  # of a divergence


def address(seed: int, purpose: Purpose, *indices: jax.Array | int) -> jax.Array:
    """The key of (seed, purpose, indices); indices such as step or sample index may be traced."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
