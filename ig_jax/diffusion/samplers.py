"""Solvers: each integrates a velocity over a fixed time grid, knowing nothing of guidance.

A solver turns a number of steps into rows, one for each step: a static kind, the times at which the
guidance is looked up for each evaluation, and scalars computed in float64 on the host. `integrate` cuts the
rows where kind or guidance region changes and runs each piece as one `lax.scan`, so a doubled batch runs
only inside its interval and the loop has no branch. To add a solver, write its `rows` and `advance` and
name it in SOLVERS; the fields of its class are its options, and each is a field of Recipe.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import paths
from ig_jax.diffusion.adaptive import DormandPrince
from ig_jax.errors import check

# The SBDM diffusion is infinite at t = 1 but on the VP path. Source: willisma/SiT (sample_eps).
SBDM_START = 1 - 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of a grid."""

    kind: str
    lookup: tuple[float, ...]  # sigma-time at which each evaluation of this step looks up its guidance
    scalars: dict[str, float]  # what `advance` needs, float64


class Solver(Protocol):
    """What a solver provides; `state` is whatever it carries, `start` and `finish` go from and to latents."""

    stochastic: bool

    def rows(self, path: str, steps: int) -> list[Row]: ...

    def start(self, x: jax.Array): ...

    def advance(self, kind: str, velocities, state, scalars: dict[str, jax.Array], noise): ...

    def finish(self, state) -> jax.Array: ...


class _StateIsLatents:
    """A solver that carries nothing but the latents."""

    def start(self, x):
        return x

    def finish(self, state):
        return state


@dataclasses.dataclass(frozen=True)
class Ode(_StateIsLatents):
    """What the solvers of the probability-flow ODE share: the grid.

    shift S bends it: t' -> S t' / (1 + (S - 1) t') on the clock that ends at data, so S < 1 takes smaller
    steps near the noise; reverse runs from data to noise. Source: hustvl/LightningDiT (timestep_shift).
    """

    stochastic: ClassVar[bool] = False

    shift: float = 1.0
    reverse: bool = False

    def __post_init__(self):
        check(0 < self.shift < np.inf, "shift", self.shift, "a number greater than 0 (1 is off)")

    def grid(self, path: str, steps: int) -> np.ndarray:
        """steps + 1 sigma-times, float64, in the order of integration."""
        u = np.linspace(1.0, paths.data_end(path), steps + 1)
        t = u / (self.shift + (1 - self.shift) * u)
        return t[::-1] if self.reverse else t

    def pairs(self, path: str, steps: int) -> list[tuple[float, float]]:
        """(t, t_next) of each step."""
        return list(itertools.pairwise(self.grid(path, steps)))


def _slope_step(state, velocities, scalars):
    return state + scalars["dt"] * velocities[0](state, scalars["t"])


def _trapezoid_step(state, velocities, scalars):
    slope = velocities[0](state, scalars["t"])
    slope_next = velocities[1](state + scalars["dt"] * slope, scalars["t_next"])
    return state + scalars["dt"] * (0.5 * slope + 0.5 * slope_next)


class Euler(Ode):
    """x + dt v(x, t): one evaluation a step, first order."""

    def rows(self, path, steps):
        return [Row("euler", (t,), {"t": t, "dt": end - t}) for t, end in self.pairs(path, steps)]

    def advance(self, kind, velocities, state, scalars, noise):
        return _slope_step(state, velocities, scalars)


class Heun(Ode):
    """Euler corrected by the mean of the slopes at both ends, on all but the last step: 2 steps - 1
    evaluations.

    Both evaluations of a step are guided where its beginning is, as in the release's loop; a scale that is a table
    over sigma is read at each. Second order.
    Source: CVL-UESTC/Internal-Guidance SiT/samplers.py, euler_sampler(heun=True).
    """

    def rows(self, path, steps):
        *pairs, (t_last, end_last) = self.pairs(path, steps)
        rows = [Row("heun", (t, t), {"t": t, "dt": end - t, "t_next": end}) for t, end in pairs]
        return rows + [Row("euler", (t_last,), {"t": t_last, "dt": end_last - t_last})]

    def advance(self, kind, velocities, state, scalars, noise):
        return (_slope_step if kind == "euler" else _trapezoid_step)(state, velocities, scalars)


