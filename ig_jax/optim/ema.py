"""Exponential moving averages of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp

from ig_jax.base.errors import check

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """One or several exponential moving averages of the parameters.

    Attributes:
        decays: one for each average, whose name it is.
        warmup: decay min(d, (1 + n) / (10 + n)) at step n, for short runs.
    """

    decays: tuple[float, ...]
    warmup: bool

    def __post_init__(self):
        check(len(self.decays) >= 1, "decays", self.decays, "at least one decay", "sampling uses an EMA")
        for decay in self.decays:
            check(0 <= decay < 1, "decays", decay, "in [0, 1)")
        check(len(set(self.names)) == len(self.decays), "decays", self.decays, "without repeats")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each EMA in a checkpoint: its decay as written."""
        return tuple(str(decay) for decay in self.decays)

    def rate(self, name: str, step: jax.Array) -> jax.Array:
        """1 - decay of the EMA `name` for the update at `step` (0-based), float32."""
        rate = jnp.float32(1 - float(name))  # the difference in float64: in float32 0.9999 would be off by 2e-4 of it
        return jnp.maximum(rate, 9 / (10 + step.astype(jnp.float32))) if self.warmup else rate

    def updated(self, averages: dict[str, Params], params: Params, step: jax.Array) -> dict[str, Params]:
        """Every average after the update at `step` (0-based), by the name of its decay."""

        def moved(name: str, average: Params) -> Params:
            rate = self.rate(name, step)
            return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)

        return {name: moved(name, average) for name, average in averages.items()}
