"""One named mesh for everything: ('data', 'fsdp', 'tensor')."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ig_jax.errors import UserError, check

AXES = ("data", "fsdp", "tensor")
# Devices that share one copy of the state where the config leaves it open. It divides every width and hidden size
# of the published networks, and the state of the largest (XL, Muon, two averages) is then below 1 GB a device; more
# devices would gather the same bytes over more hops.
FSDP_GROUP = 16
BATCH_AXES = ("data", "fsdp")  # a batch is split over both: FSDP is data parallelism with sharded weights


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    With both data and fsdp -1, fsdp is the largest divisor of what tensor leaves up to FSDP_GROUP.
    Raises: UserError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        check(size == -1 or size >= 1, f"mesh.{name}", size, "-1 or at least 1")
    if data == fsdp == -1:
        left = len(devices) // max(tensor, 1)
        sizes["fsdp"] = max(n for n in range(1, FSDP_GROUP + 1) if left % n == 0) if left else 1
    open_axes = [name for name, size in sizes.items() if size == -1]
    check(len(open_axes) <= 1, "mesh", sizes, "sizes with one -1 at most, or -1 for both data and fsdp")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes:
        sizes[open_axes[0]] = max(len(devices) // fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"mesh={sizes} must multiply to the {len(devices)} devices of this run; set one of mesh.data, "
            "mesh.fsdp, mesh.tensor to -1"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """How many pieces a global batch is cut into on this mesh."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch(global_batch: int, mesh: Mesh, *, pieces: int = 1, name: str = "config.data.batch_size") -> None:
    """Raise UserError unless `pieces` micro-batches of the global batch divide over the mesh."""
    parts = batch_shards(mesh) * pieces
    check(
        global_batch % parts == 0, name, global_batch,
        f"a multiple of {parts} ({batch_shards(mesh)} batch shards x {pieces} micro-batches)",
        f"set {name} to {max(global_batch // parts, 1) * parts}",
    )
