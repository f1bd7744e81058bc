"""Solvers of the probability-flow ODE and of the reverse SDE over a fixed time grid."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import check
from ig_jax.diffusion import paths
from ig_jax.diffusion.integration import FixedGrid, Row, option, register

SBDM_START = 1 - 1e-3  # its diffusion is infinite at t = 1 except on the VP path; willisma/SiT (sample_eps)

# One step of each method: fields v[i](x, t), coefficients c, a standard normal for those that add noise.


def euler(x, v, c, noise):
    return x + c.dt * v[0](x, c.t)


def trapezoid(x, v, c, noise):
    slope = v[0](x, c.t)
    slope_next = v[1](x + c.dt * slope, c.t_next)
    return x + c.dt * (0.5 * slope + 0.5 * slope_next)


def adams_bashforth(state, v, c, noise):
    x, slope_before = state
    slope = v[0](x, c.t)
    return x + c.now * slope + c.before * slope_before, slope


def euler_maruyama(x, v, c, noise):
    return affine(x, v, c, noise) + c.noise * noise


def affine(x, v, c, noise):
    return c.x * x + c.v * v[0](x, c.t)


def heun_sde(x, v, c, noise):
    x = x + c.noise * noise
    drift = c.v * v[0](x, c.t) + c.x * x
    ahead = x + c.dt * drift
    drift_next = c.v_next * v[1](ahead, c.t_next) + c.x_next * ahead
    return x + c.dt * (0.5 * drift + 0.5 * drift_next)


@dataclasses.dataclass(frozen=True)
class Ode(FixedGrid):
    """The time grid that all ODE solvers share.

    A shift S bends it: t' -> S t' / (1 + (S - 1) t') on the clock that ends at data, so S < 1 takes smaller steps near
    the noise. Source: hustvl/LightningDiT (timestep_shift).
    """

    reversible: ClassVar[bool] = True

    shift: float = option(1.0, "Time shift of the grid; below 1 the steps near the noise are smaller, 1 is off.")

    def __post_init__(self):
        check(0 < self.shift < np.inf, "shift", self.shift, "a number greater than 0 (1 is off)")

    def grid(self, path: str, steps: int, reverse: bool = False) -> np.ndarray:
        """steps + 1 sigma-times, float64, in the order of integration."""
        u = np.linspace(1.0, paths.data_end(path), steps + 1)
        t = u / (self.shift + (1 - self.shift) * u)
        return t[::-1] if reverse else t


@register("euler")
class Euler(Ode):
    """x + dt v(x, t): one evaluation per step."""

    order = 1

    def rows(self, path, steps, reverse=False):
        pairs = itertools.pairwise(self.grid(path, steps, reverse))
        return [Row(euler, (t,), {"t": t, "dt": end - t}) for t, end in pairs]


@register("heun")
class Heun(Ode):
    """Euler corrected by the mean of the slopes at both ends on all steps but the last: 2 steps - 1 evaluations.

    Both evaluations of a step are guided where it begins, as in the loop of the release; a scale that is a table over
    sigma is read at the time of each evaluation.
    Source: CVL-UESTC/Internal-Guidance SiT/samplers.py, euler_sampler(heun=True).
    """

    order = 2

    def rows(self, path, steps, reverse=False):
        *pairs, (t_last, end_last) = itertools.pairwise(self.grid(path, steps, reverse))
        rows = [Row(trapezoid, (t, t), {"t": t, "dt": end - t, "t_next": end}) for t, end in pairs]
        return [*rows, Row(euler, (t_last,), {"t": t_last, "dt": end_last - t_last})]


@register("trapezoid")
class Trapezoid(Ode):
    """Heun on every step, each evaluation guided at its own time: 2 steps evaluations.

    LightningDiT counts grid points: its 125 are 124 steps here.
    Source: hustvl/LightningDiT transport (heun2 of torchdiffeq is the explicit trapezoid).
    """

    order = 2

    def rows(self, path, steps, reverse=False):
        pairs = itertools.pairwise(self.grid(path, steps, reverse))
        return [Row(trapezoid, (t, end), {"t": t, "dt": end - t, "t_next": end}) for t, end in pairs]


@register("ab2")
class AdamsBashforth(Ode):
    """The line through this slope and the previous one, on steps of any length: one evaluation per step.

    The first step is Euler's. Where a guidance interval begins or ends the previous slope belongs to another field,
    which costs one first-order step.
    """

    order = 2
    has_memory = True

    def rows(self, path, steps, reverse=False):
        grid, rows = self.grid(path, steps, reverse), []
        for t, length, before in zip(grid, np.diff(grid), [np.inf, *np.diff(grid)]):
            ratio = length / before
            steps_of = {"t": t, "now": length * (1 + ratio / 2), "before": -length * ratio / 2}
            rows.append(Row(adams_bashforth, (t,), steps_of))
        return rows

    def start(self, x):
        return x, jnp.zeros_like(x)

    def finish(self, state):
        return state[0]


# D(t) of the SDE dx = (v - D score) dt + sqrt(2 D) dw in our clock. Source: willisma/SiT transport/path.py.
DIFFUSION_FORMS: dict[str, Callable[[str, float, float], Any]] = {
    "constant": lambda path, t, norm: norm,
    "SBDM": lambda path, t, norm: norm * _sbdm(path, t),
    "sigma": lambda path, t, norm: norm * paths.coefficients(path, np.float64(t)).sigma,
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * np.cos(np.pi * t)) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * np.sin(np.pi * t) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler", "none")


def _sbdm(path: str, t: float) -> Any:
    """Half the squared diffusion of the forward SDE with the marginals of this path."""
    c = paths.coefficients(path, np.float64(t))
    return c.sigma * c.d_sigma - c.d_alpha / c.alpha * c.sigma**2


@register("sde")
@dataclasses.dataclass(frozen=True)
class EulerMaruyama(FixedGrid):
    """The reverse SDE on linspace(1, last_step_size, steps), then one noiseless step to 0: `steps` evaluations.

    The defaults are those of the IG release, g^2 = 2 D = 2t. Drift and score are affine in v, so guiding the velocity
    or the drift is the same.
    Source: CVL-UESTC/Internal-Guidance SiT/samplers.py; willisma/SiT transport (Sampler.sample_sde).
    """

    order: ClassVar[int] = 1
    least_steps: ClassVar[int] = 2

    diffusion_form: str = option("linear", f"D(t) of the SDE: {', '.join(DIFFUSION_FORMS)}.")
    diffusion_norm: float = option(1.0, "Factor of the diffusion.")
    last_step: str = option("mean", "mean (the drift), tweedie (denoised data), euler (of the ODE) or none (noise).")
    last_step_size: float = option(0.04, "Sigma-time at which the last step begins.")

    def __post_init__(self):
        form, last, size = self.diffusion_form, self.last_step, self.last_step_size
        check(form in DIFFUSION_FORMS, "diffusion_form", form, f"one of {', '.join(DIFFUSION_FORMS)}")
        check(0 < self.diffusion_norm < np.inf, "diffusion_norm", self.diffusion_norm, "a number greater than 0")
        check(last in LAST_STEPS, "last_step", last, f"one of {', '.join(LAST_STEPS)}")
        check(0 < size < 1, "last_step_size", size, "in (0, 1) of sigma-time")

    @property
    def stochastic(self) -> bool:
        return True

    def rows(self, path, steps):
        first = SBDM_START if self.diffusion_form == "SBDM" and path != "vp" else 1.0
        last = paths.data_end(path) if self.last_step == "none" else self.last_step_size
        rows = [self._noisy_row(path, t, end) for t, end in itertools.pairwise(np.linspace(first, last, steps))]
        return rows if self.last_step == "none" else [*rows, self._last_row(path)]

    def _diffusion(self, path: str, t: float) -> float:
        return DIFFUSION_FORMS[self.diffusion_form](path, t, self.diffusion_norm)

    def _drift(self, path: str, t: float) -> tuple[float, float]:
        """(a, b) of the drift v - D score = a v + b x."""
        score_x, score_v = paths.conversion(path, "velocity", "score", np.float64(t))
        diffusion = self._diffusion(path, t)
        return 1 - diffusion * score_v, -diffusion * score_x

    def _noisy_row(self, path: str, t: float, end: float) -> Row:
        dt = end - t
        drift_v, drift_x = self._drift(path, t)
        noise = np.sqrt(2 * self._diffusion(path, t) * abs(dt))
        return Row(euler_maruyama, (t,), {"t": t, "v": dt * drift_v, "x": 1 + dt * drift_x, "noise": noise})

    def _last_row(self, path: str) -> Row:
        t = size = self.last_step_size
        drift_v, drift_x = self._drift(path, t)
        v, x = -size * drift_v, 1 - size * drift_x
        if self.last_step == "euler":
            v, x = -size, 1.0
        if self.last_step == "tweedie":  # (x + sigma^2 score) / alpha
            c = paths.coefficients(path, np.float64(t))
            score_x, score_v = paths.conversion(path, "velocity", "score", np.float64(t))
            v, x = c.sigma**2 * score_v / c.alpha, (1 + c.sigma**2 * score_x) / c.alpha
        return Row(affine, (t,), {"t": t, "v": v, "x": x})


@register("sde_heun")
class HeunSde(EulerMaruyama):
    """The noise first, then a trapezoid of the drift from the noised point: two evaluations per step.

    Source: willisma/SiT transport/integrators.py (the Heun step of its SDE).
    """

    order = 2

    def __post_init__(self):
        super().__post_init__()
        expected, fix = "mean, tweedie or euler for the solver sde_heun", "the score is infinite at the end of the grid"
        check(self.last_step != "none", "last_step", self.last_step, expected, fix)

    def _noisy_row(self, path, t, end):
        (v, x), (v_next, x_next) = self._drift(path, t), self._drift(path, end)
        step = {"t": t, "t_next": end, "dt": end - t, "noise": np.sqrt(2 * self._diffusion(path, t) * abs(end - t))}
        return Row(heun_sde, (t, end), step | {"v": v, "x": x, "v_next": v_next, "x_next": x_next})
