"""Sampling trajectories: the latents before every step, and what both heads make of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.diffusion import paths
from ig_jax.diffusion.guidance import blend
from ig_jax.diffusion.integration import FixedGrid
from ig_jax.diffusion.randomness import Purpose
from ig_jax.generation.sampler import Program, normal

STOPS = 10  # sigma-times at which the gap is shown


class Trajectory(NamedTuple):
    """The guided trajectories of N samples at S sigma-times, from noise to data; arrays (S, N, H, W, C) float32.

    Attributes:
        sigma: sigma-times, (S,).
        latents: at those times.
        final: D_f, the data that the final head predicts from them.
        intermediate: D_i, the same of the intermediate head.
    """

    sigma: np.ndarray
    latents: np.ndarray
    final: np.ndarray
    intermediate: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """D_f - D_i."""
        return self.final - self.intermediate

    @property
    def norm(self) -> np.ndarray:
        """(S, N): root mean square of the difference."""
        return np.sqrt(np.mean(np.square(self.difference), axis=(2, 3, 4)))


def follow(
    program: Program, params: dict[str, jax.Array], scales, labels: np.ndarray, seed: int, most: int | None = None
) -> Trajectory:
    """The trajectories of samples 0 .. N - 1 before every step, or at `most` of them spread over the grid.

    Raises: UserError for a model without a head, and for a solver that carries more than the latents.
    """
    check(len(program.model.inter_depth) > 0, "inter_depth", (), "an intermediate head, to compare with the final one")
    solver = program.solver
    if not isinstance(solver, FixedGrid) or solver.has_memory or solver.chain:
        expected, fix = "one with a fixed time grid and no memory, on a path", "use euler, heun, trapezoid or sde"
        raise UserError(name="solver", value=solver.name, expected=expected, fix=fix)
    check(program.second is None, "auto_scale", True, "1 to follow a trajectory")
    grid = [row.guided_at[0] for row in solver.rows(program.process.kind, program.steps)]
    stops = np.unique(np.linspace(0, len(grid) - 1, most or len(grid)).round().astype(int))
    sigma = np.asarray(grid, np.float32)[stops]
    found = _compiled(program, tuple(stops.tolist()))(params, scales, sigma, jnp.asarray(labels), jnp.uint32(seed))
    return Trajectory(sigma, *map(np.asarray, found))


@functools.lru_cache(maxsize=8)
def _compiled(program: Program, stops: tuple[int, ...]):
    return jax.jit(functools.partial(_follow, program, np.array(stops)))


def _follow(program: Program, stops: np.ndarray, params, scales, sigma, labels, seed):
    """(latents, D_f, D_i), each (S, N, H, W, C), before the steps `stops` at their times `sigma`."""
    indices, solver, kind = jnp.arange(len(labels), dtype=jnp.int32), program.solver, program.process.kind
    assert isinstance(solver, FixedGrid)
    noise = lambda step: normal(seed, Purpose.SAMPLE_INCREMENT, indices, program.shape, step)
    x = normal(seed, Purpose.SAMPLE_NOISE, indices, program.shape)
    field, region = program.field(params, {}, scales), program.guidance.region
    rows = solver.rows(kind, program.steps)
    _, groups = solver.visit(rows, field, x, labels, region=region, noise=noise, seen=lambda state: state)
    network = program.network(program.model, params)

    def denoised(at):
        x, t = at
        times = jnp.full(labels.shape, t, jnp.float32)
        out = network(x, times, labels)
        heads = out.final, blend(out.intermediate, program.guidance.head)
        return x, *(paths.convert(kind, "velocity", "data", v, x, times) for v in heads)

    return jax.lax.map(denoised, (jnp.concatenate(groups)[stops], sigma))
