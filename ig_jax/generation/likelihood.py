"""The log-density of data under the probability-flow ODE, by the instantaneous change of variables.

Along dx/dt = v(x, t) the log-density changes by -div v, so with x_1 the noise that data x flow to
log p(x) = log N(x_1; 0, I) + integral of div v(x_t, t) dt.  Source: arXiv 1806.07366; 2011.13456, appendix D.2.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.diffusion.integration import Field, FixedGrid, Region, nowhere
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.generation.sampler import Program
from ig_jax.parallel.sharding import on_mesh

Probe = Callable[[jax.Array], jax.Array]  # number -> direction (H, W, C), or one for each image (B, H, W, C)


class Likelihood(NamedTuple):
    """Log-densities of N normalised latents (or images in [-1, 1], of a model of pixels).

    Attributes:
        nats: natural logarithm of the density of x, (N,) float32.
        bits_per_dim: minus its binary logarithm for each of the h w c numbers, (N,) float32; of a model of pixels for
            levels 0..255, so that it bounds a lossless code of images with uniform noise in [0, 1) added to them.
        noise: where the ODE takes x, (N, h, w, c) float32.
    """

    nats: np.ndarray
    bits_per_dim: np.ndarray
    noise: np.ndarray


def divergence(field: Callable[[jax.Array], jax.Array], x: jax.Array, count: int, probe: Probe):
    """(field(x), sum over `count` probes z of z . (d field / dx) z), (B, H, W, C) and (B,), by forward mode.

    That is the divergence for all unit vectors, and in the mean for random signs / sqrt(count).
    """
    value, push = jax.linearize(field, x)

    def add(total, number):
        z = jnp.broadcast_to(probe(number), x.shape)
        return total + jnp.sum(z * push(z), axis=(1, 2, 3)), None

    return value, jax.lax.scan(add, jnp.zeros(len(x)), jnp.arange(count))[0]


def log_density(
    field: Field,
    x: jax.Array,
    labels: jax.Array,
    count: int,
    probe: Probe,
    *,
    solver: FixedGrid,
    path: str,
    steps: int,
    region: Callable[[float], Region] = nowhere,
) -> tuple[jax.Array, jax.Array]:
    """(log-density (B,), noise (B, H, W, C)) of x (B, H, W, C); the divergence is integrated as one more channel."""

    def both(state, t, labels, region):
        v, div = divergence(lambda x: field(x, t, labels, region), state[..., :-1], count, probe)
        return jnp.concatenate([v, jnp.broadcast_to(div[:, None, None, None], (*v.shape[:-1], 1))], axis=-1)

    start = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
    end = solver.integrate(both, start, labels, path=path, steps=steps, region=region, reverse=True).latents
    noise, gained = end[..., :-1], end[:, 0, 0, -1]
    normal = -0.5 * jnp.sum(noise**2 + math.log(2 * math.pi), axis=(1, 2, 3))
    return normal + gained, noise


@functools.lru_cache(maxsize=8)
def make(mesh: Mesh, program: Program, probes: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted `log_density` with the arguments of a sampler that is given its start; probes 0: every direction."""
    size = math.prod(program.shape)

    def run(params, second_params, seed, indices, labels, scales, x):
        def unit(number):
            return (jnp.arange(size) == number).astype(jnp.float32).reshape(program.shape)

        def signs(number):
            draw = lambda i: jax.random.rademacher(address(seed, Purpose.PROBE, i, number), program.shape, jnp.float32)
            return jax.vmap(draw)(indices) / math.sqrt(probes)

        count, probe = (probes, signs) if probes else (size, unit)
        where = {"path": program.process.kind, "steps": program.steps, "region": program.guidance.region}
        with on_mesh(mesh):
            field = program.field(params, second_params, scales)
            return log_density(field, x, labels, count, probe, solver=program.solver, **where)

    return jax.jit(run)
