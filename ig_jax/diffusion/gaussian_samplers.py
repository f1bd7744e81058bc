"""DiT's samplers: ancestral DDPM and DDIM over a respaced chain.

Their field is `noise_field`, (x, timestep, labels, region) -> (eps, variance output), in place of a velocity. Guidance
is looked up in sigma-time (n + 1) / 1000, the clock in which these betas are the "vp" path.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import check
from ig_jax.diffusion import gaussian
from ig_jax.diffusion.guidance import Network
from ig_jax.diffusion.integration import Field, FixedGrid, Region, Row, option, register


@dataclasses.dataclass(frozen=True)
class _OverChain(FixedGrid):
    """Steps over a respaced chain, from noise to data; the last step adds no noise."""

    order: ClassVar[int] = 1
    chain: ClassVar[bool] = True
    least_steps: ClassVar[int] = 2

    clip: bool = option(False, "Clip the denoised data to [-1, 1] at each step: for pixels, not for latents.")
    spacing: str = option("even", "even (from timestep 0 to 999) or ddim (every k-th timestep).")

    def __post_init__(self):
        check(self.spacing in ("even", "ddim"), "spacing", self.spacing, "even or ddim")

    def rows(self, path, steps):
        """As FixedGrid.rows, for 2..1000 steps.  Raises: UserError for a number of steps that `spacing` cannot have."""
        chain = gaussian.make_chain(path, gaussian.respaced(steps, self.spacing))
        tables = {
            "t": chain.timesteps.astype(np.float64),
            "data_from_x": np.sqrt(1 / chain.alpha_bar),
            "data_from_noise": -np.sqrt(1 / chain.alpha_bar - 1),
        } | self._tables(chain)
        rows = []
        for i in reversed(range(len(chain.timesteps))):
            guided_at = ((chain.timesteps[i] + 1) / gaussian.STEPS,)
            coefficients = {name: float(table[i]) for name, table in tables.items()}
            rows.append(Row(self._step if i else self._last, guided_at, coefficients))
        return rows

    def _tables(self, chain: gaussian.Chain) -> dict[str, np.ndarray]:
        """Further coefficients of each timestep, float64."""
        raise NotImplementedError

    def _next(self, x, predicted, variance, c) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the step, from a predicted noise and the variance output."""
        raise NotImplementedError

    def _step(self, x, fields, c, noise):
        mean, std = self._next(x, *fields[0](x, c.t), c)
        return mean + std * noise if self.stochastic else mean

    def _last(self, x, fields, c, noise):
        return self._next(x, *fields[0](x, c.t), c)[0]

    def _data(self, x: jax.Array, noise: jax.Array, c) -> jax.Array:
        data = self._unclipped(x, noise, c)
        return jnp.clip(data, -1, 1) if self.clip else data

    def _unclipped(self, x: jax.Array, noise: jax.Array, c) -> jax.Array:
        return c.data_from_x * x + c.data_from_noise * noise


@register("ddpm")
@dataclasses.dataclass(frozen=True)
class Ddpm(_OverChain):
    """The mean of the posterior given the denoised data, plus noise of the learned variance."""

    @property
    def stochastic(self) -> bool:
        return True

    def _tables(self, chain):
        low, high = chain.log_variance_low, chain.log_variance_high
        return {"data": chain.data_weight, "x": chain.state_weight, "low": low, "high": high}

    def _next(self, x, predicted, variance, c):
        log_variance = c.low + gaussian.log_variance_above_low(variance, c.high - c.low)
        return c.data * self._data(x, predicted, c) + c.x * x, jnp.exp(0.5 * log_variance)


@register("ddim")
@dataclasses.dataclass(frozen=True)
class Ddim(_OverChain):
    """Denoised data and predicted noise recombined at the next noise level.

    Source: arXiv 2010.02502, equation 12.
    """

    eta: float = option(0.0, "0 adds no noise, 1 as much as ddpm with the variance of the posterior.")

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def _tables(self, chain):
        before, now = chain.alpha_bar_before, chain.alpha_bar
        noise = self.eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
        return {"data": np.sqrt(before), "predicted": np.sqrt(1 - before - noise**2), "noise": noise}

    def _next(self, x, predicted, variance, c):
        data = self._data(x, predicted, c)
        if self.clip:  # the noise that goes with the clipped data: the same, where nothing was clipped
            predicted = predicted + (data - self._unclipped(x, predicted, c)) / c.data_from_noise
        return c.data * data + c.predicted * predicted, c.noise


def in_sigma_time(network: Network) -> Network:
    """A network of timesteps 0..999 as one of sigma-times, the clock of guidance."""
    return lambda x, t, y: network(x, jnp.round(t * gaussian.STEPS - 1), y)


def noise_field(guided: Field) -> Field:
    """field(x (B, H, W, C), timestep, labels, region) -> (eps, variance output) from guided outputs (B, H, W, 2C).

    Guidance moves the noise alone; the variance output is the final head's on the conditional branch.
    """

    def field(x: jax.Array, timestep: jax.Array, labels: jax.Array, region: Region) -> tuple[jax.Array, jax.Array]:
        eps, variance = jnp.split(guided(x, (timestep + 1) / gaussian.STEPS, labels, region), 2, axis=-1)
        return eps, variance

    return field
