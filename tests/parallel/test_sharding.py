"""The partition of each parameter, as a table."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from ig_jax.parallel import sharding
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import parameter_spec

W = 128  # a kernel of W x W has 2**14 elements, the fewest that are cut over fsdp

TABLE = [  # name, shape, and its partition on meshes with (fsdp, tensor) = (4, 1), (1, 2), (2, 2)
    ("blocks.0.attn.qkv.kernel", (W, 3 * W), P(None, "fsdp"), P(None, "tensor"), P("fsdp", "tensor")),
    ("blocks.0.attn.proj.kernel", (W, W), P("fsdp", None), P("tensor", None), P("tensor", "fsdp")),
    ("blocks.0.mlp.fc1.kernel", (W, 4 * W), P(None, "fsdp"), P(None, "tensor"), P("fsdp", "tensor")),
    ("blocks.0.mlp.fc2.kernel", (4 * W, W), P("fsdp", None), P("tensor", None), P("tensor", "fsdp")),
    ("blocks.0.modulation.linear.kernel", (W, 6 * W), P(None, "fsdp"), P(None, None), P(None, "fsdp")),
    ("blocks.0.attn.qkv.bias", (3 * W,), P(None), P(None), P(None)),
    ("final_head.linear.kernel", (W, 16), P(None, None), P(None, None), P(None, None)),  # below the smallest
    ("label_embed.table", (1001, W), P(None, "fsdp"), P(None, None), P(None, "fsdp")),  # 1001 rows do not divide
    ("blocks.0.mlp.fc1.kernel", (W + 1, 4 * W + 1), P(None, None), P(None, None), P(None, None)),
]


@pytest.mark.parametrize("name, shape, fsdp, tensor, both", TABLE)
def test_each_parameter_lives_where_the_table_says(name, shape, fsdp, tensor, both):
    for axes, spec in ((dict(fsdp=4), fsdp), (dict(tensor=2), tensor), (dict(fsdp=2, tensor=2), both)):
        assert parameter_spec(name, shape, make_mesh(**axes)) == spec
    assert set(parameter_spec(name, shape, make_mesh())) <= {None}


def test_optimizer_arrays_live_with_their_parameter_and_scalars_everywhere():
    mesh = make_mesh(fsdp=2, tensor=2)
    kernel = jax.ShapeDtypeStruct((W, 3 * W), "float32")
    state = {"mu": {"blocks.0.attn.qkv.kernel": kernel}, "count": jax.ShapeDtypeStruct((), "int32")}
    found = jax.tree.map(lambda where: where.spec, sharding.tree_shardings(state, mesh))
    assert found == {"mu": {"blocks.0.attn.qkv.kernel": P("fsdp", "tensor")}, "count": P()}
    assert sharding.with_shardings(state, mesh)["mu"]["blocks.0.attn.qkv.kernel"].sharding.spec == P("fsdp", "tensor")
