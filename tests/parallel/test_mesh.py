"""Meshes over the eight devices of the tests, and the batches that fit them."""

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


def test_a_batch_divides_over_its_shards_and_micro_batches():
    mesh = make_mesh(fsdp=4, tensor=2, data=1)  # four batch shards
    check_batch(8, mesh, pieces=2)
    with refused("config.data.batch_size", 12, expected="a multiple of 8", fix="to 8"):
        check_batch(12, mesh, pieces=2)
    with refused("--batch", 3, expected="a multiple of 4", fix="set --batch to 4"):
        check_batch(3, mesh, name="--batch")
