"""The forward process and the prediction target."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ig_jax.base.errors import check
from ig_jax.diffusion import gaussian, paths
from ig_jax.models.dit import DiTConfig, DiTOutput

KINDS = (*paths.PATHS, *gaussian.BETAS)
PREDICTIONS = ("velocity", "noise", "data", "score")
TIMES = ("uniform", "logit_normal", "log_normal")


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The forward process, a continuous path or DiT's discrete chain, and what the network predicts of it.

    Attributes:
        kind: "linear" | "cosine" | "vp", paths; "gaussian" | "gaussian_cosine" (squared-cosine betas), DiT's chain.
        prediction: "velocity" | "noise" | "data" | "score"; a chain predicts noise.
        time: of training: "uniform" | "logit_normal" (log t/(1-t) is normal) | "log_normal" (log sigma/alpha is
            normal).
        time_mean: of that normal, in sigma-time; LightningDiT's time is reversed, so its means change sign.
        time_std: of that normal.
    """

    kind: str
    prediction: str
    time: str
    time_mean: float
    time_std: float

    def __post_init__(self):
        for name, choices in (("kind", KINDS), ("prediction", PREDICTIONS), ("time", TIMES)):
            check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        check(math.isfinite(self.time_mean), "time_mean", self.time_mean, "a finite number")
        check(0 < self.time_std < math.inf, "time_std", self.time_std, "greater than 0 and finite")
        if self.chain:
            for name, only in (("prediction", "noise"), ("time", "uniform")):
                check(getattr(self, name) == only, name, getattr(self, name), f"{only} for kind={self.kind!r}")
        fits = self.time != "log_normal" or self.kind in ("linear", "cosine")
        check(fits, "time", self.time, f"uniform or logit_normal for kind={self.kind!r}")

    @property
    def chain(self) -> bool:
        """Whether the process is DiT's discrete chain."""
        return self.kind in gaussian.BETAS

    def check_model(self, model: DiTConfig) -> None:
        """Raise UserError when this network cannot learn this process."""
        channels, wanted = model.sigma_channels, "variance" if self.chain else "none or unused"
        fix = "the variance channels are the learned variance of the gaussian process"
        expected = f"{wanted} for process.kind={self.kind!r}"
        check((channels == "variance") == self.chain, "model.sigma_channels", channels, expected, fix)
        expected = f"noise_at_1 for process.kind={self.kind!r}"
        check(not self.chain or model.clock == "noise_at_1", "model.clock", model.clock, expected)

    @property
    def train_range(self) -> tuple[float, float]:
        """Sigma-times (low, high) of training on a path, without the ends where a prediction is uninformative.

        Source: willisma/SiT transport/__init__.py and transport.py, train_eps, in our clock.
        """
        if self.kind == "vp":
            return 1e-5, 1.0
        return (0.0, 1.0) if self.prediction == "velocity" else (1e-3, 1 - 1e-3)

    @property
    def defined_range(self) -> tuple[float, float]:
        """Sigma-times (low, high) at which the prediction determines a bounded velocity.

        Noise does not determine the data where alpha = 0, nor data the noise at t = 0.
        Source: 1e-3 is willisma/SiT's sample_eps.
        """
        if self.prediction == "velocity":
            return 0.0, 1.0
        low = 1e-3 if self.kind == "vp" or self.prediction in ("data", "score") else 0.0
        high = 1 - 1e-3 if self.kind != "vp" and self.prediction in ("noise", "score") else 1.0
        return low, high

    def draw_times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Training times float32 as the network takes them: sigma-times, or whole 0..999 for "gaussian"."""
        if self.chain:
            return jax.random.randint(key, shape, 0, gaussian.STEPS).astype(jnp.float32)
        if self.time == "uniform":
            unit = jax.random.uniform(key, shape, jnp.float32)
        else:
            normal = self.time_mean + self.time_std * jax.random.normal(key, shape, jnp.float32)
            # On the linear path log t/(1-t) is log sigma/alpha. Source: CVL-UESTC/Internal-Guidance SiT/loss.py.
            on_cosine = self.time == "log_normal" and self.kind == "cosine"
            unit = 2 / math.pi * jnp.arctan(jnp.exp(normal)) if on_cosine else jax.nn.sigmoid(normal)
        low, high = self.train_range
        return low + (high - low) * unit

    def noised(self, x: jax.Array, eps: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_t, what `predictions` should be), each (B, H, W, C) float32, at t (B,) of `draw_times`."""
        if self.chain:
            return gaussian.FULL[self.kind].noised(x, eps, t), eps
        x_t, velocity = paths.interpolate(self.kind, x, eps, t)
        return x_t, {"velocity": velocity, "noise": eps, "score": eps, "data": x}[self.prediction]

    def predictions(self, model: DiTConfig, out: DiTOutput, t: jax.Array) -> tuple[DiTOutput, DiTOutput | None]:
        """(predictions, variance outputs) (B, H, W, C) of every head at times t (B,); a path has no variance outputs.

        A score is taken as the noise -sigma score, whose error does not grow towards the data. Networks of a reversed
        clock return minus their output (models/dit.py), which makes a velocity but nothing else one of sigma-time.
        """
        if self.chain:
            return gaussian.split(out)
        if model.clock == "noise_at_0" and self.prediction != "velocity":
            out = jax.tree.map(jnp.negative, out)
        if self.prediction == "score":
            sigma = paths.coefficients(self.kind, paths.over_latents(t)).sigma
            out = jax.tree.map(lambda head: -sigma * head, out)
        return out, None

    def to_velocity(self, model: DiTConfig, out: DiTOutput, x_t: jax.Array, t: jax.Array) -> DiTOutput:
        """The outputs of every head at x_t and times t (B,), converted to velocities.

        Times outside `defined_range` are clipped to it, so that a grid from 1 to 0 stays finite.
        """
        low, high = self.defined_range
        t, to_noise = jnp.clip(t, low, high), jnp.clip(1 - t, 1 - high, 1 - low)
        out, _ = self.predictions(model, out, t)
        if self.prediction == "velocity":
            return out
        source = "data" if self.prediction == "data" else "noise"
        a, b = paths.conversion(self.kind, source, "velocity", paths.over_latents(t), paths.over_latents(to_noise))
        return jax.tree.map(lambda head: a * x_t + b * head, out)
