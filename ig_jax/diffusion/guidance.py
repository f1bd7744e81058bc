"""Guidance: one velocity from what a network, its heads and perhaps a second network say.

IG      v_w = v_i + w (v_f - v_i)   on each branch, free: one pass of the network returns both outputs
CFG     u + s (c - u)               u: the null label; doubles the batch where it is on
prefix  u_i + p (c - u_i)           u_i: the null label run only up to the intermediate head
auto    g + a (c - g)               g: a second, weaker checkpoint on the same label

Each adds (scale - 1) (strong - weak) to the conditional velocity: all are linear, so their order does not
matter, and a scale of 1 gives the plain model to the bit. Source: arXiv 2512.24176;
CVL-UESTC/Internal-Guidance SiT/samplers.py; autoguidance arXiv 2406.02507.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.errors import UserError, check
from ig_jax.models.dit import DiTOutput

# Grid points are compared with interval ends as the decimal numbers people write, not as their roundings.
TIME_TOLERANCE = 1e-9

# "first_three" is the habit of the original DiT and SiT on their 4-channel latents.
CFG_CHANNELS = ("all", "first_three")
SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
}
SCHEDULE_KNOTS = 129

Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1.0)


def inside(t: float, interval: Interval) -> bool:
    """Whether sigma-time t lies in (lo, hi]; an interval that begins at 0 contains t = 0 too."""
    low, high = interval
    return bool((low == 0 or t > low + TIME_TOLERANCE) and t <= high + TIME_TOLERANCE)


def scale_array(scale: float | str, name: str = "scale") -> np.ndarray:
    """A scale as people write it -> float32, () for a number or [2, K] knots: sigma-times and values.

    A number; a table "0:1,0.3:2,1:1.5" of sigma:scale, straight in between and constant beyond; or a schedule
    "cosine:1,2" or "linear:1,2", from the first value at t = 0 to the second at t = 1.
    Raises: UserError for anything else.
    """
    try:
        array = _parse_scale(scale)
    except ValueError:
        raise UserError(f"{name}={scale!r} must be a number, a table such as 0:1,0.3:2,1:1.5 or a schedule "
                        f"such as cosine:1,2 (known: {', '.join(SCHEDULES)})") from None
    values = array if array.ndim == 0 else array[1]
    check(bool(np.isfinite(array).all() and (values >= 0).all()), name, scale,
          "finite and at least 0 (1 is off)")
    if array.ndim == 2:
        knots = array[0]
        check(bool((np.diff(knots) > 0).all() and knots[0] >= 0 and knots[-1] <= 1), name, scale,
              "a table over increasing sigma in [0, 1]")
    return array


def _parse_scale(scale: float | str) -> np.ndarray:
    if not isinstance(scale, str):
        return np.asarray(scale, np.float32)
    kind, _, rest = scale.partition(":")
    if kind in SCHEDULES:
        at_data, at_noise = (float(part) for part in rest.split(","))
        knots = np.linspace(0, 1, SCHEDULE_KNOTS)
        return np.stack([knots, at_data + (at_noise - at_data) * SCHEDULES[kind](knots)]).astype(np.float32)
    if ":" not in scale:
        return np.asarray(float(scale), np.float32)
    pairs = [[float(part) for part in entry.split(":")] for entry in scale.split(",")]
    return np.asarray(pairs, np.float32).reshape(len(pairs), 2).T


def is_off(scale: float | str) -> bool:
    """Whether a scale is 1 everywhere."""
    array = scale_array(scale)
    return bool((array == 1).all() if array.ndim == 0 else (array[1] == 1).all())


def scale_at(scale: jax.Array | float, t: jax.Array) -> jax.Array | float:
    """The scale at sigma-time t of what scale_array returned."""
    if jnp.ndim(scale) == 0:
        return scale
    return jnp.interp(t, scale[0], scale[1])


class Region(NamedTuple):
    """Which guidance is on: static, a program has one piece for each region its grid passes through."""

    ig: bool
    cfg: bool
    prefix: bool = False
    auto: bool = False


class Scales(NamedTuple):
    """The traced part, each as scale_array returns it: a sweep over them never recompiles."""

    ig: jax.Array | float = 1.0
    cfg: jax.Array | float = 1.0
    prefix: jax.Array | float = 1.0
    auto: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The static part: where in sigma-time each guidance acts, and which of those that cost something is
    used.
    """

    ig_interval: Interval = WHOLE
    cfg_interval: Interval = WHOLE
    prefix_interval: Interval = WHOLE
    auto_interval: Interval = WHOLE
    use_cfg: bool = False
    use_prefix: bool = False
    use_auto: bool = False
    head: int | tuple[float, ...] = 0  # the weak output: index of a head, or weights that blend them
    cfg_channels: str = "all"

    def __post_init__(self):
        for name in ("ig_interval", "cfg_interval", "prefix_interval", "auto_interval"):
            low, high = getattr(self, name)
            check(0 <= low < high <= 1, name, (low, high), "lo,hi with 0 <= lo < hi <= 1 in sigma-time",
                  "t = 0 is data and t = 1 is noise")
        check(self.cfg_channels in CFG_CHANNELS, "cfg_channels", self.cfg_channels,
              f"one of {', '.join(CFG_CHANNELS)}")
        if not isinstance(self.head, int):
            check(math.isclose(sum(self.head), 1, rel_tol=1e-6), "ig_head", self.head,
                  "weights that sum to 1")

    def region(self, t: float) -> Region:
        """What is on at sigma-time t."""
        return Region(
            ig=inside(t, self.ig_interval),
            cfg=self.use_cfg and inside(t, self.cfg_interval),
            prefix=self.use_prefix and inside(t, self.prefix_interval),
            auto=self.use_auto and inside(t, self.auto_interval),
        )

    def edges(self) -> tuple[float, ...]:
        """Sigma-times at which something goes on or off."""
        used = {"ig": True, "cfg": self.use_cfg, "prefix": self.use_prefix, "auto": self.use_auto}
        ends = [getattr(self, f"{name}_interval") for name, on in used.items() if on]
        return tuple(sorted({end for interval in ends for end in interval}))

    @property
    def deepest_head(self) -> int:
        """Index of the last intermediate head that is read."""
        if isinstance(self.head, int):
            return self.head
        return max(i for i, weight in enumerate(self.head) if weight)


