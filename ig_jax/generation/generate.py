"""Samples from a model: one jitted program from sample indices to latents, the same images on any machine.

The noise, label and increments of sample i are functions of (seed, i) alone, so batch size, device count and
restarts change no image. Training previews, `sample` and `evaluate` all come through here.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.diffusion import samplers
from ig_jax.diffusion.gaussian_samplers import guided_noise
from ig_jax.diffusion.guidance import Guidance, Scales, guided_velocity
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.errors import UserError
from ig_jax.generation.recipe import Recipe
from ig_jax.models import dit, latents
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import batch_sharding, on_mesh, replicated, tree_shardings


def _normal(seed, purpose: Purpose, indices: jax.Array, shape: tuple[int, ...], *more) -> jax.Array:
    """A standard normal [B, *shape] float32 whose row i belongs to (seed, indices[i], *more)."""
    draw = lambda i: jax.random.normal(address(seed, purpose, i, *more), shape, jnp.float32)  # noqa: E731
    return jax.vmap(draw)(indices)


def sample_latents(
    params: dict[str, jax.Array], seed: jax.Array, indices: jax.Array, labels: jax.Array, scales: Scales,
    *, model: dit.DiTConfig, process: ProcessConfig, solver: str, steps: int, guidance: Guidance,
) -> jax.Array:
    """Latents [B, H, W, C] float32 of the samples `indices` [B] int32 with `labels` [B] int32."""
    shape = (model.input_size, model.input_size, model.channels)
    network = functools.partial(dit.apply, model, params)
    if process.kind == "gaussian":
        field = guided_noise(network, labels, model.num_classes, guidance, scales)
    else:
        velocities = lambda x, t, y: process.to_velocity(network(x, t, y), x, t)  # noqa: E731
        field = guided_velocity(velocities, labels, model.num_classes, guidance, scales)
    method = SOLVERS[solver]
    return samplers.integrate(
        method,
        method.rows(process.kind, steps),
        field,
        _normal(seed, Purpose.SAMPLE_NOISE, indices, shape),
        region=guidance.region,
        noise=lambda step: _normal(seed, Purpose.SAMPLE_INCREMENT, indices, shape, step),
    )


@functools.lru_cache(maxsize=32)
def make_sampler(
    mesh: Mesh, *, model: dit.DiTConfig, process: ProcessConfig, solver: str, steps: int, guidance: Guidance,
    uint8_rule: str,
) -> Callable[..., jax.Array]:
    """The jitted sampler (params, seed, indices, labels, scales) -> images uint8 [B, H, W, C] on `mesh`.

    Seed and scales are traced: sweeping them compiles nothing. Made once for each static description.
    """

    def sampler(params, seed, indices, labels, scales):
        with on_mesh(mesh):
            x = sample_latents(params, seed, indices, labels, scales, model=model, process=process,
                               solver=solver, steps=steps, guidance=guidance)
            return latents.to_uint8(x, uint8_rule)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    weights = tree_shardings(dit.shapes(model), mesh)
    return jax.jit(sampler, in_shardings=(weights, whole, rows, rows, whole), out_shardings=rows)


def labels_for(indices: np.ndarray, protocol: str, num_classes: int, seed: int) -> np.ndarray:
    """Labels int32 of the given sample indices: "balanced" (i mod classes), "random", or a list "3,1,4".

    Random labels belong to (seed, i); a list is repeated. Raises: UserError for anything else.
    """
    if protocol == "balanced":
        return (indices % num_classes).astype(np.int32)
    if protocol == "random":
        key = lambda i: jax.random.randint(address(seed, Purpose.SAMPLE_LABEL, i), (), 0, num_classes)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(key))(jnp.asarray(indices)), np.int32)
    try:
        listed = np.array([int(part) for part in protocol.split(",")], np.int32)
    except ValueError:
        raise UserError(f"labels={protocol!r} must be balanced, random or a list such as 3,1,4") from None
    outside = listed[(listed < 0) | (listed >= num_classes)]
    if outside.size:
        raise UserError(f"labels={int(outside[0])} must be in 0..{num_classes - 1}, the classes of this model")
    return listed[indices % listed.size]


def generate(
    params: dict[str, jax.Array], recipe: Recipe, *, model: dit.DiTConfig, process: ProcessConfig,
    uint8_rule: str, mesh: Mesh, seed: int, labels: np.ndarray, batch_size: int, first: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (indices int, images uint8 [b, H, W, C]) of the samples first .. first + len(labels) - 1.

    Every batch runs the same program: the last one is padded, and cut again on the host.
    """
    shards = batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    sampler = make_sampler(mesh, model=model, process=process, solver=recipe.solver, steps=recipe.steps,
                           guidance=recipe.guidance, uint8_rule=uint8_rule)
    scales = Scales(*(jnp.float32(s) for s in recipe.scales))
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, start + batch_size)
        count = min(batch_size, len(labels) - start)
        images = sampler(params, jnp.uint32(seed), jnp.asarray(first + rows, jnp.int32),
                         jnp.asarray(labels[np.minimum(rows, len(labels) - 1)]), scales)
        yield first + rows[:count], np.asarray(images)[:count]
