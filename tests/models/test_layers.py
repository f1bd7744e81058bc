"""Layers that recompute their intermediates in the backward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ig_jax.models import layers

X = jax.random.normal(jax.random.key(0), (2, 6, 8))
ROW = jax.random.normal(jax.random.key(1), (2, 1, 8))
NORM = layers.RMSNorm(8)


def modulated(x, shift, scale):
    return layers.modulated(NORM, x, shift, scale, jnp.bfloat16)


@pytest.mark.parametrize("function,args", [(layers.gelu, (X,)), (layers.swiglu, (X,)), (modulated, (X, ROW, ROW))])
def test_only_the_arguments_are_kept_for_the_derivative(function, args):
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
    bulky = [leaf.shape for leaf in kept if leaf.size >= X.size]
    assert bulky == [X.shape]


def test_a_norm_with_parameters_learns_through_modulation():
    norm = layers.LayerNorm(8, affine=True)
    graphdef, state = nnx.split(norm)

    def plain(state, x, scale):
        return nnx.merge(graphdef, state)(x) * (1 + scale) + scale

    def ours(state, x, scale):
        return layers.modulated(nnx.merge(graphdef, state), x, scale, scale, jnp.float32)

    direction = jax.random.normal(jax.random.key(2), X.shape)
    got, want = (jax.tree.leaves(jax.vjp(f, state, X, ROW)[1](direction)) for f in (ours, plain))
    assert len(got) == 4  # scale and bias of the norm, x, ROW
    for a, b in zip(got, want):
        assert jnp.abs(a - b).max() < 1e-5 and jnp.abs(b).max() > 0.1


def test_half_precision_is_used_for_storage_only():
    x = X.astype(jnp.bfloat16)
    assert (layers.gelu(x) == jax.nn.gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)).all()
    gate, value = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    assert (layers.swiglu(x) == (jax.nn.silu(gate) * value).astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("norm, epsilon", [("layernorm", 1e-5), ("rmsnorm", 1e-6)])
def test_qk_norms_have_the_published_epsilons(norm, epsilon):
    x = 1e-3 * jnp.array([1.0, -1.0, 1.0, -1.0])  # so small that its variance, 1e-6, does not hide them
    assert float(layers._qk_norm(norm, 4)(x)[0]) == pytest.approx(1e-3 / (1e-6 + epsilon) ** 0.5, rel=1e-4)
