"""A published file to a checkpoint directory.

An import is planned from names, shapes and metadata, and refused there, before a tensor is read. Tensors then
come one at a time: beside the parameters themselves little memory is needed.
"""

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError, check
from ig_jax.interop import (
    autoencoder_checkpoint,
    autoencoder_weights,
    claims,
    published,
    recognition,
)
from ig_jax.interop.experiment import ARITHMETIC, experiment
from ig_jax.interop.weight_files import LazyTensor, open_weights
from ig_jax.models import dit, zoo
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling, from_mean_std
from ig_jax.progress import Progress
from ig_jax.training import checkpoints as ckpt

PACKAGES = ("ig_jax", "jax", "flax", "orbax-checkpoint", "numpy")
EMA_DECAY = 0.9999  # of every published average: update_ema of SiT, DiT, LightningDiT and the IG release
RAW = 0.0  # the decay whose average is the raw weights
STATS_PAGE = "huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2"
_FLOATS = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))
BUFFERS = "buffers"  # item of the published constants that the network computes for itself


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user says about a denoiser's file; empty or 0 for what the file or the release says."""

    which: str
    family: str
    num_heads: int
    inter_depth: int
    latent_stats: str
    name: str


def is_autoencoder(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether these are an autoencoder's weights rather than a denoiser's."""
    names = autoencoder_weights.weights_of(tensors)
    return any(name.startswith(("encoder.", "decoder.")) for name in names)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A recognised SiT, DiT or LightningDiT file."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    experiment: Experiment
    family: str
    depth_from: str  # who says where the intermediate head is
    step: int

    @classmethod
    def of(
        cls, file: Path, metadata: Mapping, tensors: Mapping[str, LazyTensor], choices: Choices
    ) -> "Denoiser":
        """Recognise the network.  Raises: UserError, before any tensor is read."""
        said = claims.read(metadata)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        settings = recognition.recognise(
            shapes, said, family=choices.family, num_heads=choices.num_heads, inter_depth=choices.inter_depth
        )
        model = bind(dit.DiTConfig, settings | ARITHMETIC, "network")
        published.check_complete(shapes, model)
        for name, tensor in tensors.items():
            check(tensor.dtype in _FLOATS, f"dtype of tensor {name}", str(tensor.dtype), "a float type")
        family = recognition.family_of(shapes, said, choices.family)
        latents = latent_scaling(model, choices.latent_stats, said.latent_multiplier)
        decay = EMA_DECAY if choices.which == "ema" else RAW
        config = experiment(choices.name, family, settings, latents.to_json(), said, decay)
        said_by = "the file says" if said.inter_depth else "as in the release"
        return cls(file, tensors, bind(Experiment, config), family,
                   "given" if choices.inter_depth else said_by, said.step)

    def describe(self) -> str:
        """What was recognised, line by line."""
        e, m, s = self.experiment, self.experiment.model, self.experiment.sample
        sizes = [size for size, entries in zoo.SIZES.items()
                 if all(getattr(m, key) == value for key, value in entries.items())]
        size = f"{sizes[0]}/{m.patch_size}" if sizes else "of no published size"
        form = [m.norm, m.mlp, "rope" if m.rope else "", f"qk {m.qk_norm}" if m.qk_norm != "none" else "",
                "" if m.adaln_shift else "no shift", f"sigma channels {m.sigma_channels}", m.clock]
        head = f"after block {m.inter_depth[0]} ({self.depth_from})" if m.inter_depth else "none"
        count = sum(math.prod(shape) for shape in published.parameter_shapes(m).values())
        raw = "" if e.ema.decays[0] else " (the raw weights)"
        return "\n".join([
            f"file        {self.file.name}, EMA {e.ema.names[0]}{raw}",
            f"network     {self.family} {size}: {m.depth} blocks, width {m.width}, {m.num_heads} heads, "
            f"{m.input_size}x{m.input_size}x{m.channels}, {m.num_classes} classes; {count:,} parameters",
            f"form        {', '.join(filter(None, form))}",
            f"head        {head}",
            f"latents     {e.latents.name}",
            f"sample      {s.solver} {s.steps} steps; IG {s.ig_scale:g} on ({s.ig_interval[0]:g}, "
            f"{s.ig_interval[1]:g}], CFG {s.cfg_scale:g} on ({s.cfg_interval[0]:g}, {s.cfg_interval[1]:g}]",
        ])

    def read(self) -> dict[str, dict[str, jax.Array]]:
        """The items of the checkpoint, the file read one tensor at a time.  Raises: UserError for damage."""
        names = [name for name in published.ROPE_BUFFERS if name in self.tensors]
        # The network computes its own tables, but not to the last bit as torch does: kept for the way back.
        buffers = {name: jnp.asarray(self.tensors[name].read()) for name in names}
        published.check_rope_buffers(buffers, self.experiment.model)
        params = self._read_params()
        return {f"ema_{self.experiment.ema.names[0]}": params} | ({BUFFERS: buffers} if buffers else {})

    def _read_params(self) -> dict[str, jax.Array]:
        model, params, read_bytes = self.experiment.model, {}, 0
        state = {name: tensor.read for name, tensor in self.tensors.items()}
        total = len(published.parameter_shapes(model))
        with Progress(total, "tensors", stream=sys.stderr) as progress:
            for name, array in published.read_params(state, model):
                array = np.asarray(array, np.float32, order="C")
                if not np.isfinite(array).all():
                    theirs = published.published_name(name, model)
                    raise UserError(f"{self.file}: tensor {theirs} holds values that are not finite; "
                                    "take a checkpoint from before training diverged")
                params[name] = jnp.asarray(array)
                read_bytes += array.nbytes
                progress.advance()
                if len(params) % -(-total // 4) == 0 or len(params) == total:
                    progress.show(f"{read_bytes / 1e6:,.0f} MB read")
        return params

    def write(self, directory: Path, items: dict[str, dict[str, jax.Array]]) -> None:
        """The items as the one step of a work directory.  Raises: UserError when it cannot be written."""
        e = self.experiment
        dtypes = {name: str(t.dtype) for name, t in self.tensors.items() if t.dtype != np.float32}
        meta = {
            "config": e.as_dict(),
            "data": {},
            "labels": [str(i) for i in range(e.model.num_classes)],
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "devices": jax.device_count(),
            "source": {"file": self.file.name, "bytes": self.file.stat().st_size, "dtypes": dtypes},
        }
        ckpt.write_step(directory / "checkpoints", self.step, items, meta)
        (directory / "config.json").write_text(json.dumps(e.as_dict(), indent=2) + "\n")


def latent_scaling(model: dit.DiTConfig, stats: str, multiplier: float) -> LatentScaling:
    """What the network's latents are, from the file of statistics or else from their shape.

    Raises: UserError for VA-VAE latents without statistics, or statistics of other latents.
    """
    channels = model.channels
    if stats:
        with open_weights(stats) as weights:
            tensors = weights.state_dict("model")
            check(tensors.keys() >= {"mean", "std"}, f"{stats} tensors", sorted(tensors)[:4], "mean and std")
            sizes = tuple(math.prod(tensors[name].shape) for name in ("mean", "std"))
            check(sizes == (channels, channels), f"{stats} channels", sizes, f"{channels} each")
            mean, std = (tensors[name].read().astype(np.float64).reshape(-1) for name in ("mean", "std"))
        return from_mean_std("va_vae", mean, std / multiplier, "half")
    if channels == SD_VAE_SCALING.channels:
        return SD_VAE_SCALING
    if channels == 32 and model.input_size in (16, 32):
        raise UserError(f"latents of {model.input_size}x{model.input_size}x32 are VA-VAE's, whose mean and "
                        f"std are in no checkpoint; give --latent_stats=latents_stats.pt (see {STATS_PAGE})")
    return LatentScaling("pixels", (0.0,) * channels, (1.0,) * channels, "half")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A recognised SD-VAE or VA-VAE file."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    config: AutoencoderConfig
    naming: str

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, LazyTensor]) -> "Autoencoder":
        """Recognise the network.  Raises: UserError, before any tensor is read."""
        config = autoencoder_weights.recognise(tensors, groups=_groups(file))
        autoencoder_weights.check_complete(tensors, config)
        return cls(file, tensors, config, autoencoder_weights.naming_of(tensors))

    def describe(self) -> str:
        """What was recognised, line by line."""
        c = self.config
        count = sum(math.prod(leaf.shape) for leaf in autoencoder_weights.flat_shapes(c).values())
        return "\n".join([
            f"file        {self.file.name}, {self.naming} names",
            f"autoencoder {c.factor}x smaller, {c.latent_channels} latent channels; levels {c.channels}, "
            f"{c.layers} blocks each, groups of {c.groups}; {count:,} parameters",
        ])

    def read(self) -> dict:
        """The parameter tree.  Raises: UserError for damaged tensors."""
        return autoencoder_weights.to_params(self.tensors, self.config)

    def write(self, directory: Path, params: dict) -> None:
        """The autoencoder's directory.  Raises: UserError when it cannot be written."""
        autoencoder_checkpoint.save(directory, self.config, params, self.naming)


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