class Trapezoid(Ode):
    """Heun on every step, guidance looked up at each evaluation's own time: 2 steps evaluations, second
    order.

    LightningDiT counts grid points: its 125 are 124 steps here.
    Source: hustvl/LightningDiT transport (heun2 of torchdiffeq is the explicit trapezoid).
    """

    def rows(self, path, steps):
        return [Row("trapezoid", (t, end), {"t": t, "dt": end - t, "t_next": end})
                for t, end in self.pairs(path, steps)]

    def advance(self, kind, velocities, state, scalars, noise):
        return _trapezoid_step(state, velocities, scalars)


class AdamsBashforth(Ode):
    """The line through this slope and the one before, on steps of any length: one evaluation a step, second
    order.

    The first step is Euler's. Where a guidance interval begins or ends the slope before belongs to another
    field, which costs one first-order step.
    """

    def rows(self, path, steps):
        pairs = self.pairs(path, steps)
        lengths = [end - t for t, end in pairs]
        ratios = [0.0] + [length / before for before, length in itertools.pairwise(lengths)]
        return [Row("ab2", (t,), {"t": t, "now": length * (1 + ratio / 2), "before": -length * ratio / 2})
                for (t, _), length, ratio in zip(pairs, lengths, ratios)]

    def start(self, x):
        return x, jnp.zeros_like(x)

    def advance(self, kind, velocities, state, scalars, noise):
        x, slope_before = state
        slope = velocities[0](x, scalars["t"])
        return x + scalars["now"] * slope + scalars["before"] * slope_before, slope

    def finish(self, state):
        return state[0]


# D(t) of the SDE dx = (v - D score) dt + sqrt(2 D) dw in our clock. Source: willisma/SiT transport/path.py.
DIFFUSION_FORMS: dict[str, Callable[[str, float, float], float]] = {
    "constant": lambda path, t, norm: norm,
    "SBDM": lambda path, t, norm: norm * _sbdm(path, t),
    "sigma": lambda path, t, norm: norm * paths.coefficients(path, np.float64(t)).sigma,
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * np.cos(np.pi * t)) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * np.sin(np.pi * t) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler", "none")


def _sbdm(path: str, t: float) -> float:
    """Half the squared diffusion of the forward SDE that has this path's marginals."""
    c = paths.coefficients(path, np.float64(t))
    return c.sigma * c.d_sigma - c.d_alpha / c.alpha * c.sigma**2


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(_StateIsLatents):
    """The reverse SDE on linspace(1, last_step_size, steps), then one noiseless step to 0: `steps`
    evaluations, one less without that step.

    diffusion_form, diffusion_norm: D(t), see DIFFUSION_FORMS; the defaults are the IG release's, g^2 = 2 D
    = 2t. last_step: "mean" (the drift), "tweedie" (the denoised data), "euler" (the ODE's slope) or "none"
    (noise to the end of the grid). Drift and score are affine in v, so guiding the velocity or the drift is
    the same. Source: CVL-UESTC/Internal-Guidance SiT/samplers.py; willisma/SiT transport
    (Sampler.sample_sde).
    """

    stochastic: ClassVar[bool] = True

    diffusion_form: str = "linear"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self):
        check(self.diffusion_form in DIFFUSION_FORMS, "diffusion_form", self.diffusion_form,
              f"one of {', '.join(DIFFUSION_FORMS)}")
        check(0 < self.diffusion_norm < np.inf, "diffusion_norm", self.diffusion_norm, "a number greater than 0")
        check(self.last_step in LAST_STEPS, "last_step", self.last_step, f"one of {', '.join(LAST_STEPS)}")
        check(0 < self.last_step_size < 1, "last_step_size", self.last_step_size, "in (0, 1) of sigma-time")

    def rows(self, path, steps):
        rows = [self._noisy_row(path, t, end) for t, end in itertools.pairwise(self._grid(path, steps))]
        return rows if self.last_step == "none" else rows + [self._last_row(path)]

    def _grid(self, path: str, steps: int) -> np.ndarray:
        first = SBDM_START if self.diffusion_form == "SBDM" and path != "vp" else 1.0
        last = paths.data_end(path) if self.last_step == "none" else self.last_step_size
        return np.linspace(first, last, steps)

    def _diffusion(self, path: str, t: float) -> float:
        return DIFFUSION_FORMS[self.diffusion_form](path, t, self.diffusion_norm)

    def _drift(self, path: str, t: float) -> tuple[float, float]:
        """(a, b) of the drift v - D score = a v + b x."""
        score_v, score_x = paths.score_weights(path, np.float64(t))
        diffusion = self._diffusion(path, t)
        return 1 - diffusion * score_v, -diffusion * score_x

    def _noisy_row(self, path: str, t: float, end: float) -> Row:
        dt = end - t
        drift_v, drift_x = self._drift(path, t)
        noise = np.sqrt(2 * self._diffusion(path, t) * abs(dt))
        return Row("noisy", (t,), {"t": t, "v": dt * drift_v, "x": 1 + dt * drift_x, "noise": noise})

    def _last_row(self, path: str) -> Row:
        t = size = self.last_step_size
        drift_v, drift_x = self._drift(path, t)
        v, x = -size * drift_v, 1 - size * drift_x
        if self.last_step == "euler":
            v, x = -size, 1.0
        if self.last_step == "tweedie":  # (x + sigma^2 score) / alpha
            c = paths.coefficients(path, np.float64(t))
            score_v, score_x = paths.score_weights(path, np.float64(t))
            v, x = c.sigma**2 * score_v / c.alpha, (1 + c.sigma**2 * score_x) / c.alpha
        return Row("last", (t,), {"t": t, "v": v, "x": x})

    def advance(self, kind, velocities, state, scalars, noise):
        state = scalars["x"] * state + scalars["v"] * velocities[0](state, scalars["t"])
        return state if kind == "last" else state + scalars["noise"] * noise


