"""What a network is trained to undo: the path from data to noise, what it predicts, which times it sees."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ig_jax.diffusion import gaussian, paths
from ig_jax.errors import check
from ig_jax.models.dit import DiTConfig, DiTOutput

KINDS = (*paths.PATHS, "gaussian")
PREDICTIONS = ("velocity", "noise", "data")
TIMES = ("uniform", "logit_normal")


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """A continuous path ("linear", "cosine", "vp") or DiT's discrete chain ("gaussian")."""

    kind: str
    prediction: str  # "velocity" | "noise" | "data"; the gaussian chain predicts noise
    time: str  # "uniform" | "logit_normal": sigmoid of a normal of the two numbers below
    time_mean: float  # in our clock; LightningDiT's runs the other way, so its means change sign
    time_std: float

    def __post_init__(self):
        for name, choices in (("kind", KINDS), ("prediction", PREDICTIONS), ("time", TIMES)):
            check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        check(math.isfinite(self.time_mean), "time_mean", self.time_mean, "a finite number")
        check(0 < self.time_std < math.inf, "time_std", self.time_std, "greater than 0 and finite")
        if self.kind == "gaussian":
            for name, only in (("prediction", "noise"), ("time", "uniform")):
                check(getattr(self, name) == only, name, getattr(self, name), f"{only} for kind='gaussian'")

    def check_model(self, model: DiTConfig) -> None:
        """Raise UserError when a network of this form cannot learn this process."""
        wanted = self.kind == "gaussian"
        check((model.sigma_channels == "variance") == wanted, "model.sigma_channels", model.sigma_channels,
              f"{'variance' if wanted else 'none or unused'} for process.kind={self.kind!r}",
              "the variance channels are the learned variance of the gaussian process")
        check(self.prediction == "velocity" or model.clock == "noise_at_1", "model.clock", model.clock,
              f"noise_at_1 for process.prediction={self.prediction!r}",
              "only a velocity changes sign with the direction of time")

    @property
    def train_range(self) -> tuple[float, float]:
        """Sigma-times (low, high) of training on a path: without the ends where a prediction says nothing.

        Source: willisma/SiT transport/__init__.py and transport.py, train_eps, in our clock.
        """
        if self.kind == "vp":
            return 1e-5, 1.0
        return (0.0, 1.0) if self.prediction == "velocity" else (1e-3, 1 - 1e-3)

    @property
    def defined_range(self) -> tuple[float, float]:
        """Sigma-times (low, high) at which the prediction tells a bounded velocity.

        Noise tells no data where alpha = 0, data no noise at t = 0. Source: 1e-3 is willisma/SiT's sample_eps.
        """
        if self.prediction == "velocity":
            return 0.0, 1.0
        low = 1e-3 if self.kind == "vp" or self.prediction == "data" else 0.0
        high = 1 - 1e-3 if self.kind != "vp" and self.prediction == "noise" else 1.0
        return low, high

    def draw_times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Training times float32 as the network takes them: sigma-times, or whole 0..999 for "gaussian"."""
        if self.kind == "gaussian":
            return jax.random.randint(key, shape, 0, gaussian.STEPS).astype(jnp.float32)
        if self.time == "uniform":
            unit = jax.random.uniform(key, shape, jnp.float32)
        else:
            unit = jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(key, shape, jnp.float32))
        low, high = self.train_range
        return low + (high - low) * unit

    def noised(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_t, what the network should predict), each [B, H, W, C] float32, at t [B] of `draw_times`."""
        if self.kind == "gaussian":
            return gaussian.noised(x, eps, t), eps
        x_t, velocity = paths.interpolate(self.kind, x, eps, t)
        return x_t, {"velocity": velocity, "noise": eps, "data": x}[self.prediction]

    def split(self, out: DiTOutput) -> tuple[DiTOutput, DiTOutput | None]:
        """(predictions, variance outputs) [B, H, W, C] of every head; a path has no variance outputs."""
        return gaussian.split(out) if self.kind == "gaussian" else (out, None)

    def to_velocity(self, out: DiTOutput, x_t: jax.Array, t: jax.Array) -> DiTOutput:
        """The velocities that the predictions of every head at x_t and times t [B] stand for.

        Times outside `defined_range` count as its ends, so that a grid from 1 to 0 stays finite.
        """
        if self.prediction == "velocity":
            return out
        t = jnp.clip(t, *self.defined_range)
        a, b = paths.conversion(self.kind, self.prediction, "velocity", paths.over_latents(t))
        return jax.tree.map(lambda head: a * x_t + b * head, out)
