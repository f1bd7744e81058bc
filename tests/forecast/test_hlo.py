"""Costs and collectives read from compiled text, for programs in which they are known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ig_jax.forecast import hlo
from ig_jax.forecast.collectives import Collective, collectives, moved
from ig_jax.forecast.roofline import Cost, costs, estimate
from ig_jax.parallel.hardware import Chip
from ig_jax.parallel.mesh import make_mesh


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_products_are_counted_with_the_trips_of_their_loops():
    x, weights = jnp.ones((8, 32)), jnp.ones((5, 32, 32))
    looped = compiled(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x, weights)
    assert sum(part.flops for part in costs(looped, tokens=1)) == 5 * 2 * 8 * 32 * 32


def test_batched_products_count_every_element():
    a, b = jnp.ones((3, 4, 8, 16)), jnp.ones((3, 4, 16, 8))
    assert sum(part.flops for part in costs(compiled(jnp.matmul, a, b), tokens=1)) == 2 * 3 * 4 * 8 * 16 * 8


def test_traffic_of_an_elementwise_pass_is_what_it_reads_and_writes():
    x = jnp.ones((256, 1024))
    assert sum(part.traffic for part in costs(compiled(lambda x: jnp.tanh(x) * 2, x), tokens=1)) == 2 * x.nbytes


@pytest.mark.parametrize(
    "axes,over", [({"data": 8}, "data"), ({"data": 1, "fsdp": 8}, "fsdp"), ({"data": 4, "fsdp": 2}, "data+fsdp")]
)
def test_a_sum_over_the_batch_is_one_all_reduce_over_its_axes(axes, over):
    mesh = make_mesh(**axes)
    program = compiled(lambda x: jnp.sum(x, axis=0), array(mesh, (64, 100), ("data", "fsdp"), None))
    assert moved(collectives(program, mesh)) == {"all-reduce": {over: 400}}


def test_gathers_are_counted_by_what_comes_out_and_over_one_axis():
    mesh = make_mesh(data=2, fsdp=4)
    whole = NamedSharding(mesh, P())
    function = jax.jit(lambda x: x * 2, out_shardings=whole)
    text = function.lower(array(mesh, (64, 100), "fsdp", None)).compile().as_text()
    found = collectives(hlo.parse(text), mesh)
    assert moved(found) == {"all-gather": {"fsdp": 64 * 100 * 4}}
    assert found[0].members == 4 and found[0].sent == pytest.approx(0.75 * 64 * 100 * 4)


GROUPS = {  # the forms that XLA writes, all of the fsdp axis of a mesh of data 2 x fsdp 4
    "replica_groups={{0,1,2,3},{4,5,6,7}}, x": "fsdp",
    "replica_groups=[2,4]<=[8], x": "fsdp",
    "replica_groups=[4,2]<=[2,4]T(1,0), x": "data",
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x": "fsdp",
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, x": "data",
    "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x": "fsdp",
    "replica_groups={}, x": "data+fsdp",
    "replica_groups=[1,8]<=[8], x": "data+fsdp",
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, x": "fsdp",
}


@pytest.mark.parametrize("attributes", GROUPS)
def test_every_form_of_groups_is_read(attributes):
    kind = "collective-permute" if "pairs" in attributes else "all-reduce"
    text = (
        f"ENTRY %main (p: f32[10]) -> f32[10] {{\n  %p = f32[10]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[10]{{0}} {kind}(%p), channel_id=1, {attributes}\n}}\n"
    )
    assert moved(collectives(hlo.parse(text), make_mesh(data=2, fsdp=4))) == {kind: {GROUPS[attributes]: 40}}


def test_what_a_tpu_sends_to_other_slices_is_an_exchange_of_its_own():
    text = (
        "ENTRY %main (p: f32[10], t: token[]) -> token[] {\n"
        "  %p = f32[10]{0} parameter(0)\n  %t = token[] parameter(1)\n"
        "  %s = (f32[10]{0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, frontend_attributes="
        '{_xla_megascale_target="{0:2,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %d = token[] send-done(%s), channel_id=2\n}\n"
    )
    assert collectives(hlo.parse(text), make_mesh()) == [Collective("all-reduce", "slices", 4, 40, 1)]


LOOP = """
%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %y = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[4]) -> (s32[], f32[4]) {
  %p = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %p)
  ROOT %w = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
}
"""


def test_trips_without_a_note_come_from_limit_and_step():
    program = hlo.parse(LOOP)
    loop = program.computations["main"]["w"]
    assert program.trips(loop) == 5  # 0, 2, 4, 6, 8
    assert moved(collectives(program, make_mesh())) == {"all-reduce": {"data": 5 * 16}}


# As a TPU writes products: a batch of three as a window that steps over it, and a padded, reversed window.
CONVOLUTIONS = {
    "f32[3,8,8]{2,1,0} convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf": (
        (3, 8, 16),
        (3, 16, 8),
        2 * 3 * 8 * 16 * 8,
    ),
    "f32[32,2,48,1]{3,2,1,0} convolution(%a, %b), window={size=2x4 pad=1_1x0_0 rhs_reversal=1x0}, "
    "dim_labels=1fb0_1i0o->b0f1": ((4, 64, 32, 1), (4, 64, 2, 48), 2 * 32 * 2 * 48 * 64 * 4),
}


@pytest.mark.parametrize("line", CONVOLUTIONS)
def test_a_tpus_convolutions_count_what_is_multiplied(line):
    left, right, flops = CONVOLUTIONS[line]
    shown = lambda shape: f"f32[{','.join(map(str, shape))}]"
    text = (
        f"ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{\n  %a = {shown(left)} parameter(0)\n"
        f"  %b = {shown(right)} parameter(1)\n  ROOT %r = {line}\n}}\n"
    )
    assert sum(part.flops for part in costs(hlo.parse(text), tokens=1)) == flops


def test_a_loop_that_its_data_end_counts_once():
    def grow(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x + 1, x)

    program = compiled(grow, jnp.ones((4, 4)))
    loops = [i for _, i, _ in program.runs() if i.opcode == "while"]
    assert [program.trips(loop) for loop in loops] == [1]


def test_arrays_of_a_value_are_read_with_layouts_and_memory_spaces():
    arrays = hlo.arrays_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[7]{0}, token[])")
    assert [a.bytes for a in arrays] == [12, 4, 7, 0]
    assert ["S(1)" in a.layout for a in arrays] == [True, False, False, False]
    assert np.prod(arrays[0].shape) == 6


def test_an_estimate_takes_the_longer_of_products_and_memory_and_adds_what_is_exchanged():
    chip = Chip("toy", (), memory=1, bandwidth=1e9, bfloat16=4e12, float32=1e12, link=1e8)
    parts = [Cost(8e12, 9e8, "bf16"), Cost(1e12, 9e9, "f32"), Cost(0, 9e8, "")]
    exchange = Collective("all-reduce", "data", members=4, bytes=8 * 10**6, times=2)  # sends 2 x 2 x 3/4 x 8 MB
    found = estimate(parts, [exchange], chip)
    assert (found.products, found.memory) == pytest.approx((8 / 4 / 0.8, 10 + 1))
    assert found.exchange == pytest.approx(24e6 / (0.8 * 1e8)) and found.floor == pytest.approx(3)
    assert found.seconds == pytest.approx(2.5 + 11 + 0.3)
    between = dataclasses.replace(exchange, axes="slices")
    assert estimate(parts, [exchange, between], chip).exchange == found.exchange  # over a network that is not known
    chip = dataclasses.replace(chip, network=1e7)
    assert estimate(parts, [exchange, between], chip).exchange == pytest.approx(0.3 + 3)
