"""Sharding rules by parameter name, and the sharding constraints inside the model.

Weights are stored sharded over 'fsdp' (and over 'tensor' in tensor-parallel layers) and gathered inside the layer
that uses them; activations stay sharded over the batch. Without these explicit constraints the partitioner may
shard activations along the axis of the weights, and its communication grows with the number of devices.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ig_jax.parallel.mesh import BATCH_AXES

# Tensor parallelism cuts a pair of linear layers by the hidden units between them: the first by its
# columns, the second by its rows. Key: the layer's name inside a block; value: the kernel's cut dimension.
TENSOR_DIMENSION = {"qkv": 1, "fc1": 1, "proj": 0, "fc2": 0}

# Below this many elements a gather costs more in latency than the memory it saves (64 kB of float32).
SMALLEST_FSDP_ARRAY = 2**14


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one parameter, or of an optimizer or EMA array of the same name and shape."""
    layer, _, kind = name.rpartition(".")
    cut = TENSOR_DIMENSION.get(layer.rpartition(".")[2]) if kind == "kernel" else None
    return stored_spec(shape, cut, mesh)


def stored_spec(shape: tuple[int, ...], tensor_dimension: int | None, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of a stored array: over 'tensor' where its layer says so, its longest free side over 'fsdp'."""
    spec: list[str | None] = [None] * len(shape)
    cut = tensor_dimension
    if cut is not None and mesh.shape["tensor"] > 1 and shape[cut] % mesh.shape["tensor"] == 0:
        spec[cut] = "tensor"
    free = [i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1 and math.prod(shape) >= SMALLEST_FSDP_ARRAY:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def tree_shardings(tree, mesh: Mesh):
    """A NamedSharding for each leaf of `tree`; a leaf's innermost dict key is its parameter name."""

    def one(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return NamedSharding(mesh, parameter_spec(names[-1], leaf.shape, mesh) if names else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def with_shardings(shapes, mesh: Mesh):
    """A tree of shapes and dtypes by parameter name, each as ShapeDtypeStruct with the sharding of the rules."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        tree_shardings(shapes, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension cut over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@functools.lru_cache(maxsize=8)  # asked for at every step
def local_row_numbers(mesh: Mesh, count: int) -> np.ndarray:
    """The rows int64 (n,) of a batch of `count` that this process's devices hold, ascending."""
    places = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[place] for place in places]))


def from_local_rows(part: np.ndarray, mesh: Mesh, count: int) -> jax.Array:
    """A batch (count, ...) on the mesh, of which this process gives the rows of `local_row_numbers`."""
    numbers = local_row_numbers(mesh, count)

    def shard(place: tuple[slice, ...] | None) -> np.ndarray:
        assert place is not None
        rows = range(*place[0].indices(count))
        return part[np.searchsorted(numbers, rows[0]) :][: len(rows)]

    return jax.make_array_from_callback((count, *part.shape[1:]), batch_sharding(mesh), shard)


def on_mesh(mesh: Mesh):
    """A context in which the constraints below apply; outside of it they do nothing."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def no_mesh():
    """A context inside `on_mesh` in which the constraints below do nothing, for one image at a time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def platform() -> str:
    """Platform of the program being traced: that of the current mesh, else of this process (see `platform_of`)."""
    return platform_of(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])


def platform_of(device: jax.Device | jax.sharding.AbstractDevice) -> str:
    """The platform of a device: "cpu", "cuda", "rocm" or "tpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if device.device_kind.startswith(("AMD", "gfx")) else "cuda"


_one_shard = contextvars.ContextVar("one_shard", default=False)


@contextlib.contextmanager
def one_shard() -> Iterator[None]:
    """A context in which a batch is that of one shard, under a `vmap` over all of them named BATCH_AXES."""
    token = _one_shard.set(True)
    try:
        yield
    finally:
        _one_shard.reset(token)


def of_shards(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Keep gradients (S, ...) by name, one of each shard of the batch, where that shard is: nothing is exchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    local = {name: _of_tensor(parameter_spec(name, array.shape[1:], mesh)) for name, array in gradients.items()}
    return {name: _constrain(array, PartitionSpec(BATCH_AXES, *local[name])) for name, array in gradients.items()}


def mean_of_shards(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The mean of gradients (S, ...) by name, cut as parameters are stored: scattered, then summed over 'data'."""
    mesh = jax.sharding.get_abstract_mesh()

    def mean(name: str, array: jax.Array) -> jax.Array:
        stored = parameter_spec(name, array.shape[1:], mesh)
        local = PartitionSpec(BATCH_AXES, *_of_tensor(stored))

        def exchange(part: jax.Array) -> jax.Array:
            if "fsdp" not in stored:
                return jax.lax.psum(part[0], BATCH_AXES) / len(array)
            cut = list(stored).index("fsdp")
            scattered = jax.lax.psum_scatter(part[0], "fsdp", scatter_dimension=cut, tiled=True)
            return jax.lax.psum(scattered, "data") / len(array)

        return jax.shard_map(exchange, mesh=mesh, in_specs=local, out_specs=stored)(array)

    return {name: mean(name, array) for name, array in gradients.items()}


def _of_tensor(stored: PartitionSpec) -> PartitionSpec:
    """A stored array whole over 'fsdp', still cut over 'tensor'."""
    return PartitionSpec(*(axis if axis == "tensor" else None for axis in stored))


def _constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec)


def constrain_batch(array: jax.Array, *, hidden: bool = False) -> jax.Array:
    """Keep an activation (B, ...) cut over the batch, and its last side over 'tensor' where it is the hidden
    units between a pair of tensor-parallel layers.
    """
    batch = None if _one_shard.get() else BATCH_AXES
    return _constrain(array, PartitionSpec(batch, *(None,) * (array.ndim - 2), "tensor" if hidden else None))


def gather_weight(kernel: jax.Array, tensor_dimension: int | None = None) -> jax.Array:
    """A weight gathered over 'fsdp', still cut over 'tensor' where its layer is tensor parallel."""
    spec: list[str | None] = [None] * kernel.ndim
    if tensor_dimension is not None:
        spec[tensor_dimension] = "tensor"
    return _constrain(kernel, PartitionSpec(*spec))


def scatter_gradient(gradient: jax.Array, tensor_dimension: int | None) -> jax.Array:
    """A kernel's gradient cut as the kernel is stored, so that it is summed and scattered in one step."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return gradient
    spec = stored_spec(gradient.shape, tensor_dimension, mesh)
    return _constrain(gradient, _of_tensor(spec) if _one_shard.get() else spec)
