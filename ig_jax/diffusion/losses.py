"""The internal-guidance loss: L = L_final + sum over heads of lambda * L_inter.

Both heads predict the same velocity. The accelerated target moves the final head's target away from the
intermediate prediction: x0 + omega * sg(D_f - D_i), which on any fixed path is v + omega * sg(v_f - v_i),
since the map from data to velocity at x_t is affine with one common factor.
Source: arXiv 2512.24176 (dual loss; training acceleration).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.models.dit import DiTOutput


class DualLoss(NamedTuple):
    """Per-example terms, each [B] float32; `total` is exactly what is optimised."""

    total: jax.Array
    final: jax.Array
    intermediate: tuple[jax.Array, ...]


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all but the first axis of the squared difference: [B, H, W, C] -> [B] float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference * difference, axis=tuple(range(1, difference.ndim)))


def accelerated_target(target: jax.Array, gap: jax.Array, omega: jax.Array | float) -> jax.Array:
    """target + omega * sg(gap), for velocities with gap = v_f - v_i or for data with gap = D_f - D_i.

    Its fixed point has w = 1 / (1 - omega) built in; omega >= 1 diverges.
    """
    return target + omega * jax.lax.stop_gradient(gap)


def guidance_gap(out: DiTOutput) -> jax.Array:
    """v_f - v_i [B, H, W, C] float32, against the first intermediate head."""
    return out.final.astype(jnp.float32) - out.intermediate[0].astype(jnp.float32)


def dual_loss(
    out: DiTOutput, v_target: jax.Array, final_target: jax.Array, inter_weight: Sequence[float]
) -> DualLoss:
    """The final head against `final_target` (v_target or its accelerated form), the others against v_target.

    All arrays [B, H, W, C]; `inter_weight` holds one lambda for each intermediate head.
    """
    final = squared_error(out.final, final_target)
    intermediate = tuple(squared_error(head, v_target) for head in out.intermediate)
    total = final
    for weight, term in zip(inter_weight, intermediate, strict=True):
        total = total + weight * term
    return DualLoss(total, final, intermediate)
