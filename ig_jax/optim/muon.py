"""Muon as the release of internal guidance computes it, as one optax transformation.

    m <- b m + (1 - b) g;   u = b m + (1 - b) g;   update = scale(shape) * orthogonal factor of u

optax.contrib.muon is a different rule: it corrects the bias of m before the Nesterov step, and scales by one of two
shape rules where the release multiplies both.
Source: arXiv 2502.16982; CVL-UESTC/Internal-Guidance LightningDiT/muon_new.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ig_jax.models.stacking import stacked, unstacked

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # raises small singular values as fast as a quintic can
RMS_OF_ADAM = 0.2  # an orthogonal update times 0.2 sqrt(longer side) has about the norm of Adam's


class PublishedShape(NamedTuple):
    """A parameter as PyTorch stores it: (rows, columns) is (out, everything else) for a layer."""

    rows: int
    columns: int
    longest: int  # of its first two dimensions, before a convolution is flattened
    transposed: bool  # stored here as (columns, rows)

    @property
    def scale(self) -> float:
        """Both shape rules of the release, multiplied."""
        return math.sqrt(max(1, self.rows / self.columns)) * RMS_OF_ADAM * math.sqrt(self.longest)

    @property
    def turned(self) -> bool:
        """Whether the stored matrix must be transposed to be the wide matrix that the iteration runs on."""
        return (self.rows > self.columns) != self.transposed


def published_shape(name: str, shape: tuple[int, ...], channels: int) -> PublishedShape:
    """The published shape of our matrix `name`; `channels` of the patch embedding's convolution."""
    inputs, outputs = shape
    if not name.endswith(".kernel"):  # the label table
        return PublishedShape(inputs, outputs, max(shape), transposed=False)
    longest = max(outputs, channels if name.startswith("patch_embed.") else inputs)
    return PublishedShape(outputs, inputs, longest, transposed=True)


class MuonState(NamedTuple):
    """The averaged gradients, float32 by parameter name."""

    momentum: optax.Updates


def scale_by_muon(momentum: float, channels: int) -> optax.GradientTransformation:
    """Gradients (I, O) float32 by parameter name -> the updates above, to be scaled by the learning rate."""

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params
        blend = lambda average, g: momentum * average + (1 - momentum) * g
        averages = jax.tree.map(blend, state.momentum, gradients)
        lookahead = jax.tree.map(blend, averages, gradients)
        matrices = {name: u for name, u in lookahead.items() if not isinstance(u, optax.MaskedNode)}
        return lookahead | _orthogonal_updates(matrices, channels), MuonState(averages)

    return optax.GradientTransformation(init, update)


def _orthogonal_updates(matrices: dict[str, jax.Array], channels: int) -> dict[str, jax.Array]:
    """The updates of all matrices; those of one shape share a loop, so that 28 blocks compile as fast as one."""
    shapes = {name: published_shape(name, matrix.shape, channels) for name, matrix in matrices.items()}
    groups: dict[tuple, list[str]] = {}
    for name, matrix in matrices.items():
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(name)
    updates = {}
    for names in groups.values():
        wide = [matrices[n].T if shapes[n].turned else matrices[n] for n in names]
        orthogonal = jax.lax.map(orthogonalised, stacked([matrix.astype(jnp.bfloat16) for matrix in wide]))
        for name, matrix in zip(names, unstacked(orthogonal)):
            matrix = matrix.T if shapes[name].turned else matrix
            updates[name] = shapes[name].scale * matrix.astype(jnp.float32)
    return updates


def orthogonalised(matrix: jax.Array) -> jax.Array:
    """Approximate orthogonal factor of a wide matrix (R, C) bfloat16; its singular values end in 0.7..1.2."""
    a, b, c = QUINTIC
    x = matrix.astype(jnp.float32)
    norm = _rounded(jnp.sqrt(jnp.sum(x * x)))
    x = _rounded(x / _rounded(norm + 1e-7))
    for _ in range(ITERATIONS):
        gram = _product(x, x.T)
        polynomial = _rounded(_rounded(b * gram) + _rounded(c * _product(gram, gram)))
        x = _rounded(_rounded(a * x) + _product(polynomial, x))
    return x.astype(jnp.bfloat16)


def _rounded(x: jax.Array) -> jax.Array:
    """float32 rounded to bfloat16 where eager PyTorch rounds; a pair of casts would be optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y of bfloat16 numbers, accumulated in float32 and rounded once."""
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return _rounded(jnp.matmul(x, y, preferred_element_type=jnp.float32))
