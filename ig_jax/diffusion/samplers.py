"""Solvers: each integrates a velocity over a fixed time grid, knowing nothing of guidance.

A solver turns a number of steps into rows, one for each step: a static kind, the times at which the
guidance is looked up for each evaluation, and scalars computed in float64 on the host. `integrate` cuts the
rows where kind or guidance region changes and runs each piece as one `lax.scan`, so a doubled batch runs
only inside its interval and the loop has no branch. To add a solver, write its `rows` and `advance` and
name it in SOLVERS.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import paths

LAST_STEP = 0.04  # sigma-time of the last SDE step in SiT and in the IG release


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


def _grid(steps: int) -> np.ndarray:
    return np.linspace(1.0, 0.0, steps + 1)


def _euler_row(t: float, t_next: float) -> Row:
    return Row("euler", (t,), {"t": t, "dt": t_next - t})


class Euler(_StateIsLatents):
    """x + dt v(x, t) on linspace(1, 0, steps + 1)."""

    stochastic = False

    def rows(self, path, steps):
        return [_euler_row(t, t_next) for t, t_next in itertools.pairwise(_grid(steps))]

    def advance(self, kind, velocities, state, scalars, noise):
        return state + scalars["dt"] * velocities[0](state, scalars["t"])


class Heun(Euler):
    """Euler corrected by the mean of the slopes at both ends, on all but the last step: 2 steps - 1 evaluations.

    Both evaluations of a step take the guidance of its beginning, as the release's loop does.
    Source: CVL-UESTC/Internal-Guidance SiT/samplers.py, euler_sampler(heun=True).
    """

    def rows(self, path, steps):
        rows = super().rows(path, steps)
        return [self._corrected(row) for row in rows[:-1]] + rows[-1:]

    def _corrected(self, row: Row) -> Row:
        t, dt = row.scalars["t"], row.scalars["dt"]
        return Row("heun", (t, t), {"t": t, "dt": dt, "t_next": t + dt})

    def advance(self, kind, velocities, state, scalars, noise):
        if kind == "euler":
            return super().advance(kind, velocities, state, scalars, noise)
        slope = velocities[0](state, scalars["t"])
        slope_next = velocities[1](state + scalars["dt"] * slope, scalars["t_next"])
        return state + scalars["dt"] * (0.5 * slope + 0.5 * slope_next)


class EulerMaruyama(_StateIsLatents):
    """The reverse SDE with diffusion g^2 = 2t on linspace(1, 0.04, steps), then one noiseless step to 0.

    The drift v - g^2/2 score is affine in v, so guiding the velocity or the drift is the same.
    Source: CVL-UESTC/Internal-Guidance SiT/samplers.py, euler_maruyama_sampler.
    """

    stochastic = True

    def rows(self, path, steps):
        grid = np.append(np.linspace(1.0, LAST_STEP, steps), 0.0)
        pairs = list(itertools.pairwise(grid))
        return [self._row("noisy", path, *pair) for pair in pairs[:-1]] + [self._row("last", path, *pairs[-1])]

    def _row(self, kind: str, path: str, t: float, t_next: float) -> Row:
        dt, diffusion = t_next - t, 2 * t
        score_v, score_x = paths.score_weights(path, np.float64(t))
        drift = {"v": dt * (1 - 0.5 * diffusion * score_v), "x": 1 - dt * 0.5 * diffusion * score_x}
        return Row(kind, (t,), {"t": t, **drift, "noise": np.sqrt(diffusion * abs(dt))})

    def advance(self, kind, velocities, state, scalars, noise):
        state = scalars["x"] * state + scalars["v"] * velocities[0](state, scalars["t"])
        return state if kind == "last" else state + scalars["noise"] * noise


SOLVERS: dict[str, Solver] = {"euler": Euler(), "heun": Heun(), "sde": EulerMaruyama()}


def evaluations(solver: str, path: str, steps: int) -> int:
    """Network evaluations of one branch for one image."""
    return sum(len(row.lookup) for row in SOLVERS[solver].rows(path, steps))


def integrate(
    solver: Solver,
    rows: list[Row],
    velocity: Callable[[jax.Array, jax.Array, Hashable], jax.Array],
    x: jax.Array,
    *,
    region: Callable[[float], Hashable] = lambda t: None,
    noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Latents at t = 0 from noise x [B, H, W, C] float32 at t = 1.

    `velocity(x, t, region)` is the field, `region(t)` its static regime at a grid time, `noise(step)` a standard
    normal [B, H, W, C] for a stochastic solver.
    """
    state, done = solver.start(x), 0
    regimes = [(row.kind, tuple(region(t) for t in row.lookup)) for row in rows]
    for (kind, regions), group in itertools.groupby(regimes):
        count = len(list(group))
        piece, first = rows[done : done + count], done
        done += count
        velocities = [functools.partial(velocity, region=r) for r in regions]

        def step(state, row, kind=kind, velocities=velocities):
            index, scalars = row
            increment = noise(index) if solver.stochastic else None
            return solver.advance(kind, velocities, state, scalars, increment), None

        scalars = {
            name: jnp.asarray([row.scalars[name] for row in piece], jnp.float32) for name in piece[0].scalars
        }
        state, _ = jax.lax.scan(step, state, (first + jnp.arange(count), scalars))
    return solver.finish(state)