def blend(intermediate: tuple[jax.Array, ...], head: int | tuple[float, ...]) -> jax.Array:
    """The weak output [B, H, W, C]: one intermediate head, or a weighted sum of several."""
    if isinstance(head, int):
        return intermediate[head]
    return sum(weight * output for weight, output in zip(head, intermediate) if weight)


def gap(strong: jax.Array, weak: jax.Array, channels: int) -> jax.Array:
    """strong - weak [B, H, W, C'], zero from channel `channels` on: what lies beyond is never guided."""
    difference = strong - weak
    if difference.shape[-1] <= channels:
        return difference
    return jnp.where(jnp.arange(difference.shape[-1]) < channels, difference, 0)


Network = Callable[[jax.Array, jax.Array, jax.Array], DiTOutput]  # (x [B, H, W, C], t [B], y [B])


def guided_velocity(
    model: Network,
    labels: jax.Array,
    null_label: int,
    guidance: Guidance,
    scales: Scales,
    *,
    prefix: Network | None = None,
    weak: Network | None = None,
) -> Callable[[jax.Array, jax.Array, Region], jax.Array]:
    """velocity(x [B, H, W, C], t scalar, region) -> [B, H, W, C'] float32 of the guided model.

    `labels` [B] int32 condition the sample; `prefix` is the network up to guidance.deepest_head and `weak`
    the second network, needed where prefix guidance and autoguidance are used. C' > C for a model that also
    says its variance, which is not guided.
    """

    def velocity(x: jax.Array, t: jax.Array, region: Region) -> jax.Array:
        channels, at = x.shape[-1], lambda scale: scale_at(scale, t)
        times, null = jnp.full(labels.shape, t, jnp.float32), jnp.full_like(labels, null_label)
        if region.cfg:
            # Each image beside its null twin, not all twins behind: a sharded batch stays where it is.
            twins = jnp.stack([labels, null], axis=1).reshape(-1)
            out = model(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), twins)
        else:
            out = model(x, times, labels)
        v = out.final
        if region.ig and out.intermediate:
            v = v + (at(scales.ig) - 1) * gap(v, blend(out.intermediate, guidance.head), channels)
        if not region.cfg:
            strong = total = v
        else:
            v = v.reshape(-1, 2, *v.shape[1:])
            strong, unconditional = v[:, 0], v[:, 1]
            guided = channels if guidance.cfg_channels == "all" else 3
            total = strong + (at(scales.cfg) - 1) * gap(strong, unconditional, guided)
        if region.prefix:
            shallow = blend(prefix(x, times, null).intermediate, guidance.head)
            total = total + (at(scales.prefix) - 1) * gap(strong, shallow, channels)
        if region.auto:
            total = total + (at(scales.auto) - 1) * gap(strong, weak(x, times, labels).final, channels)
        return total

    return velocity
