"""Optimizers and the learning-rate schedule, through optax."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from ig_jax.base.errors import check
from ig_jax.models import dit
from ig_jax.optim.muon import scale_by_muon


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of every optimizer; durations in steps.

    Attributes:
        learning_rate: after the warm-up.
        schedule: "constant" | "cosine" (to 0 at the end), after the warm-up.
        warmup_steps: in which the rate grows from 0.
        b1: decay of Adam's mean.
        b2: decay of Adam's mean square.
        eps: of Adam's denominator.
        weight_decay: decoupled: scaled by the learning rate alone.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        accumulate: micro-batches per update; -1 for as few as fit into memory.
        train_only: parameters under these names, such as "inter_heads" or "blocks.3"; () for all.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    accumulate: int
    train_only: tuple[str, ...]

    def __post_init__(self):
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "greater than 0")
        check(self.schedule in ("constant", "cosine"), "schedule", self.schedule, "constant or cosine")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check(self.eps > 0, "eps", self.eps, "greater than 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        check(self.clip_norm >= 0, "clip_norm", self.clip_norm, "at least 0 (0 turns clipping off)")
        expected = "at least 1 micro-batch, or -1 for as few as fit"
        check(self.accumulate >= 1 or self.accumulate == -1, "accumulate", self.accumulate, expected)

    @property
    def pieces(self) -> int:
        """Micro-batches that a batch must divide into; 1 where their number is left open."""
        return max(self.accumulate, 1)

    def trains(self, name: str) -> bool:
        """Whether the parameter is updated; the others get no gradient and stay bitwise unchanged."""
        return self._chosen(name) and name not in dit.FROZEN

    def _chosen(self, name: str) -> bool:
        return not self.train_only or any(_below(name, prefix) for prefix in self.train_only)

    def check_model(self, model: dit.DiTConfig) -> None:
        """Raise UserError when train_only names a part that the model does not have."""
        names = dit.shapes(model) if self.train_only else ()
        for prefix in self.train_only:
            known = any(_below(name, prefix) and self.trains(name) for name in names)
            fix = "such as inter_heads, final_head or blocks.3"
            check(known, "optimizer.train_only", prefix, "a trainable part of this model", fix)


def _below(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW on all trained parameters, with the settings of OptimizerConfig.

    Attributes:
        name: "adamw".
    """

    name: Literal["adamw"]


@dataclasses.dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon on matrices, AdamW without weight decay on the rest, with the settings of OptimizerConfig.

    Attributes:
        name: "muon".
        muon_momentum: decay of the mean of the gradients.
        muon_routing: "hidden": Muon for the matrices inside the blocks; embeddings and heads are not maps between
            hidden layers and use AdamW. "release": Muon for everything with two or more dimensions, and weight decay
            for the fixed position embedding too, as the published LightningDiT was trained.
    """

    name: Literal["muon"]
    muon_momentum: float
    muon_routing: str

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.muon_momentum < 1, "muon_momentum", self.muon_momentum, "in [0, 1)")
        check(self.muon_routing in ("hidden", "release"), "muon_routing", self.muon_routing, "hidden or release")

    def trains(self, name: str) -> bool:
        return super().trains(name) or (self.muon_routing == "release" and self._chosen(name))

    def rule(self, name: str, dimensions: int) -> str:
        """ "muon", "adamw" or "decay" (nothing but weight decay) for a parameter of that many dimensions."""
        if name in dit.FROZEN:
            return "decay"
        hidden = self.muon_routing == "release" or name.startswith("blocks.")
        return "muon" if hidden and dimensions >= 2 else "adamw"


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


def make_optimizer(
    config: AdamWConfig | MuonConfig, total_steps: int, model: dit.DiTConfig
) -> optax.GradientTransformation:
    """Clipping by global norm, then the configured rule, for gradients by parameter name."""
    # Without clipping there is a part too, so that the rule's state has the same name in a checkpoint.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rate = learning_rate(config, total_steps)
    if isinstance(config, MuonConfig):
        return optax.chain(clip, _muon(config, rate, model.channels))
    return optax.chain(clip, optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay))


def _muon(config: MuonConfig, rate, channels: int) -> optax.GradientTransformation:
    decay = (optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate))
    rules = {
        "muon": optax.chain(scale_by_muon(config.muon_momentum, channels), *decay),
        "adamw": optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=0.0),
        "decay": optax.chain(optax.set_to_zero(), *decay),
    }
    labels = lambda tree: {name: config.rule(name, leaf.ndim) for name, leaf in tree.items()}
    return optax.partition(rules, labels)
