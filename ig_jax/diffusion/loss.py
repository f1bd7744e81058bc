"""The internal-guidance loss: L = L_final + sum over the intermediate heads of lambda * L_inter.

Every head predicts the same target. The accelerated target moves that of the final head away from the intermediate
prediction: x0 + omega * sg(D_f - D_i). At a given x_t, velocity, noise and data are affine in each other with one
common factor, so it is target + omega * sg(gap) in whatever the network predicts.
Source: arXiv 2512.24176 (dual loss; training acceleration); hustvl/LightningDiT transport (direction).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.base.errors import check
from ig_jax.diffusion import curves, gaussian, paths
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.models import dit
from ig_jax.models.dit import DiTConfig, DiTOutput

FINAL_WEIGHT = 1.0  # of the final head; lambda is relative to it
WEIGHTINGS = ("none", "velocity", "likelihood")
SMALLEST_NORM = 1e-8  # below it a vector has no direction; torch's cosine_similarity

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; a term added later has a default that turns it off.

    Attributes:
        inter_weight: lambda, one for each intermediate head.
        label_drop: probability of the null label.
        accelerate: move the final head's target by omega * sg(final - intermediate).
        omega: of the accelerated target, in [0, 1).
        gap_source: which network computes the gap: "ema" (the first EMA, one more forward pass) | "online" (free).
        start_step: first step with the accelerated target.
        direction_weight: of mean(1 - cos) between prediction and target over channels; 0 for none.
        direction_intermediate: whether the intermediate heads have that term too (times their lambda).
        weighting: of a noise or score by its time: "none" | "velocity" | "likelihood", see `time_weight`.
    """

    inter_weight: tuple[float, ...]
    label_drop: float
    accelerate: bool
    omega: float
    gap_source: str
    start_step: int
    direction_weight: float
    direction_intermediate: bool
    weighting: str = "none"

    def __post_init__(self):
        for weight in self.inter_weight:
            check(weight >= 0, "inter_weight", weight, "at least 0")
        check(0 <= self.label_drop < 1, "label_drop", self.label_drop, "in [0, 1)")
        diverges = "the fixed point has guidance 1 / (1 - omega) built in, and does not exist for omega >= 1"
        check(0 <= self.omega < 1, "omega", self.omega, "in [0, 1)", diverges)
        check(self.gap_source in ("ema", "online"), "gap_source", self.gap_source, "ema or online")
        check(self.start_step >= 0, "start_step", self.start_step, "at least 0 steps")
        check(self.direction_weight >= 0, "direction_weight", self.direction_weight, "at least 0 (0 is off)")
        check(self.weighting in WEIGHTINGS, "weighting", self.weighting, f"one of {', '.join(WEIGHTINGS)}")

    @property
    def ema_forward(self) -> bool:
        """Whether a step also runs the network with the EMA weights."""
        return self.accelerate and self.gap_source == "ema"

    def check_model(self, model: DiTConfig, process: ProcessConfig) -> None:
        """Raise UserError when the loss does not fit the model or the process."""
        weighted = self.weighting == "none" or (process.prediction in ("noise", "score") and not process.chain)
        expected = "none unless process.prediction is noise or score, on a path"
        check(weighted, "loss.weighting", self.weighting, expected)
        weights, depths = self.inter_weight, model.inter_depth
        expected = f"one weight for each of model.inter_depth={depths}"
        check(len(weights) == len(depths), "loss.inter_weight", weights, expected)
        fits, expected = not self.accelerate or bool(depths), "False for a model without an intermediate head"
        check(fits, "loss.accelerate", self.accelerate, expected)
        fits, fix = not self.direction_weight or model.channels > 1, "one number has a sign, but no direction"
        check(fits, "loss.direction_weight", self.direction_weight, "0 for a model of 1 channel", fix)


class Term(NamedTuple):
    """One summand of the loss: `weight` (a number) times `value` (B,) float32."""

    weight: float
    value: jax.Array


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all but the first axis of the squared difference: (B, H, W, C) -> (B,) float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference * difference, axis=tuple(range(1, difference.ndim)))


def time_weight(path: str, weighting: str, t: jax.Array) -> jax.Array:
    """The weight (B,) float32 of an error of the noise at times t (B,), in (0, 1).

    "velocity": of the velocity error that it means; "likelihood": of its contribution to the bound of the likelihood.
    Source: willisma/SiT transport/transport.py, training_losses.
    """
    _, of_noise = paths.conversion(path, "noise", "velocity", t)
    return of_noise**2 if weighting == "velocity" else of_noise / paths.coefficients(path, t).sigma


def direction_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over pixels of 1 - cos of the angle between the channels: (B, H, W, C) -> (B,) float32."""
    a, b = _direction(prediction), _direction(target)
    missing = (a == 0).all(axis=-1).astype(jnp.float32) + (b == 0).all(axis=-1)
    # Half the squared distance of two unit vectors: 1 - cos without the cancellation at small angles.
    error = 0.5 * (jnp.sum((a - b) ** 2, axis=-1) + missing)
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))


def _direction(x: jax.Array) -> jax.Array:
    """x / |x| along the channels; 0 without a gradient where x is 0: a head initialised to zero would get 1e8."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    defined = square > SMALLEST_NORM**2
    return jnp.where(defined, x * jax.lax.rsqrt(jnp.where(defined, square, 1.0)), 0.0)


def accelerated_target(target: jax.Array, gap: jax.Array, omega: jax.Array | float) -> jax.Array:
    """target + omega * sg(gap), for target and gap = final - intermediate in the same prediction.

    Its fixed point has guidance w = 1 / (1 - omega) built in; it diverges for omega >= 1.
    """
    return target + omega * jax.lax.stop_gradient(gap)


