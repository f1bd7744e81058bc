"""Log-densities: of a Gaussian with a known answer, and the divergence of a network against its Jacobian."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from ig_jax.diffusion.solvers import SOLVERS
from ig_jax.generation import likelihood
from ig_jax.models import dit

SHAPE, SIZE = (1, 3, 1), 3
COVARIANCE = jnp.array([[1.0, 0.6, -0.3], [0.6, 0.8, 0.2], [-0.3, 0.2, 0.5]])
MEAN = jnp.array([0.5, -1.0, 0.2])


def gaussian_velocity(x, t, labels, region):
    """E[eps - data | x_t = x] on the linear path, for data from N(MEAN, COVARIANCE)."""
    centred = x.reshape(len(x), SIZE) - (1 - t) * MEAN
    solved = jnp.linalg.solve((1 - t) ** 2 * COVARIANCE + t**2 * jnp.eye(SIZE), centred.T).T
    return (t * solved - MEAN - (1 - t) * solved @ COVARIANCE).reshape(x.shape)


@pytest.mark.parametrize("probes", [0, 4000])
def test_the_density_of_a_gaussian(probes):
    x = jax.random.multivariate_normal(jax.random.key(0), MEAN, COVARIANCE, (5,)).reshape(5, *SHAPE)
    draws = jax.random.rademacher(jax.random.key(1), (max(probes, 1), 5, *SHAPE), jnp.float32)
    unit = lambda number: jnp.eye(SIZE)[number].reshape(SHAPE)
    signs = lambda number: draws[number] / probes**0.5
    count, probe = (probes, signs) if probes else (SIZE, unit)
    nats, _ = likelihood.log_density(
        gaussian_velocity, x, jnp.zeros(5, int), count, probe, solver=SOLVERS["trapezoid"](), path="linear", steps=120
    )
    wanted = jax.scipy.stats.multivariate_normal.logpdf(x.reshape(5, SIZE), MEAN, COVARIANCE)
    np.testing.assert_allclose(nats, wanted, atol=0.1 if probes else 0.005)


def test_the_divergence_of_a_network_is_the_trace_of_its_jacobian():
    small = dataclasses.replace(toy.MODEL, input_size=4, patch_size=2, depth=1, inter_depth=())
    params, size, y = toy.params(small), 16, jnp.array([3, 7])
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 1))
    field = lambda x: dit.apply(small, params, x, jnp.full(2, 0.4), y).final
    unit = lambda number: (jnp.arange(size) == number).astype(jnp.float32).reshape(4, 4, 1)
    value, found = jax.jit(lambda x: likelihood.divergence(field, x, size, unit))(x)
    np.testing.assert_allclose(value, field(x), atol=1e-5)
    jacobian = jax.jit(jax.jacfwd(field))(x).reshape(2, size, 2, size)
    wanted = [jnp.trace(jacobian[i, :, i]) for i in range(2)]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
