"""What is to be imported from a published file, or why it cannot be: from names, shapes and metadata alone.

Nothing here imports JAX, which takes longer than the rest: a wrong file is refused in a moment, before a tensor
is read. `ig_jax.importing` carries a plan out.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ig_jax.errors import UserError, check
from ig_jax.interop import autoencoder_weights, claims, published, recognition
from ig_jax.interop.experiment import ARITHMETIC, recipe
from ig_jax.interop.weight_files import LazyTensor, open_weights
from ig_jax.models import zoo
from ig_jax.models.autoencoder_config import SD_VAE, VA_VAE, AutoencoderConfig
from ig_jax.models.dit_config import DiTConfig

EMA_DECAY = 0.9999  # of every published average: update_ema of SiT, DiT, LightningDiT and the IG release
RAW = 0.0  # the decay whose average is the raw weights
STATS_PAGE = "huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2"
_FLOATS = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user says about a denoiser's file; empty or 0 for what the file or the release says."""

    which: str
    family: str
    num_heads: int
    inter_depth: int
    latent_stats: str
    name: str


@dataclasses.dataclass(frozen=True)
class Latents:
    """What a network's latents are: name, and mean and std float64 [C] of each channel where a file gave them."""

    name: str  # "sd_vae" | "va_vae_f16d32" | "pixels", as in configs/
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A recognised SiT, DiT or LightningDiT file."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    name: str  # of the experiment
    family: str
    model: DiTConfig
    said: claims.Claims
    depth_from: str  # who says where the intermediate head is
    latents: Latents
    ema_decay: float

    @classmethod
    def of(
        cls, file: Path, metadata: Mapping, tensors: Mapping[str, LazyTensor], choices: Choices
    ) -> "Denoiser":
        """Recognise the network.  Raises: UserError for a network that is unknown or not whole."""
        said = claims.read(metadata)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        settings = recognition.recognise(
            shapes, said, family=choices.family, num_heads=choices.num_heads, inter_depth=choices.inter_depth
        )
        model = DiTConfig(**settings, **ARITHMETIC)
        published.check_complete(shapes, model)
        for name, tensor in tensors.items():
            check(tensor.dtype in _FLOATS, f"dtype of tensor {name}", str(tensor.dtype), "a float type")
        said_by = "the file says" if said.inter_depth else "as in the release"
        return cls(
            file, tensors, choices.name, recognition.family_of(shapes, said, choices.family), model, said,
            "given" if choices.inter_depth else said_by, latents_of(model, choices.latent_stats),
            EMA_DECAY if choices.which == "ema" else RAW,
        )

    def describe(self) -> str:
        """What was recognised, line by line."""
        m, s = self.model, recipe(self.family, self.model.width, bool(self.model.inter_depth))
        sizes = [size for size, entries in zoo.SIZES.items()
                 if all(getattr(m, key) == value for key, value in entries.items())]
        size = f"{sizes[0]}/{m.patch_size}" if sizes else "of no published size"
        form = [m.norm, m.mlp, "rope" if m.rope else "", f"qk {m.qk_norm}" if m.qk_norm != "none" else "",
                "" if m.adaln_shift else "no shift", f"sigma channels {m.sigma_channels}", m.clock]
        head = f"after block {m.inter_depth[0]} ({self.depth_from})" if m.inter_depth else "none"
        count = sum(math.prod(shape) for shape in published.parameter_shapes(m).values())
        raw = "" if self.ema_decay else " (the raw weights)"
        return "\n".join([
            f"file        {self.file.name}, EMA {self.ema_decay}{raw}",
            f"network     {self.family} {size}: {m.depth} blocks, width {m.width}, {m.num_heads} heads, "
            f"{m.input_size}x{m.input_size}x{m.channels}, {m.num_classes} classes; {count:,} parameters",
            f"form        {', '.join(filter(None, form))}",
            f"head        {head}",
            f"latents     {self.latents.name}",
            f"sample      {s['solver']} {s['steps']} steps; IG {s['ig_scale']:g} on ({s['ig_interval'][0]:g}, "
            f"{s['ig_interval'][1]:g}], CFG {s['cfg_scale']:g} on ({s['cfg_interval'][0]:g}, "
            f"{s['cfg_interval'][1]:g}]",
        ])


def latents_of(model: DiTConfig, stats: str) -> Latents:
    """What the network's latents are, from the file of statistics or else from their shape.

    Raises: UserError for VA-VAE latents without statistics, or statistics of other latents.
    """
    channels = model.channels
    if stats:
        return Latents(f"va_vae_f{VA_VAE.factor}d{channels}", *_statistics(stats, channels))
    if channels == SD_VAE.latent_channels:
        return Latents("sd_vae")
    if channels == VA_VAE.latent_channels and model.input_size in (16, 32):
        raise UserError(f"latents of {model.input_size}x{model.input_size}x32 are VA-VAE's, whose mean and "
                        f"std are in no checkpoint; give --latent_stats=latents_stats.pt (see {STATS_PAGE})")
    return Latents("pixels")


def _statistics(file: str, channels: int) -> list[np.ndarray]:
    with open_weights(file) as weights:
        tensors = weights.state_dict("model")
        check(tensors.keys() >= {"mean", "std"}, f"{file} tensors", sorted(tensors)[:4], "mean and std")
        sizes = tuple(math.prod(tensors[name].shape) for name in ("mean", "std"))
        check(sizes == (channels, channels), f"{file} channels", sizes, f"{channels} each")
        return [tensors[name].read().astype(np.float64).reshape(-1) for name in ("mean", "std")]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A recognised SD-VAE or VA-VAE file."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    config: AutoencoderConfig
    naming: str

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, LazyTensor]) -> "Autoencoder":
        """Recognise the network.  Raises: UserError for a network that is unknown or not whole."""
        config = autoencoder_weights.recognise(tensors, groups=_groups(file))
        autoencoder_weights.check_complete(tensors, config)
        return cls(file, tensors, config, autoencoder_weights.naming_of(tensors))

    def describe(self) -> str:
        """What was recognised, line by line."""
        c = self.config
        count = sum(math.prod(shape) for shape in autoencoder_weights.flat_shapes(c).values())
        return "\n".join([
            f"file        {self.file.name}, {self.naming} names",
            f"autoencoder {c.factor}x smaller, {c.latent_channels} latent channels; levels {c.channels}, "
            f"{c.layers} blocks each, groups of {c.groups}; {count:,} parameters",
        ])


def _groups(file: Path) -> int:
    """Groups of the norms, which no shape shows, from the config.json that diffusers puts beside weights."""
    try:
        beside = json.loads(file.with_name("config.json").read_text())
        groups = beside["norm_num_groups"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 32  # of every published file
    check(type(groups) is int and groups > 0, f"{file.with_name('config.json')} norm_num_groups", groups,
          "a positive number of groups")
    return groups


def plan(
    file: Path, metadata: Mapping, tensors: Mapping[str, LazyTensor], choices: Choices
) -> Denoiser | Autoencoder:
    """The plan of a denoiser's or an autoencoder's import.  Raises: UserError for any other file."""
    names = autoencoder_weights.weights_of(tensors)
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return Autoencoder.of(file, tensors)
    return Denoiser.of(file, metadata, tensors, choices)
