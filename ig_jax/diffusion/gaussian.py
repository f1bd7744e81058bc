"""DiT's discrete Gaussian process: a chain of 1000 small noising steps, with learned-range variance.

x_n = sqrt(abar_n) x + sqrt(1 - abar_n) eps for timesteps n = 0..999; the network takes n as it is, predicts
eps, and says with its variance output where log variance lies between the posterior's and beta's.
Source: facebookresearch/DiT diffusion/gaussian_diffusion.py and respace.py (after improved-diffusion).
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion.paths import over_latents
from ig_jax.errors import UserError, check
from ig_jax.models.dit import DiTOutput

STEPS = 1000
BETAS = np.linspace(1e-4, 0.02, STEPS)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A process that visits some of the timesteps; every table is float64 [S], in the order of noising."""

    timesteps: np.ndarray  # int, what the network is told
    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_before: np.ndarray  # of the step nearer to the data
    data_weight: np.ndarray  # mean of q(x_before | x_n, x) = data_weight x + state_weight x_n
    state_weight: np.ndarray
    log_variance_low: np.ndarray  # of that posterior, its first entry (minus infinity) replaced by the second
    log_variance_high: np.ndarray  # log beta


def make_chain(timesteps: np.ndarray) -> Chain:
    """The chain through the given timesteps, increasing; its betas skip over those left out."""
    alpha_bar = np.cumprod(1 - BETAS)[timesteps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variance = betas * (1 - before) / (1 - alpha_bar)
    return Chain(
        timesteps=timesteps, betas=betas, alpha_bar=alpha_bar, alpha_bar_before=before,
        data_weight=betas * np.sqrt(before) / (1 - alpha_bar),
        state_weight=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
        log_variance_low=np.log(np.append(variance[1], variance[1:])),
        log_variance_high=np.log(betas),
    )


def respaced(spacing: str) -> np.ndarray:
    """Timesteps to visit, int and increasing: "250", "10,15,20" for sections of equal length, or "ddim50".

    Numbers spread each section's steps evenly from its first to its last timestep; "ddimN" takes every k-th
    from 0.  Raises: UserError for a spacing that cannot be had.  Source: facebookresearch/DiT respace.py.
    """
    try:
        counts = [int(part) for part in spacing.removeprefix("ddim").split(",")]
    except ValueError:
        raise UserError(f"respacing={spacing!r} must be numbers such as 250 or 10,15,20, or ddim50") from None
    if spacing.startswith("ddim"):
        strides = [k for k in range(1, STEPS) if [-(-STEPS // k)] == counts]
        check(bool(strides), "respacing", spacing,
              f"ddimN with N the length of range(0, {STEPS}, k) for some whole number k")
        return np.arange(0, STEPS, strides[0])
    sizes = [STEPS // len(counts) + (i < STEPS % len(counts)) for i in range(len(counts))]
    fits = all(1 <= count <= size for count, size in zip(counts, sizes))
    check(fits and sum(counts) > 1, "respacing", spacing,
          f"2 or more steps, at least 1 and at most {sizes[-1]} in each of {len(counts)} section(s)")
    starts = np.append(0, np.cumsum(sizes)[:-1])
    return np.concatenate([start + _spread(size, count) for start, size, count in zip(starts, sizes, counts)])


def _spread(size: int, count: int) -> np.ndarray:
    """`count` of 0..size-1, the first and the last among them; added up as published, to round alike."""
    stride = 1.0 if count == 1 else (size - 1) / (count - 1)
    return np.array([round(place) for place in itertools.accumulate([stride] * (count - 1), initial=0.0)])


FULL = make_chain(np.arange(STEPS))


def _at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """Entries of a table of FULL at timesteps t [B] float32, to multiply latents: [B, 1, 1, 1] float32."""
    return over_latents(jnp.asarray(table, jnp.float32)[t.astype(jnp.int32)])


def noised(x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t [B, H, W, C] float32 at timesteps t [B] in 0..999."""
    return _at(np.sqrt(FULL.alpha_bar), t) * x + _at(np.sqrt(1 - FULL.alpha_bar), t) * eps


def split(out: DiTOutput) -> tuple[DiTOutput, DiTOutput]:
    """(noise predictions, variance outputs), each [B, H, W, C], of heads [B, H, W, 2C]."""
    half = lambda i: jax.tree.map(lambda head: jnp.split(head, 2, axis=-1)[i], out)  # noqa: E731
    return half(0), half(1)


def log_variance_above_low(variance: jax.Array, low, high) -> jax.Array:
    """How far log variance lies above `low`: the variance output's -1 is `low` and its 1 is `high`."""
    return (variance + 1) / 2 * (high - low)


def variational_bound(
    noise: jax.Array, variance: jax.Array, x: jax.Array, eps: jax.Array, t: jax.Array
) -> jax.Array:
    """The bound's term at timesteps t [B] in bits per dimension, [B] float32; only `variance` has a gradient.

    KL between posterior and model, or at t = 0 the model's discretised log-likelihood of x in 256 levels.
    """
    # The two means differ by data_weight (x - x_hat), and x - x_hat = sigma/alpha (eps_hat - eps); at t = 0
    # the posterior is x itself. Written so, nothing large cancels.
    shift = _at(FULL.data_weight * np.sqrt(1 / FULL.alpha_bar - 1), t) * (jax.lax.stop_gradient(noise) - eps)
    low = _at(FULL.log_variance_low, t)
    above = log_variance_above_low(variance, low, _at(FULL.log_variance_high, t))
    divergence = 0.5 * (above + jnp.expm1(-above) + shift * shift * jnp.exp(-low - above))
    likelihood = _discretised_log_likelihood(x, shift, 0.5 * (low + above))
    nats = jnp.where(over_latents(t) == 0, -likelihood, divergence)
    return jnp.mean(nats, axis=(1, 2, 3)) / math.log(2)


def _discretised_log_likelihood(x: jax.Array, centred: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log of a normal's mass within 1/255 of x, for x - mean = centred; open beyond -1 and 1."""
    upper = _normal_cdf(jnp.exp(-log_scale) * (centred + 1 / 255))
    lower = _normal_cdf(jnp.exp(-log_scale) * (centred - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The tanh approximation of the published loss."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
