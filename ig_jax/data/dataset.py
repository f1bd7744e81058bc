"""The data section of a config, and the opened splits it describes."""

import dataclasses

from ig_jax.base.errors import check
from ig_jax.data import sources, statistics
from ig_jax.data.formats import registry
from ig_jax.data.spec import BatchSpec
from ig_jax.models.latents import PIXELS, LatentScaling

AUTO = "auto"  # a setting that the data decide
IMAGES = ("images", "parquet")  # sources of images that are cropped to any size
COMPUTE = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Labelled data: where they are, and what a batch of them holds.

    Attributes:
        source: a format of data/formats, or "auto": the one that recognises the folder.
        name: TFDS name, for source "tfds".
        folder: TFDS data directory ("" for the TFDS default), or the folder or file of any other format.
        split: to train on.
        test_split: held out, for evaluation.
        batch_size: global, images per step.
        pad: zero pixels added on each side.
        in_memory: decode everything once (small sets).
        holds: "pixels" | "moments" (mean and spread of an encoder) | "latents"; this and the next two may be "auto",
            which takes them from the data, and before they are opened moments in bfloat16 of both mirrors.
        dtype: of the stored numbers: "uint8" for pixels, otherwise "float32" | "bfloat16" | "float16".
        mirrored: mirror half of the images; moments and latents must then be stored both ways.
        compute: dtype of the convolutions that encode images in the step, for a model of latents.
    """

    source: str
    name: str
    folder: str
    split: str
    test_split: str
    batch_size: int
    pad: int
    in_memory: bool
    holds: str
    dtype: str
    mirrored: bool | str
    compute: str = "float32"

    def __post_init__(self):
        check(self.mirrored in (True, False, AUTO), "mirrored", self.mirrored, f"True, False or {AUTO!r}")
        known = (AUTO, *registry.names())
        check(self.source in known, "source", self.source, f"one of {', '.join(known)}")
        for name in ("split", "test_split"):
            check(getattr(self, name) != "", name, getattr(self, name), "a split name")
        check(self.compute in COMPUTE, "compute", self.compute, f"one of {', '.join(COMPUTE)}")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 image")
        check(self.pad >= 0, "pad", self.pad, "at least 0 pixels")

    @property
    def undecided(self) -> tuple[str, ...]:
        """The fields of a BatchSpec that this section leaves to the data."""
        fields = tuple(name for name in ("holds", "dtype", "mirrored") if getattr(self, name) == AUTO)
        # Who names a format means its numbers too.
        return fields if self.source == AUTO else (*fields, "scaling")

    def spec(self, latent_shape: tuple[int, int, int], scaling: LatentScaling, num_classes: int) -> BatchSpec:
        """What this section promises of its data, before they are opened, for a model of that input."""
        classes = tuple(map(str, range(num_classes)))
        of_pixels = scaling.name == PIXELS.name
        holds = "pixels" if of_pixels or self.source in IMAGES else "moments"
        holds = holds if self.holds == AUTO else self.holds
        return BatchSpec(
            holds,
            latent_shape,
            ("uint8" if holds == "pixels" else "bfloat16") if self.dtype == AUTO else self.dtype,
            not of_pixels if self.mirrored == AUTO else bool(self.mirrored),
            scaling,
            classes,
        )

    def of_data(self, spec: BatchSpec) -> "DataConfig":
        """This section with what it leaves to the data as found in them."""
        found = {name: getattr(spec, name) for name in self.undecided if name != "scaling"}
        return dataclasses.replace(self, **found)


def open_split(config: DataConfig, split: str, promise: BatchSpec) -> sources.Source:
    """The source of one split, its labels checked where they are known.

    Raises: UserError when the data cannot be opened or are not what `promise` says of them.
    """
    name = registry.recognised(config.folder) if config.source == AUTO else config.source
    height, width, channels = promise.image_shape
    shape = (height - 2 * config.pad, width - 2 * config.pad, channels)
    more = (shape,) if registry.crops(name) else ()
    source = sources.pad(registry.opener(name)(config, split, *more), config.pad)
    source = dataclasses.replace(source, spec=source.spec.completed(promise))
    source.spec.check_keeps(promise, config.undecided)
    source.check_labels()
    if source.spec.holds != "pixels":
        statistics.check_scaling(source)
    return sources.in_memory(source) if config.in_memory else source
