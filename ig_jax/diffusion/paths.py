"""The straight and the cosine path between data (t = 0) and noise (t = 1), and what each prediction says.

x_t = alpha(t) x + sigma(t) eps and its velocity v = alpha'(t) x + sigma'(t) eps. On a fixed path velocity,
score, noise and data are affine in each other given x_t; the conversions here are the only ones in the house.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PATHS = ("linear", "cosine")


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives at t, in the type of t (numpy float64 on the host, jax in a program)."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array


def coefficients(path: str, t) -> Coefficients:
    """The path's coefficients at sigma-times t in [0, 1].

    Source: METHOD "one clock"; linear alpha = 1 - t, cosine (GVP) alpha = cos(pi t / 2).
    """
    xp = jnp if isinstance(t, jax.Array) else np
    if path == "linear":
        one = xp.ones_like(t)
        return Coefficients(1 - t, t, -one, one)
    angle = t * (np.pi / 2)
    cos, sin = xp.cos(angle), xp.sin(angle)
    return Coefficients(cos, sin, -np.pi / 2 * sin, np.pi / 2 * cos)


def over_latents(t: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to multiply latents."""
    return t[:, None, None, None]


def interpolate(path: str, x: jax.Array, eps: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, v_target), each [B, H, W, C] float32, for latents x, noise eps and times t [B]."""
    c = coefficients(path, over_latents(t))
    return c.alpha * x + c.sigma * eps, c.d_alpha * x + c.d_sigma * eps


def data_from_velocity(path: str, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """D = E[x | x_t] [B, H, W, C] from the velocity at times t [B]."""
    c = coefficients(path, over_latents(t))
    return (c.d_sigma * x_t - c.sigma * v) / (c.d_sigma * c.alpha - c.d_alpha * c.sigma)


def velocity_from_data(path: str, data: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The velocity [B, H, W, C] that the denoised data stand for, at times t [B] > 0."""
    c = coefficients(path, over_latents(t))
    return c.d_alpha * data + c.d_sigma * (x_t - c.alpha * data) / c.sigma


def score_weights(path: str, t) -> tuple:
    """(a, b) of score = a v + b x_t at t in (0, 1], in the type of t.

    Source: score from velocity, (alpha/alpha' v - x) / (sigma^2 - alpha/alpha' sigma' sigma), multiplied out.
    """
    c = coefficients(path, t)
    scale = 1 / (c.sigma * (c.d_alpha * c.sigma - c.alpha * c.d_sigma))
    return c.alpha * scale, -c.d_alpha * scale


def data_end(path: str) -> float:
    """The sigma-time at which sampling ends: 0, but where the velocity is infinite there (the VP path).

    Source: willisma/SiT transport (sample_eps).
    """
    return 1e-3 if path == "vp" else 0.0
