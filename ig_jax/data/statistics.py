"""Statistics that identify a set of latents, and the check of what is stored against what the config says of it."""

import dataclasses

import numpy as np

from ig_jax.base.errors import UserError
from ig_jax.data.sources import Arrays, Source
from ig_jax.data.spec import BatchSpec
from ig_jax.models.latents import SD_VAE_SCALING

MOST_ROWS = 256  # that are read for the statistics


@dataclasses.dataclass(frozen=True)
class Known:
    """The mean and standard deviation of each channel of a published set of latents."""

    what: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def distance(self, mean: np.ndarray, std: np.ndarray) -> float:
        """How far statistics (C,) are from these: over 1 they are not a few hundred images of the set."""
        off = np.abs(mean - np.asarray(self.mean)) / (0.35 * np.asarray(self.std))
        wide = np.abs(np.log(std / np.asarray(self.std))) / np.log(1.3)
        return float(max(off.max(), wide.max()))


_OF_SIGNED = "of the SD autoencoder and images in -1..1"
# Source: Lyy-iiis/imeanflow utils/vae_util.py (256 px); willisma/diffuse_nnx configs/common_specs.py (512 px)
SD_VAE_256 = Known(_OF_SIGNED, (0.86488, -0.27787, 0.21617, 0.37384), (4.85504, 5.31922, 3.93725, 3.98700))
SD_VAE_512 = Known(_OF_SIGNED, (1.560, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
# Source: NVlabs/edm2 training/encoders.py
SD_VAE_OF_UNIT_IMAGES = Known(
    "of the SD autoencoder and images in 0..1 (EDM2)", (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
)


def _scaled(known: Known) -> Known:
    factor = SD_VAE_SCALING.scale[0]
    numbers = [tuple(factor * value for value in values) for values in (known.mean, known.std)]
    return Known(f"{known.what}, already multiplied by {factor}", *numbers)


RAW = (SD_VAE_256, SD_VAE_512, SD_VAE_OF_UNIT_IMAGES)
KNOWN = (*RAW, *map(_scaled, RAW))


def sample_rows(source: Source) -> np.ndarray:
    """Rows int (B,) spread over the whole source."""
    return np.unique(np.linspace(0, len(source) - 1, min(len(source), MOST_ROWS)).astype(np.int64))


def of_channels(spec: BatchSpec, batch: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of the encoder's means, or of latents, as stored."""
    values = batch[spec.array].astype(np.float64)
    values = np.moveaxis(values, 1, -1) if spec.channels_first else values
    values = values[..., : spec.latent_shape[-1]]
    return values.mean((0, 1, 2)), values.std((0, 1, 2))


def identified(spec: BatchSpec, batch: Arrays) -> Known | None:
    """The published set that the numbers of `sample_rows` are nearest to, None where they are like none of them."""
    if spec.latent_shape[-1] != SD_VAE_SCALING.channels:
        return None
    mean, std = of_channels(spec, batch)
    with np.errstate(divide="ignore"):
        nearest = min(KNOWN, key=lambda known: known.distance(mean, std))
        return nearest if nearest.distance(mean, std) <= 1 else None


def check_scaling(source: Source) -> None:
    """Raise UserError where latents that are known would be normalised by the numbers of others.

    Latents of an autoencoder that is not known pass.
    """
    known, scaling = identified(source.spec, source.gather(sample_rows(source))), source.spec.scaling
    if known is None:
        return
    std = np.asarray(known.std) * np.asarray(scaling.scale)
    mean = (np.asarray(known.mean) - np.asarray(scaling.shift)) * np.asarray(scaling.scale)
    # SiT's 0.9, EDM2's 0.5 and measured statistics' 1 are usual. EDM2's mean by SiT's factor would be 1.06.
    if (std < 0.3).any() or (std > 1.8).any() or (np.abs(mean) > 0.75 * std).any():
        raise UserError(
            f"the latents of {source!r} are those {known.what}; {scaling} does not normalise them",
            name="latents",
            value=scaling,
            expected=f"numbers for latents {known.what}",
            fix="name their format in data.source, or set config.latents for them",
        )
