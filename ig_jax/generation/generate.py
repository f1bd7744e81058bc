"""Samples from a model: one jitted program from sample indices to latents, the same images on any machine.

The noise, label and increments of sample i are functions of (seed, i) alone, so batch size, device count and
restarts change nothing but rounding: a compiler may order the sums of another batch size differently.
Training previews, `sample` and `evaluate` all come through here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.diffusion import gaussian_samplers, samplers
from ig_jax.diffusion.guidance import Guidance, Network, Scales, guided_velocity
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.errors import UserError
from ig_jax.generation.recipe import Recipe
from ig_jax.models import dit
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import (
    batch_sharding,
    no_mesh,
    on_mesh,
    replicated,
    tree_shardings,
)

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is static about drawing samples: one compilation for each."""

    model: dit.DiTConfig
    process: ProcessConfig
    solver: samplers.Solver
    steps: int
    guidance: Guidance
    weak: dit.DiTConfig | None = None  # the second network of autoguidance

    @classmethod
    def of(
        cls, recipe: Recipe, model: dit.DiTConfig, process: ProcessConfig, weak: dit.DiTConfig | None = None
    ) -> "Program":
        """The program that draws by a recipe."""
        guidance = recipe.guidance
        return cls(model, process, recipe.method, recipe.steps, guidance, weak if guidance.use_auto else None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent."""
        return self.model.input_size, self.model.input_size, self.model.channels

    def field(self, params: Params, weak_params: Params, labels: jax.Array, scales: Scales):
        """field(x [B, H, W, C], t, region) for labels [B], as the solver takes it: the guided velocity, or the
        guided noise and the variance of DiT's chain.
        """
        params = dit.cast_kernels(self.model, params)  # here, outside the solver's loop
        if self.weak:
            weak_params = dit.cast_kernels(self.weak, weak_params)
        guided = guided_velocity(
            self.network(self.model, params), labels, self.model.num_classes, self.guidance, scales,
            prefix=self.network(self.model, params, until_head=self.guidance.deepest_head),
            weak=self.network(self.weak, weak_params),
        )
        return gaussian_samplers.noise_field(guided) if self.process.kind == "gaussian" else guided

    def network(self, model: dit.DiTConfig, params: Params, until_head: int | None = None) -> Network:
        """A network with its weights, of velocities (or a chain's noises) at sigma-times."""
        raw = functools.partial(dit.forward, model, params, until_head=until_head)
        if self.process.kind == "gaussian":
            return gaussian_samplers.in_sigma_time(raw)
        return lambda x, t, y: self.process.to_velocity(raw(x, t, y), x, t)


def normal(seed, purpose: Purpose, indices: jax.Array, shape: tuple[int, ...], *more) -> jax.Array:
    """A standard normal [B, *shape] float32 whose row i belongs to (seed, indices[i], *more)."""
    draw = lambda i: jax.random.normal(address(seed, purpose, i, *more), shape, jnp.float32)  # noqa: E731
    return jax.vmap(draw)(indices)


def integrate(
    program: Program, params: Params, weak_params: Params, seed: jax.Array, indices: jax.Array,
    labels: jax.Array, scales: Scales, x: jax.Array,
) -> tuple[jax.Array, list[jax.Array]]:
    """(latents at the end, evaluations [B] int32 of each piece of an adaptive solver) from latents x [B, H,
    W, C].
    """
    if not hasattr(program.solver, "rows"):
        return _integrate_adaptive(program, params, weak_params, labels, scales, x)
    x = samplers.integrate(
        program.solver,
        program.solver.rows(program.process.kind, program.steps),
        program.field(params, weak_params, labels, scales),
        x,
        region=program.guidance.region,
        noise=lambda step: normal(seed, Purpose.SAMPLE_INCREMENT, indices, program.shape, step),
    )
    return x, []


def _integrate_adaptive(program, params, weak_params, labels, scales, x):
    """Each image chooses its own steps: with steps common to a batch an image would depend on its
    neighbours.
    """

    def one(x, label):
        velocity = program.field(params, weak_params, label[None], scales)
        x, evaluations = program.solver.integrate(
            velocity, x[None], path=program.process.kind, steps=program.steps, edges=program.guidance.edges(),
            region=program.guidance.region,
        )
        return x[0], evaluations

    with no_mesh():  # the constraints inside the network are for whole batches
        return jax.vmap(one)(x, labels)


@functools.lru_cache(maxsize=32)
def make_sampler(mesh: Mesh, program: Program) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    """The jitted (params, weak params or {}, seed, indices, labels, scales) -> (latents float32,
    evaluations).

    Seed and scales are traced: sweeping them compiles nothing. Made once for each static description.
    """

    def sampler(params, weak_params, seed, indices, labels, scales):
        with on_mesh(mesh):
            x = normal(seed, Purpose.SAMPLE_NOISE, indices, program.shape)
            return integrate(program, params, weak_params, seed, indices, labels, scales, x)

    return _jitted(sampler, mesh, program, inputs=2)


@functools.lru_cache(maxsize=32)
def make_integrator(mesh: Mesh, program: Program) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    """As make_sampler, from latents given after the labels instead of noise."""

    def integrator(params, weak_params, seed, indices, labels, x, scales):
        with on_mesh(mesh):
            return integrate(program, params, weak_params, seed, indices, labels, scales, x)

    return _jitted(integrator, mesh, program, inputs=3)


def _jitted(function, mesh: Mesh, program: Program, *, inputs: int):
    """`function` with its weights where the rules put them and its `inputs` batches cut over the mesh."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    weights = tree_shardings(dit.shapes(program.model), mesh)
    weak_weights = tree_shardings(dit.shapes(program.weak), mesh) if program.weak else {}
    return jax.jit(function, in_shardings=(weights, weak_weights, whole, *(rows,) * inputs, whole),
                   out_shardings=rows)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A part of the samples; the arrays may still be being computed, and may have rows of padding at their
    end.
    """

    indices: np.ndarray  # [b], of the samples
    latents: jax.Array  # [B, H, W, C] float32, B >= b
    evaluations: list[jax.Array]  # [B] int32 for each piece of an adaptive solver


def draw(
    params: Params, recipe: Recipe, *, model: dit.DiTConfig, process: ProcessConfig, mesh: Mesh, seed: int,
    indices: np.ndarray, labels: np.ndarray, batch_size: int, weak: dit.DiTConfig | None = None,
    weak_params: Params | None = None,
) -> Iterator[Batch]:
    """The samples `indices` [n] with `labels` [n] int32, batch by batch.

    Every batch runs the same program: the last one is padded. A batch is given out when the next one has been
    started, so that the devices are never idle while the host looks at what they made.
    """
    program = Program.of(recipe, model, process, weak)
    sampler, scales = make_sampler(mesh, program), recipe.scales
    weak_params = weak_params if program.weak else {}
    size, rows = padded(batch_size, mesh), batch_sharding(mesh)
    before = None
    for start in range(0, len(indices), size):
        chosen = np.minimum(np.arange(start, start + size), len(indices) - 1)
        x, evaluations = sampler(params, weak_params, np.uint32(seed), on_devices(indices[chosen], rows),
                                 on_devices(labels[chosen], rows), scales)
        if before is not None:
            yield before
        before = Batch(indices[start : start + size], x, evaluations)
    if before is not None:
        yield before


def read_batches(
    read: Callable[[int], np.ndarray], indices: np.ndarray, mesh: Mesh, batch_size: int
) -> Iterator[Batch]:
    """As `draw`, of saved latents float32 [H, W, C] that `read` gives by index."""
    size, rows = padded(batch_size, mesh), batch_sharding(mesh)
    for start in range(0, len(indices), size):
        chosen = indices[np.minimum(np.arange(start, start + size), len(indices) - 1)]
        latents_read = np.stack([read(int(i)) for i in chosen])
        yield Batch(indices[start : start + size], on_devices(latents_read, rows), [])


def padded(batch_size: int, mesh: Mesh) -> int:
    """The batch size, raised to the next multiple of what the mesh cuts a batch into."""
    shards = batch_shards(mesh)
    return -(-batch_size // shards) * shards


def on_devices(array: np.ndarray, sharding) -> jax.Array:
    """An array that every process holds whole, int32 or float32, cut over the devices of all processes."""
    array = np.asarray(array, np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(array: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, rows) of the first `count` rows that this process holds; no row is held by two."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    rows = [np.arange(array.shape[0])[shard.index[0]] for shard in shards]
    rows, values = np.concatenate(rows), np.concatenate([np.asarray(shard.data) for shard in shards])
    return rows[rows < count], values[rows < count]


def check_finite(values: np.ndarray, recipe: Recipe) -> None:
    """Raise UserError when a sample is not finite."""
    if np.isfinite(values).all():
        return
    mend = "give more steps or a larger rtol" if recipe.solver == "dopri5" else "lower the guidance scales"
    raise UserError(f"solver={recipe.solver!r} with steps={recipe.steps} must give finite samples, "
                    f"but some are not; {mend}")
