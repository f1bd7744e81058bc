"""Optimizer, learning-rate schedule and EMA decay, all through optax."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ig_jax.errors import check


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm. Durations in steps."""

    learning_rate: float
    schedule: str  # "constant" | "cosine" (to 0 at the last step), after the warm-up
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # 0 for no clipping
    accumulate: int  # micro-batches summed into one update

    def __post_init__(self):
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "greater than 0")
        check(self.schedule in ("constant", "cosine"), "schedule", self.schedule, "constant or cosine")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check(self.eps > 0, "eps", self.eps, "greater than 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        check(self.clip_norm >= 0, "clip_norm", self.clip_norm, "at least 0 (0 turns clipping off)")
        check(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1 micro-batch")


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """One or several exponential moving averages of the parameters."""

    decays: tuple[float, ...]
    warmup: bool  # decay min(d, (1 + n) / (10 + n)) at step n, for short runs

    def __post_init__(self):
        check(len(self.decays) >= 1, "decays", self.decays, "at least one decay", "sampling uses an EMA")
        for decay in self.decays:
            check(0 <= decay < 1, "decays", decay, "in [0, 1)")
        check(len(set(self.names)) == len(self.decays), "decays", self.decays, "without repeats")

    @property
    def names(self) -> tuple[str, ...]:
        """How each EMA is called in a checkpoint: its decay as written."""
        return tuple(str(decay) for decay in self.decays)

    def rate(self, name: str, step: jax.Array) -> jax.Array:
        """1 - decay of the EMA `name` for the update at `step` (0-based), float32."""
        decay = jnp.float32(float(name))
        n = step.astype(jnp.float32)
        return 1 - (jnp.minimum(decay, (1 + n) / (10 + n)) if self.warmup else decay)


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at a 0-based update: linear warm-up (never 0), then constant or cosine to 0."""

    def schedule(count):
        rate = jnp.float32(config.learning_rate)
        if config.warmup_steps:
            rate = rate * jnp.minimum(1.0, (count + 1) / config.warmup_steps)
        if config.schedule == "cosine":
            decay_steps = max(total_steps - config.warmup_steps, 1)
            progress = jnp.clip((count - config.warmup_steps) / decay_steps, 0.0, 1.0)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return rate

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """clip -> AdamW, as torch.optim.AdamW computes it (decoupled weight decay scaled by the learning rate)."""
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    adamw = optax.adamw(
        learning_rate(config, total_steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    return optax.chain(*parts, adamw)
