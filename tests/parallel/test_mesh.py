"""Meshes over the eight devices of the tests, and the batches that fit them."""

import dataclasses

import pytest
from refusal import refused

from ig_jax.parallel.mesh import AXES, batch_shards, check_batch, make_mesh


@pytest.mark.parametrize(
    "axes, sizes",
    [
        ({}, (8, 1, 1)),
        (dict(fsdp=4), (2, 4, 1)),
        (dict(tensor=2), (4, 1, 2)),
        (dict(data=2, fsdp=-1), (2, 4, 1)),
        (dict(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (dict(fsdp_up_to=8), (1, 8, 1)),
        (dict(fsdp_up_to=3), (4, 2, 1)),  # the largest divisor of 8 up to 3
        (dict(tensor=4, fsdp_up_to=8), (1, 2, 4)),
        (dict(fsdp=2, fsdp_up_to=8), (4, 2, 1)),  # fsdp by name wins
    ],
)
def test_one_axis_takes_what_the_others_leave(axes, sizes):
    mesh = make_mesh(**axes)
    assert tuple(mesh.shape[axis] for axis in AXES) == sizes
    assert batch_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    "axes, name",
    [
        (dict(data=0), "mesh.data"),
        (dict(tensor=-2), "mesh.tensor"),
        (dict(fsdp_up_to=0), "mesh.fsdp_up_to"),
        (dict(data=-1, fsdp=-1), "mesh"),
        (dict(data=3), "mesh"),
    ],
)
def test_impossible_meshes_are_refused(axes, name):
    with refused(name):
        make_mesh(**axes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of one of several slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices(mesh):
    return [{device.slice_index for device in row.flat} for row in mesh.devices]


def test_only_the_data_axis_leaves_a_slice():
    chips = [Chip(i, i % 2) for i in range(16)]  # in turns: the order in which JAX lists them means nothing
    mesh = make_mesh(fsdp_up_to=16, devices=chips)
    assert mesh.devices.shape == (2, 8, 1) and slices(mesh) == [{0}, {1}]
    assert slices(make_mesh(data=4, fsdp=2, tensor=2, devices=chips)) == [{0}, {0}, {1}, {1}]
    assert slices(make_mesh(fsdp=16, devices=chips)) == [{0, 1}]  # asked for, and larger than a slice
    assert make_mesh(dcn_data=4, fsdp_up_to=16).devices.shape == (4, 2, 1)
    with refused("mesh.dcn_data", 3):
        make_mesh(dcn_data=3)
    with refused("mesh.data", 1, expected="a multiple of the 2 slices"):
        make_mesh(dcn_data=2, fsdp=16, devices=chips)


def test_a_batch_divides_over_its_shards_and_micro_batches():
    mesh = make_mesh(fsdp=4, tensor=2, data=1)  # four batch shards
    check_batch(8, mesh, pieces=2)
    with refused("config.data.batch_size", 12, expected="a multiple of 8", fix="to 8"):
        check_batch(12, mesh, pieces=2)
    with refused("--batch", 3, expected="a multiple of 4", fix="set --batch to 4"):
        check_batch(3, mesh, name="--batch")
