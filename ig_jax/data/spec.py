"""Batch specification: names, shapes and dtypes of the arrays in a batch, and the meaning of their numbers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from ig_jax.base.errors import UserError, check
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.latents import LatentScaling, from_factor, identity

FORMS = {"pixels": "image", "moments": "moments", "latents": "latent"}  # what a batch holds -> the name of its array
FLIPPED = "_flip"  # suffix of the array that holds the encoded mirror images
ENCODER = "encoder"  # the weights that encode images in the step, next to the arrays of a batch
FLOATS = ("float32", "bfloat16", "float16")
SPREADS = ("std", "logvar")
LOG_VARIANCES = (-30.0, 20.0)  # to which they are clamped, as in diffusers' DiagonalGaussianDistribution
UNSTATED = ""  # name of the scaling of latents whose files do not state one


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The autoencoder that encodes images in the step.

    Attributes:
        config: of the network.
        digest: of its weights.
        compute: dtype of its convolutions.
    """

    config: AutoencoderConfig
    digest: str
    compute: str


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The arrays of one labelled example and how they become the normalised input x of the network.

    "pixels": `image` uint8 (H, W, C), which is x, or with an `encoder` (factor H, factor W, 3), of which x is encoded.
    "moments": `moments` (H, W, 2C), mean then spread of the encoder's Gaussian, from which a latent is sampled.
    "latents": `latent` (H, W, C). Moments and latents are as the autoencoder gives them and `scaling` normalises them;
    latents stored normalised have the identity scaling. A format that cannot know the scaling or the class names from
    its files leaves them to the config: `unstated` and ().

    Attributes:
        holds: "pixels" | "moments" | "latents".
        latent_shape: (H, W, C) of x.
        dtype: as stored: "uint8" for pixels, otherwise one of FLOATS.
        mirrored: each example is mirrored with probability 1/2; moments and latents store their mirror images too.
        scaling: of the latents.
        class_names: one for each class.
        identity: names the data in every process and run; empty where no data have been opened.
        spread: second half of moments: "std" | "logvar", which is clamped to LOG_VARIANCES.
        channels_first: moments and latents are stored (C, H, W).
        encoder: of pixels, for a model of latents.
    """

    holds: str
    latent_shape: tuple[int, int, int]
    dtype: str
    mirrored: bool
    scaling: LatentScaling
    class_names: tuple[str, ...]
    identity: str = ""
    spread: str = "std"
    channels_first: bool = False
    encoder: Encoder | None = None

    def __post_init__(self):
        check(self.spread in SPREADS, "spread", self.spread, f"one of {', '.join(SPREADS)}")
        check(self.holds in FORMS, "data.holds", self.holds, f"one of {', '.join(FORMS)}")
        dtypes = ("uint8",) if self.holds == "pixels" else FLOATS
        check(self.dtype in dtypes, "data.dtype", self.dtype, f"{' or '.join(dtypes)} for {self.holds}")
        check(
            self.scaling.channels == self.latent_shape[-1],
            "latents.scale",
            self.scaling.scale,
            f"one factor for each of the {self.latent_shape[-1]} channels",
        )

    @property
    def num_classes(self) -> int:
        """Number of classes: labels are 0..num_classes-1."""
        return len(self.class_names)

    @property
    def array(self) -> str:
        """The name of the array that x comes from."""
        return FORMS[self.holds]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images of pixels."""
        if self.encoder is None:
            return self.latent_shape
        return tuple(side * self.encoder.config.factor for side in self.latent_shape[:2]) + (3,)  # type: ignore

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """name -> (shape, dtype) of each array of one example, without the batch axis."""
        height, width, channels = self.image_shape
        channels *= 2 if self.holds == "moments" else 1
        stored = ((channels, height, width) if self.channels_first else (height, width, channels)), self.dtype
        flipped = self.mirrored and self.holds != "pixels"  # pixels are mirrored on the device
        return {self.array: stored, **({self.array + FLIPPED: stored} if flipped else {}), "label": ((), "int32")}

    def abstract(self, batch: int, sharding: Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of `batch` examples as shapes, dtypes and a sharding."""
        return {
            name: jax.ShapeDtypeStruct((batch, *shape), jnp.dtype(dtype), sharding=sharding)
            for name, (shape, dtype) in self.arrays.items()
        }

    def completed(self, promise: "BatchSpec") -> "BatchSpec":
        """The same, with the scaling and the class names of `promise` where the files do not state them.

        Images that it promises to encode are described as the latents that they become.
        """
        if promise.encoder and self.holds == "pixels" and self.latent_shape == promise.image_shape:
            names, by = self.class_names or promise.class_names, f"{self.identity} by {promise.encoder.digest[:12]}"
            return dataclasses.replace(promise, class_names=names, identity=by)
        stated = self.scaling.name != UNSTATED or self.scaling.channels != promise.scaling.channels
        scaling = self.scaling if stated else promise.scaling
        return dataclasses.replace(self, scaling=scaling, class_names=self.class_names or promise.class_names)

    def check_keeps(self, promise: "BatchSpec", undecided: tuple[str, ...] = ()) -> None:
        """Raise UserError naming the first difference between opened data and what the config promises of them.

        undecided: fields that the config leaves to the data; "scaling" leaves its numbers, not the autoencoder.
        """
        check(
            self.latent_shape == promise.latent_shape,
            "data image shape",
            self.latent_shape,
            f"{promise.latent_shape}, the model's input_size and channels",
            "set data.pad or the model's input_size" if self.holds == "pixels" else "name latents of that size",
        )
        check(
            self.num_classes == promise.num_classes,
            "model.num_classes",
            promise.num_classes,
            f"{self.num_classes}, the classes of {self.identity}",
        )
        for name in ("holds", "dtype", "mirrored"):
            found, wanted = getattr(self, name), getattr(promise, name)
            check(found == wanted or name in undecided, f"data.{name}", wanted, f"{found!r}, as in {self.identity}")
        stored, wanted = self.scaling, promise.scaling
        free = "scaling" in undecided or stored.is_identity or wanted.is_identity
        if self.holds != "pixels" and stored != wanted and not (free and stored.name == wanted.name):
            raise UserError(
                name="latents",
                value=wanted,
                expected=f"{stored}, as in {self.identity}",
                fix="use other latents, set config.latents to these numbers, or, to take them, name data.source",
            )


def unstated(channels: int) -> LatentScaling:
    """The scaling of a format whose files do not state it."""
    return identity(UNSTATED, channels, "half")


def pixels(
    image_shape: tuple[int, ...], class_names: tuple[str, ...], mirrored: bool | str = False, identity: str = ""
) -> BatchSpec:
    """The specification of uint8 images (H, W, C); where mirroring is left to the data ("auto") there is none."""
    height, width, channels = image_shape
    scaling = from_factor("pixels", 1.0, channels, "half")
    return BatchSpec("pixels", (height, width, channels), "uint8", mirrored is True, scaling, class_names, identity)
