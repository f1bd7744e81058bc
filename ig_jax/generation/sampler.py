"""The sampling program: one jitted function from sample indices to latents.

The noise, label and increments of sample i are functions of (seed, i) alone, so batch size, device count and restarts
change nothing but rounding: a compiler may sum in another order for another batch size. Training previews, `sample`,
`visualize` and `evaluate` all use it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.base.errors import UserError
from ig_jax.diffusion import gaussian_samplers
from ig_jax.diffusion.guidance import Guidance, Network, Scales, guided_velocity
from ig_jax.diffusion.integration import Field, Integrated, Solver
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.diffusion.recipe import Recipe
from ig_jax.models import dit
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import batch_sharding, on_mesh, replicated, tree_shardings

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about sampling: one compilation each.

    Attributes:
        model: the network.
        process: what it predicts, and on which path.
        solver: with its options.
        steps: of the solver.
        guidance: the rules in the program, without their scales.
        second: the weaker network of autoguidance.
        reverse: from latents to noise.
    """

    model: dit.DiTConfig
    process: ProcessConfig
    solver: Solver
    steps: int
    guidance: Guidance
    second: dit.DiTConfig | None = None
    reverse: bool = False

    @classmethod
    def of(
        cls, recipe: Recipe, model: dit.DiTConfig, process: ProcessConfig, second: dit.DiTConfig | None = None
    ) -> "Program":
        """The program that samples by a recipe."""
        guidance = recipe.guidance
        return cls(model, process, recipe.solver, recipe.steps, guidance, second if guidance.needs_second else None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent."""
        return self.model.input_size, self.model.input_size, self.model.channels

    def field(self, params: Params, second_params: Params, scales: Scales) -> Field:
        """The function (x (B, H, W, C), t, labels (B,), region) that the solver integrates: the guided velocity, or the
        guided noise and the variance of DiT's chain.
        """
        params = dit.cast_kernels(self.model, params)  # here, outside the solver's loop
        second_params = dit.cast_kernels(self.second, second_params) if self.second else {}
        guided = guided_velocity(
            self.network(self.model, params),
            self.model.num_classes,
            self.guidance,
            scales,
            prefix=self.network(self.model, params, until_head=self.guidance.deepest_head),
            second=self.network(self.second, second_params) if self.second else None,
        )
        return gaussian_samplers.noise_field(guided) if self.process.chain else guided

    def network(self, model: dit.DiTConfig, params: Params, until_head: int | None = None) -> Network:
        """A network with its weights, of velocities (or a chain's noises) at sigma-times."""
        raw = functools.partial(dit.forward, model, params, until_head=until_head)
        if self.process.chain:
            return gaussian_samplers.in_sigma_time(raw)
        return lambda x, t, y: self.process.to_velocity(model, raw(x, t, y), x, t)


def normal(seed, purpose: Purpose, indices: jax.Array, shape: tuple[int, ...], *more) -> jax.Array:
    """A standard normal (B, *shape) float32 whose row i belongs to (seed, indices[i], *more)."""
    return jax.vmap(lambda i: jax.random.normal(address(seed, purpose, i, *more), shape, jnp.float32))(indices)


def integrate(
    program: Program,
    params: Params,
    second_params: Params,
    seed: jax.Array,
    indices: jax.Array,
    labels: jax.Array,
    scales: Scales,
    x: jax.Array,
) -> Integrated:
    """Latents (B, H, W, C) and their evaluations (B,) from noise x (B, H, W, C); in reverse, noise from latents."""
    guidance = program.guidance
    return program.solver.integrate(
        program.field(params, second_params, scales),
        x,
        labels,
        path=program.process.kind,
        steps=program.steps,
        region=guidance.region,
        edges=guidance.edges(),
        noise=lambda step: normal(seed, Purpose.SAMPLE_INCREMENT, indices, program.shape, step),
        cost=lambda region: guidance.passes(region, program.model, program.second),
        reverse=program.reverse,
    )


@functools.lru_cache(maxsize=32)
def make_sampler(mesh: Mesh, program: Program, given: bool = False) -> Callable[..., Integrated]:
    """The jitted (params, second params or {}, seed, indices, labels, scales) -> Integrated.

    given: it is called with what to start from, (B, H, W, C), as one more argument. Seed and scales are traced:
    sweeping them compiles nothing. Made once for each static description.
    """

    def sampler(params, second_params, seed, indices, labels, scales, *start):
        with on_mesh(mesh):
            x = start[0] if given else normal(seed, Purpose.SAMPLE_NOISE, indices, program.shape)
            return integrate(program, params, second_params, seed, indices, labels, scales, x)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    weights = tree_shardings(dit.shapes(program.model), mesh)
    second_weights = tree_shardings(dit.shapes(program.second), mesh) if program.second else {}
    placed = weights, second_weights, whole, rows, rows, whole
    return jax.jit(sampler, in_shardings=(*placed, rows) if given else placed, out_shardings=rows)


class Batch(NamedTuple):
    """Some of the samples; the arrays may still be being computed, and may end in rows of padding.

    Attributes:
        indices: (b,) int, of the samples.
        latents: (B, H, W, C) float32, B >= b.
        evaluations: (B,) float32, forward passes for each image; None for saved latents.
    """

    indices: np.ndarray
    latents: jax.Array
    evaluations: jax.Array | None


def batches(indices: np.ndarray, size: int, compute: Callable[[np.ndarray], Integrated]) -> Iterator[Batch]:
    """Batches of the samples `indices` (n,), from what `compute` gives for `size` positions in them.

    The last batch is filled up with its last sample. A batch is handed out once the next one has been dispatched, so
    that the devices are never idle while the host works on the results.
    """
    ready = None
    for start in range(0, len(indices), size):
        latents, evaluations = compute(np.minimum(np.arange(start, start + size), len(indices) - 1))
        if ready is not None:
            yield ready
        ready = Batch(indices[start : start + size], latents, evaluations)
    if ready is not None:
        yield ready


def sample_latents(
    program: Program,
    params: Params,
    second_params: Params,
    scales: Scales,
    *,
    mesh: Mesh,
    seed: int,
    indices: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
) -> Iterator[Batch]:
    """The samples `indices` (n,) with `labels` (n,) int32, batch by batch."""
    sampler, rows = make_sampler(mesh, program), batch_sharding(mesh)

    def compute(chosen: np.ndarray) -> Integrated:
        numbers, classes = (on_devices(array[chosen], rows) for array in (indices, labels))
        return sampler(params, second_params, np.uint32(seed), numbers, classes, scales)

    return batches(indices, padded(batch_size, mesh), compute)


def read_latents(
    read: Callable[[int], np.ndarray], indices: np.ndarray, *, mesh: Mesh, batch_size: int
) -> Iterator[Batch]:
    """The same for saved latents: `read(index)` is float32 (H, W, C)."""

    def compute(chosen: np.ndarray) -> Integrated:
        saved = np.stack([read(int(i)) for i in indices[chosen]])
        return Integrated(on_devices(saved, batch_sharding(mesh)), None)

    return batches(indices, padded(batch_size, mesh), compute)


def padded(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the shards of a batch on the mesh."""
    shards = batch_shards(mesh)
    return -(-batch_size // shards) * shards


def on_devices(array: np.ndarray, sharding) -> jax.Array:
    """An array that every process holds in full, as int32 or float32, sharded over the devices of all processes."""
    array = np.asarray(array, np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(array: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, rows) of the first `count` rows that are on this process; each row is on exactly one."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    rows = np.concatenate([np.arange(array.shape[0])[shard.index[0]] for shard in shards])
    values = np.concatenate([np.asarray(shard.data) for shard in shards])
    return rows[rows < count], values[rows < count]


def check_finite(values: np.ndarray, recipe: Recipe) -> None:
    """Raise UserError when a sample is not finite."""
    if not np.isfinite(values).all():
        fix = "give more steps or a larger rtol" if recipe.solver.adaptive else "lower the guidance scales"
        problem = f"some samples of solver={recipe.solver.name!r} with steps={recipe.steps} are not finite"
        raise UserError(problem, name="solver", value=recipe.solver.name, fix=fix)
