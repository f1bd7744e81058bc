"""Stacking and unstacking, and the compile time that they save."""

import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.models import dit, zoo
from ig_jax.models.stacking import stacked, unstacked

CALLS = itertools.count()


def test_unstacked_undoes_stacked_and_passes_gradients():
    trees = [{"a": jnp.full((2, 3), float(i)), "b": jnp.arange(4.0) - i} for i in range(3)]
    for tree, back in zip(trees, jax.jit(lambda t: unstacked(stacked(t)))(trees)):
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), tree, back))
    weight = jnp.arange(18.0).reshape(3, 2, 3) - 7
    gradients = jax.jit(jax.grad(lambda t: jnp.sum(weight * stacked(t)["a"])))(trees)
    for gradient, want in zip(gradients, weight):
        np.testing.assert_array_equal(gradient["a"], want)


def compiled_gradient(depth, scan, width=32, num_heads=2):
    """The compiled gradient of a SiT, narrow by default, and the CPU seconds that compiling took."""
    sizes = dict(depth=depth, width=width, num_heads=num_heads, mlp_ratio=4.0, inter_depth=(2,))
    config = dit.DiTConfig(
        **zoo.FAMILIES["sit"],
        **sizes,
        input_size=8,
        channels=1,
        patch_size=2,
        num_classes=10,
        dtype="float32",
        scan_blocks=scan,
        remat="none",
    )
    array = jax.ShapeDtypeStruct
    x, t, y = array((4, 8, 8, 1), "float32"), array((4,), "float32"), array((4,), "int32")

    def loss(params, *args):
        out = dit.apply(config, params, *args)
        return jnp.mean(out.final**2) + jnp.mean(out.intermediate[0] ** 2)

    gradient = jax.grad(loss)
    gradient.__name__ = f"gradient_{next(CALLS)}"  # another program, which no cache holds
    lowered = jax.jit(gradient).lower(dit.shapes(config), x, t, y)
    began = time.process_time()
    return lowered.compile(), time.process_time() - began


def test_a_scan_over_28_blocks_compiles_in_twice_the_time_of_4():
    compiled_gradient(4, True)  # what the first compilation of a process costs belongs to neither
    # Measured 1.6, in CPU time; tried again, because neighbours on the same core or cache can slow one of the two.
    assert any(compiled_gradient(28, True)[1] < 2 * compiled_gradient(4, True)[1] for _ in range(3))


def test_unrolled_xl_compiles_within_15_seconds_on_2_cores():
    seconds = compiled_gradient(scan=False, **zoo.SIZES["XL"])[1]
    assert seconds < 2 * 15  # of both cores; measured 4


def test_unrolled_blocks_do_not_grow_with_their_number():
    text = compiled_gradient(12, False)[0].as_text()
    fused = [line for line in text.splitlines() if line.startswith("%fused_computation")]
    operands = [len(re.findall(r"param_", line)) for line in fused]
    assert max(operands) < 20  # as one function: two more for each block
