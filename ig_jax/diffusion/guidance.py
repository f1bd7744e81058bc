"""Guidance: one velocity from the outputs of a network, of its heads and perhaps of a second network.

ig      v_w = v_i + w (v_f - v_i)   on each branch, free: one pass of the network returns both outputs
cfg     u + s (c - u)               u: the null label; doubles the batch where it is on
prefix  u_i + p (c - u_i)           u_i: the null label run only up to the intermediate head
auto    g + a (c - g)               g: a second, weaker checkpoint on the same label

Each adds (scale - 1) (strong - weak) to the conditional velocity: all are linear, so their order does not matter, and
a scale of 1 gives the plain model, bitwise. A new rule is an entry of RULES.
Source: arXiv 2512.24176; CVL-UESTC/Internal-Guidance SiT/samplers.py; autoguidance arXiv 2406.02507.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.models import cost
from ig_jax.models.dit import DiTConfig, DiTOutput

# Grid points are compared with interval ends as the decimal numbers people write, not as their roundings.
TIME_TOLERANCE = 1e-9

# "first_three" is the habit of the original DiT and SiT on their 4-channel latents.
CFG_CHANNELS = ("all", "first_three")
SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
}
SCHEDULE_KNOTS = 129

Scale = float | str  # a number, a table "0:1,0.3:2,1:1.5" or a schedule "cosine:1,2": see scale_array
Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1.0)


def inside(t: float, interval: Interval) -> bool:
    """Whether sigma-time t lies in (lo, hi]; an interval that begins at 0 contains t = 0 too."""
    low, high = interval
    return bool((low == 0 or t > low + TIME_TOLERANCE) and t <= high + TIME_TOLERANCE)


def scale_array(scale: Scale, name: str = "scale") -> np.ndarray:
    """A scale as written in a recipe -> float32, () for a number or (2, K) knots: sigma-times and values.

    A number; a table "0:1,0.3:2,1:1.5" of sigma:scale, linear in between and constant beyond; or a schedule
    "cosine:1,2" or "linear:1,2", from the first value at t = 0 to the second at t = 1.
    Raises: UserError for anything else.
    """
    try:
        array = _parse_scale(scale)
    except (TypeError, ValueError):
        expected = (
            f"a number, a table such as 0:1,0.3:2,1:1.5 or a schedule such as cosine:1,2 ({', '.join(SCHEDULES)})"
        )
        raise UserError(name=name, value=scale, expected=expected) from None
    values, largest = array if array.ndim == 0 else array[1], np.finfo(np.float32).max
    fits = (np.abs(array) <= largest).all() and (values >= 0).all()  # no NaN does
    check(bool(fits), name, scale, "finite and at least 0 (1 is off)")
    array = array.astype(np.float32)
    if array.ndim == 2:
        increasing = (np.diff(array[0]) > 0).all() and array[0, 0] >= 0 and array[0, -1] <= 1
        check(bool(increasing), name, scale, "a table over increasing sigma in [0, 1]")
    return array


def _parse_scale(scale: Scale) -> np.ndarray:
    if not isinstance(scale, str):
        return np.asarray(scale, np.float64)
    kind, _, rest = scale.partition(":")
    if kind in SCHEDULES:
        at_data, at_noise = (float(part) for part in rest.split(","))
        knots = np.linspace(0, 1, SCHEDULE_KNOTS)
        return np.stack([knots, at_data + (at_noise - at_data) * SCHEDULES[kind](knots)])
    if ":" not in scale:
        return np.asarray(float(scale))
    pairs = [[float(part) for part in entry.split(":")] for entry in scale.split(",")]
    return np.asarray(pairs).reshape(len(pairs), 2).T


def scale_at(scale: Any, t: jax.Array) -> Any:
    """The value at sigma-time t of a scale that scale_array returned."""
    return jnp.interp(t, scale[0], scale[1]) if jnp.ndim(scale) else scale


@dataclasses.dataclass(frozen=True)
class Rule:
    """How strong one guidance is and where in sigma-time it is on; scale 1 is off.

    Attributes:
        scale: a number, or a table of it over sigma-time; 1 is off.
        interval: (low, high] of sigma-time where the rule is on; from 0 on it contains 0.
    """

    scale: Scale = 1.0
    interval: Interval = WHOLE

    def __post_init__(self):
        scale_array(self.scale)
        low, high = self.interval
        expected = "lo,hi with 0 <= lo < hi <= 1 in sigma-time"
        check(0 <= low < high <= 1, "interval", self.interval, expected, "t = 0 is data and t = 1 is noise")

    @property
    def off(self) -> bool:
        """Whether the scale is 1 everywhere."""
        array = scale_array(self.scale)
        return bool((array == 1).all() if array.ndim == 0 else (array[1] == 1).all())


Network = Callable[[jax.Array, jax.Array, jax.Array], DiTOutput]  # (x (B, H, W, C), t (B,), y (B,))


class Call(NamedTuple):
    """One evaluation of the guided model, as the weaker prediction of a rule sees it."""

    x: jax.Array  # (B, H, W, C)
    times: jax.Array  # (B,) sigma-times, all the same
    labels: jax.Array  # (B,) int32
    null: jax.Array  # (B,) int32, the null label
    model: Network
    prefix: Any  # Network: the model up to the deepest head that is read
    second: Any  # Network: the weaker checkpoint
    weak_head: Callable[[DiTOutput], jax.Array]  # the intermediate output that a recipe's ig_head selects


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a guidance rule is, whatever its scale and interval."""

    doc: str  # the help of its flag
    weaker: Callable[[Call], jax.Array] | None = None  # (B, H, W, C'); None where guided_velocity writes it out
    needs_head: bool = False  # refused for a model without an intermediate head
    needs_second: bool = False  # refused without a second checkpoint
    # (model, second model, deepest head) -> cost of an evaluation in addition to the conditional one, in forward passes
    passes: Callable[[DiTConfig, Any, int], float] = lambda model, second, head: 1.0


