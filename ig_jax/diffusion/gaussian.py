"""DiT's discrete Gaussian process: a chain of 1000 small noising steps, with learned-range variance.

x_n = sqrt(abar_n) x + sqrt(1 - abar_n) eps for timesteps n = 0..999; the network takes n as it is and predicts eps; its
variance output places the log variance between that of the posterior and that of beta.
Source: facebookresearch/DiT diffusion/gaussian_diffusion.py and respace.py (after improved-diffusion).
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import check
from ig_jax.diffusion.paths import over_latents
from ig_jax.models.dit import DiTOutput

STEPS = 1000
LEAST_MASS = 1e-12  # below it the likelihood of a pixel has no gradient, as in the published loss
SERIES = [(-1) ** n / math.factorial(n) for n in range(2, 13)]  # of (exp(-a) - 1 + a) / a^2


def _squared_cosine() -> np.ndarray:
    """Betas of abar = cos^2, at most 0.999.  Source: arXiv 2102.09672, equation 17."""
    alpha_bar = np.cos((np.linspace(0, 1, STEPS + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {"gaussian": np.linspace(1e-4, 0.02, STEPS), "gaussian_cosine": _squared_cosine()}  # by kind of process


@dataclasses.dataclass(frozen=True)
class Chain:
    """A process over some of the timesteps; every table is float64 (S,), in the order of noising."""

    timesteps: np.ndarray  # int, as the network takes them
    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_before: np.ndarray  # of the step nearer to the data
    data_weight: np.ndarray  # mean of q(x_before | x_n, x) = data_weight x + state_weight x_n
    state_weight: np.ndarray
    log_variance_low: np.ndarray  # of that posterior, its first entry (minus infinity) replaced by the second
    log_variance_high: np.ndarray  # log beta

    def at(self, table: np.ndarray, t: jax.Array) -> jax.Array:
        """Entries of a table of a full chain at timesteps t (B,) float32, to multiply latents: (B, 1, 1, 1)."""
        return over_latents(jnp.asarray(table, jnp.float32)[t.astype(jnp.int32)])

    def noised(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t (B, H, W, C) float32 at timesteps t (B,) in 0..999."""
        return self.at(np.sqrt(self.alpha_bar), t) * x + self.at(np.sqrt(1 - self.alpha_bar), t) * eps

    def variational_bound(
        self, noise: jax.Array, variance: jax.Array, x: jax.Array, eps: jax.Array, t: jax.Array
    ) -> jax.Array:
        """The bound's term at timesteps t (B,) in bits per dimension, (B,) float32; only `variance` has a gradient.

        KL between posterior and model, or at t = 0 the model's discretised log-likelihood of x in 256 levels.
        """
        # The two means differ by data_weight (x - x_hat), and x - x_hat = sigma/alpha (eps_hat - eps); at t = 0 the
        # posterior is x itself. With standard deviations as the unit, nothing large cancels.
        low, unit = self.log_variance_low, np.exp(-0.5 * self.log_variance_low)
        shift = self.at(self.data_weight * np.sqrt(1 / self.alpha_bar - 1) * unit, t)
        shift = shift * (jax.lax.stop_gradient(noise) - eps)
        above = log_variance_above_low(variance, self.at(self.log_variance_high - low, t))
        divergence = 0.5 * (_excess(above) + shift * shift * jnp.exp(-above))
        scale = jnp.exp(-0.5 * above)
        likelihood = _discretised_log_likelihood(x, shift * scale, unit[0] / 255 * scale)
        nats = jnp.where(over_latents(t) == 0, -likelihood, divergence)
        return jnp.mean(nats, axis=(1, 2, 3)) / math.log(2)


def make_chain(kind: str, timesteps: np.ndarray) -> Chain:
    """The chain through the given timesteps, increasing; its betas skip over those left out."""
    alpha_bar = np.cumprod(1 - BETAS[kind])[timesteps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variance = betas * (1 - before) / (1 - alpha_bar)
    return Chain(
        timesteps=timesteps,
        betas=betas,
        alpha_bar=alpha_bar,
        alpha_bar_before=before,
        data_weight=betas * np.sqrt(before) / (1 - alpha_bar),
        state_weight=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
        log_variance_low=np.log(np.append(variance[1], variance[1:])),
        log_variance_high=np.log(betas),
    )


FULL = {kind: make_chain(kind, np.arange(STEPS)) for kind in BETAS}


def respaced(steps: int, spacing: str) -> np.ndarray:
    """`steps` increasing timesteps, int: "even", from the first to the last, or "ddim", every k-th from 0.

    Raises: UserError for an impossible number of steps.  Source: facebookresearch/DiT respace.py.
    """
    if spacing == "ddim":
        strides = [k for k in range(1, STEPS) if -(-STEPS // k) == steps]
        check(bool(strides), "steps", steps, f"the length of range(0, {STEPS}, k) for a whole number k")
        return np.arange(0, STEPS, strides[0])
    check(2 <= steps <= STEPS, "steps", steps, f"in 2..{STEPS}")
    places = itertools.accumulate([(STEPS - 1) / (steps - 1)] * (steps - 1), initial=0.0)
    return np.array([round(place) for place in places])  # added up as published, to round alike


def split(out: DiTOutput) -> tuple[DiTOutput, DiTOutput]:
    """(noise predictions, variance outputs), each (B, H, W, C), of heads (B, H, W, 2C)."""
    half = lambda i: jax.tree.map(lambda head: jnp.split(head, 2, axis=-1)[i], out)
    return half(0), half(1)


def log_variance_above_low(variance: jax.Array, span) -> jax.Array:
    """Log variance minus its lower end: -1 of the variance output is that end and 1 is `span` above it."""
    return (variance + 1) / 2 * span


def _excess(a: jax.Array) -> jax.Array:
    """exp(-a) - 1 + a; near 0, where it and its slope are differences of near-equal numbers, by its series."""
    near = jnp.abs(a) < 1
    series = jnp.polyval(jnp.asarray(SERIES[::-1]), jnp.where(near, a, 0.0))
    return jnp.where(near, a * a * series, a + jnp.expm1(-a))


def _discretised_log_likelihood(x: jax.Array, centred: jax.Array, half: jax.Array) -> jax.Array:
    """log of a normal's mass within `half` of x, for x - mean = centred, both in standard deviations; the first and the
    last level are open.

    The published distribution function is sigmoid(a), the tanh approximation of the normal one. With a and b for the
    upper and the lower end, log(sigmoid(a) - sigmoid(b)) = log(1 - exp(b - a)) + log(sigmoid(a)) + log(1 - sigmoid(b)).
    """
    slope, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    argument = lambda u: slope * (u + cubic * u**3)
    width = 2 * slope * half * (1 + cubic * (3 * centred * centred + half * half))  # a - b, multiplied out
    below_upper, above_lower = -jax.nn.softplus(-argument(centred + half)), -jax.nn.softplus(argument(centred - half))
    within = jnp.log(-jnp.expm1(-width)) + below_upper + above_lower
    log_mass = jnp.where(x < -0.999, below_upper, jnp.where(x > 0.999, above_lower, within))
    return jnp.maximum(log_mass, math.log(LEAST_MASS))