def guidance_gap(out: DiTOutput) -> jax.Array:
    """Final prediction minus that of the first intermediate head, (B, H, W, C) float32."""
    final, first = out.heads[:2]
    return final.astype(jnp.float32) - first.astype(jnp.float32)


class NoisyBatch(NamedTuple):
    """A batch with everything random about it."""

    x: jax.Array  # normalised latents (B, H, W, C) float32
    eps: jax.Array  # standard normal noise (B, H, W, C) float32
    t: jax.Array  # times (B,) float32, as the network takes them
    y: jax.Array  # labels (B,) int32; the null label where the label was dropped


@dataclasses.dataclass(frozen=True)
class Objective:
    """The scalar that training minimises, as a function of parameters and a batch.

    Raises: UserError when the process or the loss does not fit the model.
    """

    model: DiTConfig
    process: ProcessConfig
    loss: LossConfig

    def __post_init__(self):
        self.process.check_model(self.model)
        self.loss.check_model(self.model, self.process)

    def noised(self, x: jax.Array, labels: jax.Array, seed: int, step: jax.Array) -> NoisyBatch:
        """Noise, times and dropped labels of a global batch: each example's from (seed, step, position)."""
        eps = jax.random.normal(address(seed, Purpose.NOISE, step), x.shape, jnp.float32)
        t = self.process.draw_times(address(seed, Purpose.TIME, step), labels.shape)
        dropped = jax.random.bernoulli(address(seed, Purpose.LABEL_DROP, step), self.loss.label_drop, labels.shape)
        return NoisyBatch(x, eps, t, jnp.where(dropped, self.model.num_classes, labels))

    def __call__(
        self, params: Params, ema: Params, batch: NoisyBatch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The scalar, and metrics by name: loss/total is the sum of the other loss/ terms times their weights."""
        x_t, target = self.process.noised(batch.x, batch.eps, batch.t)
        predictions, variances = self.outputs(params, x_t, batch)
        final_target = target
        if self.loss.accelerate:
            omega = jnp.where(step >= self.loss.start_step, self.loss.omega, 0.0)
            final_target = accelerated_target(target, self._gap(predictions, ema, x_t, batch, step), omega)
        terms = self.terms(predictions, variances, target, final_target, batch)
        scalar = jnp.mean(total(terms))
        metrics: dict[str, Any] = {"loss/total": scalar} | {name: jnp.mean(term.value) for name, term in terms.items()}
        if predictions.intermediate:
            metrics["gap_square"] = jnp.mean(guidance_gap(predictions) ** 2)
        sigma = batch.t / gaussian.STEPS if self.process.chain else batch.t
        metrics["sigma"] = curves.by_sigma(sigma, target, predictions.heads)
        return scalar, metrics

    def outputs(self, params: Params, x_t: jax.Array, batch: NoisyBatch) -> tuple[DiTOutput, DiTOutput | None]:
        """(predictions, variance outputs) of every head, each (B, H, W, C) float32."""
        out = dit.apply(self.model, params, x_t, batch.t, batch.y)
        return self.process.predictions(self.model, out, batch.t)

    def terms(
        self,
        predictions: DiTOutput,
        variances: DiTOutput | None,
        target: jax.Array,
        final_target: jax.Array,
        batch: NoisyBatch,
    ) -> dict[str, Term]:
        """Every term of the loss by name: this is the place for a new one.

        predictions, variances: of every head, (B, H, W, C); variances only from the gaussian process.
        target, final_target: what the intermediate heads and the final head should predict, (B, H, W, C).
        """
        loss = self.loss
        names = ["loss/final", *self.intermediate_names()]
        weights = [FINAL_WEIGHT, *loss.inter_weight]
        terms = {}
        for name, weight, head in zip(names, weights, predictions.heads):
            final = name == "loss/final"
            goal = final_target if final else target
            error = squared_error(head, goal)
            if loss.weighting != "none":
                error = error * time_weight(self.process.kind, loss.weighting, batch.t)
            terms[name] = Term(weight, error)
            if loss.direction_weight and (final or loss.direction_intermediate):
                terms[f"{name}_direction"] = Term(weight * loss.direction_weight, direction_error(head, goal))
        if variances is not None:  # the variational bound teaches each head of the gaussian process its variance
            for name, weight, noise, variance in zip(names, weights, predictions.heads, variances.heads):
                chain = gaussian.FULL[self.process.kind]
                value = chain.variational_bound(noise, variance, batch.x, batch.eps, batch.t)
                terms[f"{name}_vb"] = Term(weight, value)
        return terms

    def intermediate_names(self) -> list[str]:
        """The name of each intermediate head's term; several heads are distinguished by their depth."""
        depths = self.model.inter_depth
        return ["loss/intermediate"] if len(depths) == 1 else [f"loss/intermediate_{depth}" for depth in depths]

    def _gap(
        self, predictions: DiTOutput, ema: Params, x_t: jax.Array, batch: NoisyBatch, step: jax.Array
    ) -> jax.Array:
        """The guidance gap (B, H, W, C) of this network, or of its EMA, which runs from start_step on only."""
        if self.loss.gap_source == "online":
            return guidance_gap(predictions)
        return jax.lax.cond(
            step >= self.loss.start_step,
            lambda: guidance_gap(self.outputs(ema, x_t, batch)[0]),
            lambda: jnp.zeros_like(predictions.heads[0]),
        )


def total(terms: dict[str, Term]) -> jax.Array:
    """What is optimised, (B,) float32: the weighted sum of the terms."""
    # A term of weight 0 is left out, not multiplied by 0: the compiled gradient of the others is then bitwise
    # identical to the one without the term.
    first, *others = (term.weight * term.value for term in terms.values() if term.weight)
    return sum(others, start=first)
