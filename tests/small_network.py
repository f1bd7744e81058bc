"""A network small enough to write twice: in jax float32 for the library, in numpy float64 for the oracles."""

import jax.numpy as jnp
import numpy as np

from ig_jax.models.dit import DiTOutput

SHAPE, CLASSES = (4, 4, 4), 10
_SIZE = int(np.prod(SHAPE))
_rng = np.random.default_rng(7)
_W = {name: _rng.normal(size=(_SIZE, _SIZE)) / np.sqrt(_SIZE) for name in ("final", "inter", "deep", "weak")}
_T = {name: _rng.normal(size=_SIZE) for name in _W}
_Y = {name: 0.5 * _rng.normal(size=(CLASSES + 1, _SIZE)) for name in _W}


def _head(xp, name, x, t, y):
    flat = x.reshape(x.shape[0], -1)
    w, time, label = (xp.asarray(table[name], flat.dtype) for table in (_W, _T, _Y))
    return (xp.tanh(flat @ w + t[:, None] * time + label[y]) + 0.5 * flat).reshape(x.shape)


def network(x, t, y):
    """DiTOutput with one intermediate head, float32."""
    return DiTOutput(_head(jnp, "final", x, t, y), (_head(jnp, "inter", x, t, y),))


def two_heads(x, t, y):
    """DiTOutput with two intermediate heads."""
    return DiTOutput(_head(jnp, "final", x, t, y), (_head(jnp, "inter", x, t, y), _head(jnp, "deep", x, t, y)))


def weak_network(x, t, y):
    """Another network."""
    return DiTOutput(_head(jnp, "weak", x, t, y), ())


def oracle(name, x, t, y):
    """One head's velocity in float64 at the scalar time t for labels y [B]."""
    return _head(np, name, np.asarray(x, np.float64), np.full(len(x), t, np.float64), np.asarray(y))