RULES = {
    "ig": Definition("w of internal guidance", needs_head=True, passes=lambda model, second, head: 0.0),
    "cfg": Definition("s of classifier-free guidance"),
    "prefix": Definition(
        "Scale of guidance against the null label run up to the intermediate head",
        lambda call: call.weak_head(call.prefix(call.x, call.times, call.null)),
        needs_head=True,
        passes=lambda model, second, head: cost.prefix_macs(model, head) / cost.forward_macs(model),
    ),
    "auto": Definition(
        "Scale of guidance against a second, weaker checkpoint (--auto_checkpoint)",
        lambda call: call.second(call.x, call.times, call.labels).heads[0],
        needs_second=True,
        passes=lambda model, second, head: cost.forward_macs(second) / cost.forward_macs(model),
    ),
}

Region = frozenset[str]  # names of the rules that are on: static, so a program has one scan for each region of its grid
Scales = dict[str, Any]  # name -> array of scale_array: traced, a sweep over scales never recompiles


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The static part of guidance: which rules are in the program, and where in sigma-time each is on.

    Attributes:
        intervals: (name of the rule, where it is on).
        head: the weak output: index of a head, or weights that blend them.
        cfg_channels: as in a recipe.
    """

    intervals: tuple[tuple[str, Interval], ...] = ()
    head: int | tuple[float, ...] = 0
    cfg_channels: str = "all"

    def __post_init__(self):
        check(self.cfg_channels in CFG_CHANNELS, "cfg_channels", self.cfg_channels, f"one of {', '.join(CFG_CHANNELS)}")
        if not isinstance(self.head, int):
            check(math.isclose(sum(self.head), 1, rel_tol=1e-6), "ig_head", self.head, "weights that sum to 1")

    def region(self, t: float) -> Region:
        """The rules that are on at sigma-time t."""
        return frozenset(name for name, interval in self.intervals if inside(t, interval))

    def edges(self) -> tuple[float, ...]:
        """Sigma-times at which a rule goes on or off."""
        return tuple(sorted({end for _, interval in self.intervals for end in interval}))

    @property
    def deepest_head(self) -> int:
        """Index of the last intermediate head that is read."""
        return self.head if isinstance(self.head, int) else max(i for i, weight in enumerate(self.head) if weight)

    @property
    def needs_second(self) -> bool:
        """Whether a rule runs the second network."""
        return any(RULES[name].needs_second for name, _ in self.intervals)

    def passes(self, region: Region, model: DiTConfig, second: DiTConfig | None = None) -> float:
        """The cost of one guided evaluation, in forward passes of the model."""
        return 1.0 + sum(RULES[name].passes(model, second, self.deepest_head) for name in RULES if name in region)


def blend(intermediate: tuple[jax.Array, ...], head: int | tuple[float, ...]) -> jax.Array:
    """The weak output (B, H, W, C): one intermediate head, or a weighted sum of several."""
    if isinstance(head, int):
        return intermediate[head]
    return functools.reduce(operator.add, (weight * out for weight, out in zip(head, intermediate) if weight))


def gap(strong: jax.Array, weak: jax.Array, channels: int) -> jax.Array:
    """strong - weak (B, H, W, C'), zero from channel `channels` on: those are never guided."""
    difference = strong - weak
    if difference.shape[-1] <= channels:
        return difference
    return jnp.where(jnp.arange(difference.shape[-1]) < channels, difference, 0)


def guided_velocity(
    model: Network,
    null_label: int,
    guidance: Guidance,
    scales: Scales,
    *,
    prefix: Network | None = None,  # the model up to guidance.deepest_head
    second: Network | None = None,  # the weaker checkpoint
) -> Callable[[jax.Array, jax.Array, jax.Array, Region], jax.Array]:
    """velocity(x (B, H, W, C), t scalar, labels (B,) int32, region) -> (B, H, W, C') float32 of the guided model.

    C' > C for a model with variance outputs, which are not guided.
    """
    weak_head = lambda out: blend(out.intermediate, guidance.head)

    def velocity(x: jax.Array, t: jax.Array, labels: jax.Array, region: Region) -> jax.Array:
        channels, at = x.shape[-1], lambda name: scale_at(scales[name], t)
        times, null = jnp.full(labels.shape, t, jnp.float32), jnp.full_like(labels, null_label)
        if "cfg" in region:
            # Each image next to its null twin, not all twins behind: a sharded batch stays where it is.
            twins = jnp.stack([labels, null], axis=1).reshape(-1)
            out = model(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), twins)
        else:
            out = model(x, times, labels)
        v = out.heads[0]
        if "ig" in region and out.intermediate:
            v = v + (at("ig") - 1) * gap(v, weak_head(out), channels)
        strong = total = v
        if "cfg" in region:
            v = v.reshape(-1, 2, *v.shape[1:])
            strong, unconditional = v[:, 0], v[:, 1]
            guided = channels if guidance.cfg_channels == "all" else 3
            total = strong + (at("cfg") - 1) * gap(strong, unconditional, guided)
        call = Call(x, times, labels, null, model, prefix, second, weak_head)
        for name, definition in RULES.items():
            if name in region and definition.weaker:
                total = total + (at(name) - 1) * gap(strong, definition.weaker(call), channels)
        return total

    return velocity
