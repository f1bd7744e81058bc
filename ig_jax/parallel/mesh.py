"""The device mesh, with axes ('data', 'fsdp', 'tensor')."""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from ig_jax.base.errors import UserError, check

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both: FSDP is data parallelism with sharded weights


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    fsdp_up_to: int = 1,
    dcn_data: int = 0,
    devices: Sequence | None = None,
) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes the devices that the others leave.

    dcn_data: into how many parts, such as slices of TPUs or boxes of GPUs, the network cuts the devices: the data axis
    goes over them, the others stay inside one. 0 for the slices that JAX reports, where the axes fit into them.

    With fsdp=1, fsdp becomes the largest number up to fsdp_up_to that divides the devices left by tensor and by data
    (unless data is -1), so that one config serves any number of devices.
    Raises: UserError when the product of the axes is not the number of devices.
    """
    number = lambda device: getattr(device, "slice_index", 0)
    devices = sorted(jax.devices() if devices is None else devices, key=number)
    reported = Counter(map(number, devices)).values()
    slices = dcn_data or (len(reported) if len(set(reported)) == 1 else 1)
    expected = f"0, or a divisor of the {len(devices)} devices"
    check(dcn_data >= 0 and len(devices) % slices == 0, "mesh.dcn_data", dcn_data, expected)
    inside = len(devices) // slices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        check(size == -1 or size >= 1, f"mesh.{name}", size, "-1 or at least 1")
    check(fsdp_up_to >= 1, "mesh.fsdp_up_to", fsdp_up_to, "at least 1")
    if fsdp == 1:
        left = max(inside // (max(data // slices, 1) * max(tensor, 1)), 1)
        sizes["fsdp"] = max(n for n in range(1, fsdp_up_to + 1) if left % n == 0)
    open_axes = [name for name, size in sizes.items() if size == -1]
    check(len(open_axes) <= 1, "mesh", sizes, "sizes with at most one -1")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes:
        sizes[open_axes[0]] = max(len(devices) // fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        expected = f"multiply to the {len(devices)} devices of this run"
        fix = "set one of mesh.data, mesh.fsdp, mesh.tensor to -1"
        raise UserError(f"mesh={sizes} must {expected}", name="mesh", value=sizes, expected=expected, fix=fix)
    if sizes["data"] % slices != 0:
        expected = f"a multiple of the {slices} slices of mesh.dcn_data"
        check(not dcn_data, "mesh.data", sizes["data"], expected, "lower mesh.fsdp or mesh.tensor")
        slices, inside = 1, len(devices)  # the others do not fit into a slice
    shape, types = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"]), (AxisType.Auto,) * 3
    parts = [devices[first : first + inside] for first in range(0, len(devices), inside)]
    if len(set(map(number, parts[0]))) > 1:  # which JAX arranges only by slices
        return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES, axis_types=types)
    inner = [jax.make_mesh(shape, AXES, devices=part, axis_types=types).devices for part in parts]
    return Mesh(np.concatenate(inner), AXES, axis_types=types)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of a global batch on this mesh, 1 without axes."""
    return int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH_AXES]))


def check_batch(global_batch: int, mesh: Mesh, *, pieces: int = 1, name: str = "config.data.batch_size") -> None:
    """Raise UserError unless `pieces` micro-batches of the global batch divide over the mesh."""
    parts = batch_shards(mesh) * pieces
    expected = f"a multiple of {parts} ({batch_shards(mesh)} batch shards x {pieces} micro-batches)"
    fix = f"set {name} to {max(global_batch // parts, 1) * parts}"
    check(global_batch % parts == 0, name, global_batch, expected, fix)
