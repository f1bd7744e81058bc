"""What a denoiser sees of an image: latent scaling, and the only rules between uint8 and float pixels.

normalised = (latent - shift) * scale, per channel. The scaling travels with a denoiser's checkpoint, because
a latent scaled for another autoencoder or data set still decodes into an image, only a worse one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ig_jax.errors import UserError, check

UINT8_RULES = ("sit", "half")  # see to_uint8


@dataclasses.dataclass(frozen=True)
class LatentScaling:
    """Per-channel map between an autoencoder's latents and what the denoiser is trained on.

    name: the autoencoder (and data set) it belongs to; shift, scale: C floats each;
    uint8_rule: how that family's decoded images are rounded, see to_uint8.
    Raises: UserError for lengths that differ, a scale that is not positive and finite, or an unknown rule.
    """

    name: str
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    uint8_rule: str

    def __post_init__(self):
        for field in ("shift", "scale"):  # tuples of plain floats, so that it hashes, compares and prints
            object.__setattr__(self, field, tuple(float(v) for v in getattr(self, field)))
        check(len(self.shift) == len(self.scale) > 0, "shift", self.shift, f"as long as scale={self.scale}")
        check(all(map(math.isfinite, self.shift)), "shift", self.shift, "finite")
        check(all(0 < s < math.inf for s in self.scale), "scale", self.scale, "positive and finite")
        check(self.uint8_rule in UINT8_RULES, "uint8_rule", self.uint8_rule, f"one of {UINT8_RULES}")

    @property
    def channels(self) -> int:
        """Number of latent channels C."""
        return len(self.scale)

    def normalise(self, latents: jax.Array) -> jax.Array:
        """latents (..., C) of the autoencoder -> float32 (..., C), about unit variance."""
        self._check_channels(latents)
        shift, scale = (jnp.asarray(v, jnp.float32) for v in (self.shift, self.scale))
        return (jnp.asarray(latents, jnp.float32) - shift) * scale

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """Normalised latents (..., C) -> float32 (..., C) as the autoencoder decodes them."""
        self._check_channels(latents)
        shift, scale = (jnp.asarray(v, jnp.float32) for v in (self.shift, self.scale))
        return jnp.asarray(latents, jnp.float32) / scale + shift

    def to_json(self) -> dict:
        """The scaling as plain JSON types; from_json(to_json(s)) == s exactly."""
        return {"name": self.name, "shift": list(self.shift), "scale": list(self.scale),
                "uint8_rule": self.uint8_rule}

    @classmethod
    def from_json(cls, stored: dict) -> "LatentScaling":
        """The scaling that `to_json` wrote.  Raises: UserError for missing, unknown or misshapen fields."""
        wanted = [field.name for field in dataclasses.fields(cls)]
        check(isinstance(stored, dict) and sorted(stored) == sorted(wanted), "latent scaling", stored,
              f"a mapping with exactly {wanted}")
        try:
            return cls(**stored)
        except (TypeError, ValueError) as err:
            raise UserError(f"latent scaling {stored!r} cannot be read: {err}") from err

    def _check_channels(self, latents) -> None:
        check(latents.shape[-1:] == (self.channels,), "latents.shape", tuple(latents.shape),
              f"(..., {self.channels}) for the scaling {self.name!r}")


def from_factor(name: str, factor: float, channels: int, uint8_rule: str) -> LatentScaling:
    """One factor for all channels, no shift (the convention of SD-VAE latents)."""
    return LatentScaling(name, (0.0,) * channels, (factor,) * channels, uint8_rule)


def from_mean_std(name: str, mean, std, uint8_rule: str) -> LatentScaling:
    """mean, std (C,) measured over a data set's latents -> (latent - mean) / std (VA-VAE latents).

    Raises: UserError if a std is not positive or the lengths differ.
    """
    std = [float(s) for s in std]
    check(all(0 < s < math.inf for s in std), "std", std, "positive and finite")
    return LatentScaling(name, tuple(mean), tuple(1 / s for s in std), uint8_rule)


# Source: the SD-VAE's published scaling factor; SiT and DiT use it with their own rounding.
SD_VAE_SCALING = from_factor("sd_vae", 0.18215, 4, "sit")
PIXELS = LatentScaling("pixels", (0.0,) * 3, (1.0,) * 3, "half")  # x = from_uint8(image), no autoencoder


def check_same(a: LatentScaling, b: LatentScaling) -> None:
    """Refuse latents scaled by `b` for a denoiser trained on `a` (names exact, numbers to float32 rounding).

    Raises: UserError naming both.
    """
    same = (a.name, a.channels, a.uint8_rule) == (b.name, b.channels, b.uint8_rule) and all(
        math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-7) for x, y in zip(a.shift + a.scale, b.shift + b.scale)
    )
    if not same:
        raise UserError(f"latent scaling mismatch: {a} is not {b}; use latents and statistics of the same "
                        "autoencoder and data set that the checkpoint was trained on")


def sample(mean: jax.Array, std: jax.Array, noise: jax.Array) -> jax.Array:
    """One latent of the encoder's Gaussian: mean, std, standard normal noise, all (..., C) -> (..., C)."""
    return mean + std * noise


def from_uint8(images: jax.Array) -> jax.Array:
    """images uint8 0..255, any shape -> float32 in [-1, 1]; to_uint8(., "half") gives the same bytes back."""
    check(images.dtype == jnp.uint8, "images.dtype", str(images.dtype), "uint8")
    # u / 127.5 - 1, in the order that is exact at both ends however the compiler fuses it
    return (jnp.asarray(images, jnp.float32) - 127.5) / 127.5


def to_uint8(images: jax.Array, rule: str) -> jax.Array:
    """images float in about [-1, 1], any shape -> uint8 0..255; the only place where pixels are rounded.

    "sit":  trunc(clip(255 (x + 1) / 2, 0, 255)), the rule of SiT's and DiT's published sample scripts;
    "half": trunc(clip(127.5 x + 128, 0, 255)), that of LightningDiT (VA-VAE) and of pixel models, the inverse
    of from_uint8. "sit" darkens by half a level on average, enough for a metric: presets keep their family's.
    Raises: UserError for an unknown rule.
    """
    check(rule in UINT8_RULES, "uint8_rule", rule, f"one of {UINT8_RULES}")
    x = jnp.asarray(images, jnp.float32)
    levels = 255 * ((x + 1) / 2) if rule == "sit" else 127.5 * x + 128
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)  # the cast truncates
