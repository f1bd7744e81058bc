"""Latent scaling, and the only conversions between uint8 and float pixels.

normalised = (latent - shift) * scale, per channel. The scaling travels with a denoiser's checkpoint, because
a latent scaled for another autoencoder or data set still decodes, but into a worse image.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ig_jax.base.errors import UserError, check

UINT8_RULES = ("sit", "half", "unit")  # see to_uint8


@dataclasses.dataclass(frozen=True, repr=False)
class LatentScaling:
    """Per-channel map between an autoencoder's latents and what the denoiser is trained on.

    Attributes:
        name: the autoencoder (and data set) it belongs to; "pixels" for none.
        shift: subtracted first, C floats.
        scale: factor after that, C floats.
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

    def __repr__(self) -> str:
        return f"({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"  # users read it in errors

    @property
    def channels(self) -> int:
        """Number of latent channels C."""
        return len(self.scale)

    @property
    def is_identity(self) -> bool:
        """Whether latents stay as they are."""
        return set(self.shift) == {0.0} and set(self.scale) == {1.0}

    def normalise(self, latents: jax.Array) -> jax.Array:
        """latents (..., C) of the autoencoder -> float32 (..., C), about unit variance."""
        x, shift, scale = self._arrays(latents)
        return (x - shift) * scale

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """Normalised latents (..., C) -> float32 (..., C) as the autoencoder decodes them."""
        x, shift, scale = self._arrays(latents)
        return x / scale + shift

    def _arrays(self, latents: jax.Array) -> list[jax.Array]:
        """Latents, shift and scale in float32."""
        shape, channels = tuple(latents.shape), self.channels
        check(shape[-1:] == (channels,), "latents.shape", shape, f"(..., {channels}) for the scaling {self.name!r}")
        return [jnp.asarray(array, jnp.float32) for array in (latents, self.shift, self.scale)]


def identity(name: str, channels: int, uint8_rule: str) -> LatentScaling:
    """No change: of latents that are normalised already, or whose normalisation is not known."""
    return LatentScaling(name, (0.0,) * channels, (1.0,) * channels, uint8_rule)


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


def autoencoder_name(channels: int, factor: int = 16) -> str:
    """The name of latents with these channels: those of the SD autoencoder have four, those of VA-VAE more."""
    return SD_VAE_SCALING.name if channels == SD_VAE_SCALING.channels else f"va_vae_f{factor}d{channels}"


def conventional(name: str, mean, std) -> LatentScaling:
    """How latents of that name are normalised: SD's by its factor, VA-VAE's by their measured mean and std (C,)."""
    return SD_VAE_SCALING if name == SD_VAE_SCALING.name else from_mean_std(name, mean, std, "half")


PIXELS = LatentScaling("pixels", (0.0,) * 3, (1.0,) * 3, "half")  # x = from_uint8(image), no autoencoder


def check_same(a: LatentScaling, b: LatentScaling) -> None:
    """Refuse latents scaled by `b` for a denoiser trained on `a` (names exact, numbers to float32 rounding).

    Raises: UserError naming both.
    """
    same = (a.name, a.channels, a.uint8_rule) == (b.name, b.channels, b.uint8_rule) and all(
        math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-7) for x, y in zip(a.shift + a.scale, b.shift + b.scale)
    )
    if not same:
        fix = "use latents and statistics of the same autoencoder and data set that the checkpoint was trained on"
        problem = f"latent scaling mismatch: {a} is not {b}"
        raise UserError(problem, name="latents", value=b, expected=str(a), fix=fix)


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
    of from_uint8; "unit": trunc(clip(255 x, 0, 255)), that of EDM2, whose autoencoder sees images in 0..1.
    "sit" darkens by half a level on average, enough for a metric: presets keep their family's.
    Raises: UserError for an unknown rule.
    """
    check(rule in UINT8_RULES, "uint8_rule", rule, f"one of {UINT8_RULES}")
    x = jnp.asarray(images, jnp.float32)
    levels = {"sit": 255 * ((x + 1) / 2), "half": 127.5 * x + 128, "unit": 255 * x}[rule]
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)  # the cast truncates
