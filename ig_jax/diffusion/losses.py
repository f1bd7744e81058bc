"""The internal-guidance loss: L = L_final + sum over heads of lambda * L_inter, as named, weighted terms.

Every head predicts the same target. The accelerated target moves the final head's away from the intermediate
prediction: x0 + omega * sg(D_f - D_i). Velocity, noise and data are affine in each other at a given x_t with
one common factor, so it is target + omega * sg(gap) in whatever the network predicts.
Source: arXiv 2512.24176 (dual loss; training acceleration); hustvl/LightningDiT transport (direction).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.models.dit import DiTOutput

SMALLEST_NORM = 1e-8  # below it a vector has no direction; torch's cosine_similarity


class Term(NamedTuple):
    """One summand of the loss: `weight` (a number) times `value` [B] float32."""

    weight: float
    value: jax.Array


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all but the first axis of the squared difference: [B, H, W, C] -> [B] float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference * difference, axis=tuple(range(1, difference.ndim)))


def direction_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over pixels of 1 - cos of the angle between the channels: [B, H, W, C] -> [B] float32."""
    cosine = jnp.sum(_direction(prediction) * _direction(target), axis=-1)
    return jnp.mean(1 - cosine, axis=tuple(range(1, cosine.ndim)))


def _direction(x: jax.Array) -> jax.Array:
    """x over its norm along the channels, or 0 with no gradient: a head that begins at zero would get 1e8."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    defined = square > SMALLEST_NORM**2
    return jnp.where(defined, x * jax.lax.rsqrt(jnp.where(defined, square, 1.0)), 0.0)


def accelerated_target(target: jax.Array, gap: jax.Array, omega: jax.Array | float) -> jax.Array:
    """target + omega * sg(gap), for target and gap = final - intermediate in the same prediction.

    Its fixed point has w = 1 / (1 - omega) built in; omega >= 1 diverges.
    """
    return target + omega * jax.lax.stop_gradient(gap)


def guidance_gap(out: DiTOutput) -> jax.Array:
    """final - intermediate [B, H, W, C] float32 of two predictions, against the first intermediate head."""
    return out.final.astype(jnp.float32) - out.intermediate[0].astype(jnp.float32)


def dual_terms(
    out: DiTOutput, target: jax.Array, final_target: jax.Array, *, names: Sequence[str],
    inter_weight: Sequence[float], direction_weight: float, direction_intermediate: bool,
) -> dict[str, Term]:
    """The final prediction against `final_target` (target, or accelerated), the others against `target`.

    All arrays [B, H, W, C]; `names` and `inter_weight` (lambda) hold one entry for each intermediate head.
    """
    terms = _head_terms("loss/final", out.final, final_target, 1.0, direction_weight)
    direction_weight = direction_weight if direction_intermediate else 0.0
    for name, head, weight in zip(names, out.intermediate, inter_weight, strict=True):
        terms |= _head_terms(name, head, target, weight, direction_weight)
    return terms


def _head_terms(name: str, prediction, target, weight: float, direction_weight: float) -> dict[str, Term]:
    terms = {name: Term(weight, squared_error(prediction, target))}
    if direction_weight:
        terms[f"{name}_direction"] = Term(weight * direction_weight, direction_error(prediction, target))
    return terms


def total(terms: dict[str, Term]) -> jax.Array:
    """What is optimised, [B] float32: the weighted sum of the terms and nothing else."""
    # A term of weight 0 is left out, not multiplied by 0: then the compiled gradient of the others is what it
    # is without the term, to the bit.
    return sum(term.weight * term.value for term in terms.values() if term.weight)
