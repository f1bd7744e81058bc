"""Muon as the release of internal guidance computes it, as one optax transformation.

    m <- b m + (1 - b) g;   u = b m + (1 - b) g;   update = scale(shape) * orthogonal part of u

optax.contrib.muon is another rule: it corrects the bias of m before looking ahead, and scales by one of two
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
QUINTIC = (3.4445, -4.7750, 2.0315)  # lifts small singular values as fast as a quintic can
RMS_OF_ADAM = 0.2  # an orthogonal update times 0.2 sqrt(its longer side) is about as long as Adam's


class PublishedShape(NamedTuple):
    """How PyTorch stores a parameter: [rows, columns] is (out, everything else) for a layer."""

    rows: int
    columns: int
    longest: int  # of its first two dimensions, before a convolution is flattened
    transposed: bool  # ours is [columns, rows]

    @property
    def scale(self) -> float:
        """Both shape rules of the release, multiplied."""
        return math.sqrt(max(1, self.rows / self.columns)) * RMS_OF_ADAM * math.sqrt(self.longest)

    @property
    def turned(self) -> bool:
        """Whether ours must be transposed to be the wide matrix that the iteration runs on."""
        return (self.rows > self.columns) != self.transposed


def published_shape(name: str, shape: tuple[int, int], channels: int) -> PublishedShape:
    """The published shape of our matrix `name`; `channels` are those of the patch embedding's convolution."""
    inputs, outputs = shape
    if not name.endswith(".kernel"):  # the label table
        return PublishedShape(inputs, outputs, max(shape), transposed=False)
    longest = max(outputs, channels if name.startswith("patch_embed.") else inputs)
    return PublishedShape(outputs, inputs, longest, transposed=True)


class MuonState(NamedTuple):
    """The average gradient, float32 under the parameters' names."""

    momentum: optax.Updates


def scale_by_muon(momentum: float, channels: int) -> optax.GradientTransformation:
    """Gradients [I, O] float32 by parameter name -> the updates above, to be scaled by the learning rate."""

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params
        blend = lambda average, g: momentum * average + (1 - momentum) * g  # noqa: E731
        averages = jax.tree.map(blend, state.momentum, gradients)
        ahead = jax.tree.map(blend, averages, gradients)
        matrices = {name: u for name, u in ahead.items() if not isinstance(u, optax.MaskedNode)}
        return ahead | _orthogonal_updates(matrices, channels), MuonState(averages)

    return optax.GradientTransformation(init, update)


def _orthogonal_updates(matrices: dict[str, jax.Array], channels: int) -> dict[str, jax.Array]:
    """Matrices of one shape go through one loop, so that 28 blocks compile as quickly as one."""
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
    """About the orthogonal part of a wide matrix [R, C] bfloat16: its singular values end in 0.7..1.2."""
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
