"""Forward mode through the network, and linear maps with a transpose of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toy

from ig_jax.models import dit
from ig_jax.models.derivatives import linear

FORMS = [{}, {"scan_blocks": True}, {"remat": "dots"}, {"attention": "xla", "remat": "full"}]


def relative(got, want):
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    return float(norm(jax.tree.map(jnp.subtract, got, want)) / norm(want))


@pytest.fixture(scope="module")
def inputs():
    batch = toy.batch(4)
    return toy.params(), batch["latent"], jnp.linspace(0.2, 0.8, 4), batch["label"]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_mode_is_the_finite_difference_and_the_transpose_of_reverse_mode(inputs, form):
    config, (params, x, t, y) = dataclasses.replace(toy.MODEL, **form), inputs
    f = jax.jit(lambda x, t: dit.apply(config, params, x, t, y).final)
    along, step = (jax.random.normal(jax.random.key(1), x.shape), jnp.ones(4)), 1e-2
    derivative = jax.jit(lambda: jax.jvp(f, (x, t), along)[1])()
    ahead, behind = (f(*(a + sign * step * d for a, d in zip((x, t), along))) for sign in (1, -1))
    assert relative((ahead - behind) / (2 * step), derivative) < 1e-3
    down = jax.random.normal(jax.random.key(2), x.shape)
    pulled = jax.jit(lambda: jax.vjp(f, x, t)[1](down))()
    inner = sum(jnp.vdot(a, b) for a, b in zip(pulled, along))
    assert jnp.allclose(jnp.vdot(down, derivative), inner, rtol=1e-4)


def test_the_derivative_of_a_gradient_is_the_gradient_of_a_derivative(inputs):
    params, x, t, y = inputs
    loss = lambda params: jnp.mean(dit.apply(toy.MODEL, params, x, t, y).final ** 2)
    along = jax.tree.map(lambda a: jax.random.normal(jax.random.key(3), a.shape), params)
    forward_over_reverse = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (along,))[1])(params)
    reverse_over_forward = jax.jit(jax.grad(lambda p: jax.jvp(loss, (p,), (along,))[1]))(params)
    assert relative(forward_over_reverse, reverse_over_forward) < 1e-5


def test_the_divergence_of_a_small_network_is_exact(inputs):
    params, x, t, y = inputs
    f = lambda x: dit.apply(toy.MODEL, params, x.reshape(1, 8, 8, 1), t[:1], y[:1]).final.ravel()
    divergence = jax.jit(lambda x: jnp.trace(jax.jacfwd(f)(x)))(x[0].ravel())
    reverse = jax.jit(lambda x: jnp.trace(jax.jacrev(f)(x)))(x[0].ravel())
    assert jnp.allclose(divergence, reverse, rtol=1e-4)


def test_a_linear_map_is_transposed_as_it_says_and_batched():
    twice = lambda a, x: linear(lambda a, x: (a * x,), lambda a, g: (10 * a * g,), (a,), (x,))[0]
    a, x = jnp.arange(1.0, 4), jnp.ones(3)
    assert (jax.jvp(lambda x: twice(a, x), (x,), (x,))[1] == a).all()
    assert (jax.grad(lambda x: twice(a, x).sum())(x) == 10 * a).all()
    assert (jax.vmap(jax.grad(lambda x, a: twice(a, x)), (None, 0))(1.0, a) == 10 * a).all()
    assert (jax.grad(lambda x: jax.vmap(twice, (0, None))(a, x).sum())(1.0) == 60).all()
