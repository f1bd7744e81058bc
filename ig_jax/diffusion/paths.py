"""The paths between data (t = 0) and noise (t = 1), and the conversions between predictions.

x_t = alpha(t) x + sigma(t) eps and its velocity v = alpha'(t) x + sigma'(t) eps. Velocity, noise, data and
score are each a combination of x and eps, so given x_t any of them is affine in any other: `conversion` is
the only place where that is worked out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import check

PATHS = ("linear", "cosine", "vp")
QUANTITIES = ("velocity", "noise", "data", "score")
VP_BETA = (0.1, 20.0)  # at t = 0 and t = 1, growing linearly; SiT's and DDPM's values


class Coefficients(NamedTuple):
    """alpha, sigma and derivatives at t, in the type of t (numpy float64 on the host, jax in a program)."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array


def coefficients(path: str, t, to_noise=None) -> Coefficients:
    """The path's coefficients at sigma-times t in [0, 1]; on "vp" sigma' is infinite at t = 0.

    `to_noise` is 1 - t, from which alpha follows where it is small, for a caller that knows it better than by rounding.
    Raises: UserError for an unknown path. Source: linear alpha = 1 - t; cosine (GVP) alpha = cos(pi t / 2);
    vp log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2, willisma/SiT transport/path.py with its clock turned round.
    """
    check(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
    xp = jnp if isinstance(t, jax.Array) else np
    to_noise = 1 - t if to_noise is None else to_noise
    if path == "linear":
        one = xp.ones_like(t)
        return Coefficients(to_noise, t, -one, one)
    if path == "cosine":
        cos, sin = xp.sin(to_noise * (np.pi / 2)), xp.sin(t * (np.pi / 2))
        return Coefficients(cos, sin, -np.pi / 2 * sin, np.pi / 2 * cos)
    first, last = VP_BETA
    log_alpha = -0.25 * t * t * (last - first) - 0.5 * t * first
    alpha = xp.exp(log_alpha)
    sigma = xp.sqrt(-xp.expm1(2 * log_alpha))  # sqrt(1 - alpha^2) without its cancellation at small t
    d_alpha = -0.5 * alpha * (first + t * (last - first))
    with np.errstate(divide="ignore"):
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def over_latents(t: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, 1, 1), to multiply latents."""
    return t[:, None, None, None]


def interpolate(path: str, x: jax.Array, eps: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, v_target), each (B, H, W, C) float32, for latents x, noise eps and times t (B,)."""
    c = coefficients(path, over_latents(t))
    return c.alpha * x + c.sigma * eps, c.d_alpha * x + c.d_sigma * eps


def conversion(path: str, source: str, target: str, t, to_noise=None) -> tuple:
    """(a, b) with target = a x_t + b source for two of QUANTITIES at sigma-times t (and 1 - t), in the type of t.

    Finite wherever the source determines the target: noise does not determine the data where alpha = 0 (t = 1, except
    on "vp"), nor data the noise at t = 0; a score, and on "vp" a velocity, is infinite at t = 0.
    """
    c = coefficients(path, t, to_noise)
    scale, p, q = _combination(path, source, c)
    target_scale, target_p, target_q = _combination(path, target, c)
    # Solve (x_t, scale * source) = [[alpha, sigma], [p, q]] (x, eps), and put the target together from both.
    determinant = c.alpha * q - c.sigma * p
    a = (target_p * q - target_q * p) / (determinant * target_scale)
    b = (c.alpha * target_q - c.sigma * target_p) * scale / (determinant * target_scale)
    return a, b


def _combination(path: str, quantity: str, c: Coefficients) -> tuple:
    """(scale, p, q) with scale * quantity = p x + q eps, all three finite on the whole of [0, 1]."""
    if quantity == "velocity":
        if path == "vp":  # sigma sigma' = -alpha alpha' stays finite where sigma' does not
            return c.sigma, c.d_alpha * c.sigma, -c.alpha * c.d_alpha
        return 1, c.d_alpha, c.d_sigma
    if quantity == "score":
        return c.sigma, 0, -1
    return (1, 0, 1) if quantity == "noise" else (1, 1, 0)


def convert(path: str, source: str, target: str, value: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The target (B, H, W, C) of a source `value` at x_t and t (B,); see `conversion`."""
    a, b = conversion(path, source, target, over_latents(t))
    return a * x_t + b * value


def data_end(path: str) -> float:
    """The sigma-time at which sampling ends: 0, unless the velocity is infinite there (VP).

    Source: willisma/SiT transport (sample_eps).
    """
    return 1e-3 if path == "vp" else 0.0
