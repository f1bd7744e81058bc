"""Internal guidance fused with classifier-free guidance: one velocity from one network pass.

IG:  v_w = v_i + w (v_f - v_i)      on each branch, free: the pass returns both outputs
CFG: u + s (c - u)                  on all channels, doubles the batch where it is on

Both are linear, so their order does not matter. They are computed as v_f + (w - 1)(v_f - v_i) and
c + (s - 1)(c - u), the same thing, so that w = 1 and s = 1 give the plain model to the bit.
Source: arXiv 2512.24176; CVL-UESTC/Internal-Guidance SiT/samplers.py.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.errors import check
from ig_jax.models.dit import DiTOutput

# Grid points are compared with interval ends as the decimal numbers people write, not as their roundings.
TIME_TOLERANCE = 1e-9


def inside(t: float, interval: tuple[float, float]) -> bool:
    """Whether sigma-time t lies in (lo, hi]; an interval that begins at 0 contains t = 0 too."""
    low, high = interval
    return bool((low == 0 or t > low + TIME_TOLERANCE) and t <= high + TIME_TOLERANCE)


class Region(NamedTuple):
    """Which guidance is on: static, a program has one piece for each region its grid passes through."""

    ig: bool
    cfg: bool


class Scales(NamedTuple):
    """The traced part, two float32 scalars: a sweep over them never recompiles."""

    ig: jax.Array | float = 1.0
    cfg: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The static part: where in sigma-time each guidance acts, and whether the batch is doubled at all."""

    ig_interval: tuple[float, float] = (0.0, 1.0)
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    use_cfg: bool = False
    head: int = 0  # which intermediate output is the weak one

    def __post_init__(self):
        for name in ("ig_interval", "cfg_interval"):
            low, high = getattr(self, name)
            check(0 <= low < high <= 1, name, (low, high), "lo,hi with 0 <= lo < hi <= 1 in sigma-time",
                  "t = 0 is data and t = 1 is noise")

    def region(self, t: float) -> Region:
        """What is on at sigma-time t."""
        return Region(inside(t, self.ig_interval), self.use_cfg and inside(t, self.cfg_interval))


def internal(out: DiTOutput, scale: jax.Array | float, head: int = 0) -> jax.Array:
    """v_i + w (v_f - v_i) [B, H, W, C] float32 for one network output and w = scale."""
    return out.final + (scale - 1) * (out.final - out.intermediate[head])


def classifier_free(conditional: jax.Array, null: jax.Array, scale: jax.Array | float) -> jax.Array:
    """u + s (c - u) on all channels, for s = scale."""
    return conditional + (scale - 1) * (conditional - null)


def guided_velocity(
    model: Callable[[jax.Array, jax.Array, jax.Array], DiTOutput],
    labels: jax.Array,
    null_label: int,
    guidance: Guidance,
    scales: Scales,
) -> Callable[[jax.Array, jax.Array, Region], jax.Array]:
    """velocity(x [B, H, W, C], t scalar, region) -> [B, H, W, C] float32 of the guided model.

    `model(x, t [B], y [B])` is the network with its weights; `labels` [B] int32 condition the sample.
    """

    def velocity(x: jax.Array, t: jax.Array, region: Region) -> jax.Array:
        y = labels
        if region.cfg:
            # Each image beside its null twin, not all twins behind: a sharded batch stays where it is.
            x = jnp.repeat(x, 2, axis=0)
            y = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).reshape(-1)
        out = model(x, jnp.full(y.shape, t, jnp.float32), y)
        v = internal(out, scales.ig, guidance.head) if region.ig and out.intermediate else out.final
        if region.cfg:
            v = v.reshape(-1, 2, *v.shape[1:])
            v = classifier_free(v[:, 0], v[:, 1], scales.cfg)
        return v

    return velocity
