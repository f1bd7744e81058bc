"""DiT's samplers: ancestral DDPM and DDIM over a respaced chain, under the contract of samplers.Solver.

Their field is `noise_field`, (x, timestep, region) -> (eps, variance output), in place of a velocity. Guidance
lives in sigma-time (n + 1) / 1000, the clock in which these betas are the "vp" path.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import gaussian
from ig_jax.diffusion.guidance import Network, Region
from ig_jax.diffusion.samplers import Row
from ig_jax.errors import check


@dataclasses.dataclass(frozen=True)
class _OverChain:
    """Rows over a respaced chain, from noise to data; the last step adds no noise."""

    clip: bool = False  # denoised data to [-1, 1] at each step: for pixels, not for latents
    spacing: str = "even"  # "even" spreads the steps from timestep 0 to 999, "ddim" takes every k-th

    def __post_init__(self):
        check(self.spacing in ("even", "ddim"), "spacing", self.spacing, "even or ddim")

    def rows(self, path: str, steps: int) -> list[Row]:
        """`steps` of 2..1000; `path` is "gaussian".  Raises: UserError for a spacing that cannot be had."""
        prefix = "ddim" if self.spacing == "ddim" else ""
        chain = gaussian.make_chain(gaussian.respaced(f"{prefix}{steps}"))
        tables = {
            "t": chain.timesteps.astype(np.float64),
            "data_from_x": np.sqrt(1 / chain.alpha_bar), "data_from_noise": -np.sqrt(1 / chain.alpha_bar - 1),
        } | self._tables(chain)
        return [
            Row("last" if i == 0 else "step", ((chain.timesteps[i] + 1) / gaussian.STEPS,),
                {name: float(table[i]) for name, table in tables.items()})
            for i in reversed(range(len(chain.timesteps)))
        ]

    def start(self, x):
        return x

    def finish(self, state):
        return state

    def _data(self, x: jax.Array, noise: jax.Array, scalars: dict[str, jax.Array]) -> jax.Array:
        data = scalars["data_from_x"] * x + scalars["data_from_noise"] * noise
        return jnp.clip(data, -1, 1) if self.clip else data


@dataclasses.dataclass(frozen=True)
class Ddpm(_OverChain):
    """The mean of the posterior given the denoised data, plus noise of the learned variance."""

    stochastic: ClassVar[bool] = True

    def _tables(self, chain: gaussian.Chain) -> dict[str, np.ndarray]:
        return {"data": chain.data_weight, "x": chain.state_weight,
                "low": chain.log_variance_low, "high": chain.log_variance_high}

    def advance(self, kind, fields, state, scalars, noise):
        predicted, variance = fields[0](state, scalars["t"])
        mean = scalars["data"] * self._data(state, predicted, scalars) + scalars["x"] * state
        if kind == "last":
            return mean
        low, high = scalars["low"], scalars["high"]
        log_variance = low + gaussian.log_variance_above_low(variance, low, high)
        return mean + jnp.exp(0.5 * log_variance) * noise


@dataclasses.dataclass(frozen=True)
class Ddim(_OverChain):
    """Denoised data and predicted noise put together again at the next level; eta = 0 draws no noise.

    Source: arXiv 2010.02502, equation 12.
    """

    eta: float = 0.0  # 1 draws as much noise as DDPM with the posterior's variance

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def _tables(self, chain: gaussian.Chain) -> dict[str, np.ndarray]:
        before, now = chain.alpha_bar_before, chain.alpha_bar
        noise = self.eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
        return {"data": np.sqrt(before), "predicted": np.sqrt(1 - before - noise**2), "noise": noise}

    def advance(self, kind, fields, state, scalars, noise):
        predicted, _ = fields[0](state, scalars["t"])
        data = self._data(state, predicted, scalars)
        if self.clip:  # the noise that goes with the clipped data
            predicted = (data - scalars["data_from_x"] * state) / scalars["data_from_noise"]
        state = scalars["data"] * data + scalars["predicted"] * predicted
        return state + scalars["noise"] * noise if self.stochastic and kind == "step" else state


SOLVERS: dict[str, type] = {"ddpm": Ddpm, "ddim": Ddim}


def in_sigma_time(network: Network) -> Network:
    """A network of timesteps 0..999 as one of sigma-times, for guidance that lives in those."""
    return lambda x, t, y: network(x, jnp.round(t * gaussian.STEPS - 1), y)


def noise_field(
    guided: Callable[[jax.Array, jax.Array, Region], jax.Array],
) -> Callable[[jax.Array, jax.Array, Region], tuple[jax.Array, jax.Array]]:
    """field(x [B, H, W, C], timestep, region) -> (eps, variance output) from guided outputs [B, H, W, 2C].

    Guidance moves the noise alone; the variance output is the final head's on the conditional branch.
    """

    def field(x: jax.Array, timestep: jax.Array, region: Region) -> tuple[jax.Array, jax.Array]:
        eps, variance = jnp.split(guided(x, (timestep + 1) / gaussian.STEPS, region), 2, axis=-1)
        return eps, variance

    return field