class HeunSde(EulerMaruyama):
    """The noise first, then a trapezoid of the drift from the noised point: two evaluations a step.

    Source: willisma/SiT transport/integrators.py (the Heun step of its SDE).
    """

    def __post_init__(self):
        super().__post_init__()
        check(self.last_step != "none", "last_step", self.last_step,
              "mean, tweedie or euler for the solver sde_heun",
              "its corrector would need the score at the end, where it is infinite")

    def _noisy_row(self, path, t, end):
        (v, x), (v_next, x_next) = self._drift(path, t), self._drift(path, end)
        noise = np.sqrt(2 * self._diffusion(path, t) * abs(end - t))
        return Row("noisy", (t, end), {"t": t, "t_next": end, "dt": end - t, "noise": noise,
                                       "v": v, "x": x, "v_next": v_next, "x_next": x_next})

    def advance(self, kind, velocities, state, scalars, noise):
        if kind == "last":
            return super().advance(kind, velocities, state, scalars, noise)
        noised = state + scalars["noise"] * noise
        drift = scalars["v"] * velocities[0](noised, scalars["t"]) + scalars["x"] * noised
        ahead = noised + scalars["dt"] * drift
        drift_next = scalars["v_next"] * velocities[1](ahead, scalars["t_next"]) + scalars["x_next"] * ahead
        return noised + scalars["dt"] * (0.5 * drift + 0.5 * drift_next)


SOLVERS: dict[str, type] = {
    "euler": Euler,
    "heun": Heun,
    "trapezoid": Trapezoid,
    "ab2": AdamsBashforth,
    "dopri5": DormandPrince,
    "sde": EulerMaruyama,
    "sde_heun": HeunSde,
}


def integrate(
    solver: Solver,
    rows: list[Row],
    velocity: Callable[[jax.Array, jax.Array, Hashable], jax.Array],
    x: jax.Array,
    *,
    region: Callable[[float], Hashable] = lambda t: None,
    noise: Callable[[jax.Array], jax.Array] | None = None,
    first: int = 0,
) -> jax.Array:
    """Latents at the end of the rows from latents x [B, H, W, C] float32 at their beginning.

    `velocity(x, t, region)` is the field, `region(t)` its static regime at a grid time, `noise(step)` a
    standard normal [B, H, W, C] for a stochastic solver; `first` is the step that the first row is.
    """
    state, done = solver.start(x), 0
    regimes = [(row.kind, tuple(region(t) for t in row.lookup)) for row in rows]
    for (kind, regions), group in itertools.groupby(regimes):
        count = len(list(group))
        piece, step_index = rows[done : done + count], first + done + jnp.arange(count)
        done += count
        velocities = [functools.partial(velocity, region=r) for r in regions]

        def step(state, row, kind=kind, velocities=velocities):
            index, scalars = row
            increment = noise(index) if solver.stochastic else None
            return solver.advance(kind, velocities, state, scalars, increment), None

        scalars = {
            name: jnp.asarray([row.scalars[name] for row in piece], jnp.float32) for name in piece[0].scalars
        }
        state, _ = jax.lax.scan(step, state, (step_index, scalars))
    return solver.finish(state)

