"""Import of published weight files: recognition, description, reading, writing of the checkpoint directory.

Tensors are read one at a time, so that little memory is needed in addition to the parameters themselves.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.base.progress import Progress
from ig_jax.base.schema import bind
from ig_jax.base.versions import versions
from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.checkpoints import steps as ckpt
from ig_jax.config import published as published_settings
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.presets import AUTOENCODERS, VA_VAE_STATS
from ig_jax.interop import autoencoder_weights, diffusers_dit, hub, published, recognition
from ig_jax.models import autoencoder, zoo
from ig_jax.models.autoencoder import SD_VAE, VA_VAE, AutoencoderConfig
from ig_jax.models.dit import DiTConfig
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling, from_mean_std
from ig_jax.weightfiles.files import LazyTensor
from ig_jax.weightfiles.sets import channel_statistics

ARITHMETIC: dict[str, Any] = dict(dtype="float32", scan_blocks=False, remat="none")  # that of the published numbers
EMA_DECAY = 0.9999  # of every published average: update_ema of SiT, DiT, LightningDiT and the IG release
RAW = 0.0  # the decay whose average is the raw weights
BUFFERS = "buffers"  # checkpoint item of the published constants that the network computes for itself
_FLOATS = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True)
class Choices:
    """The user's choices for a denoiser's file; empty or 0 for what the file stores or the release uses."""

    which: str  # "ema" | "model"
    family: str
    num_heads: int
    inter_depth: int
    latent_stats: str  # file of the mean and std of each latent channel
    name: str  # of the experiment
    input_size: int = 0  # latent pixels along an edge, where no tensor shows them
    place: str = ""  # of the network in the file
    outside: tuple[str, ...] = ()  # what the file holds next to the network
    paths: tuple[Path, ...] = ()  # of all files read, several for shards
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # their place and revision on the hub

    def source(self) -> dict[str, Any]:
        """What a checkpoint stores of the files: their place and revision on the hub, and their sha256."""
        return source_of(self.paths, self.origin)


def source_of(paths: tuple[Path, ...], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Where files come from, and their sha256."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {**origin, "sha256": digests}


def prepare(
    file: Path, metadata: Mapping, tensors: Mapping[str, LazyTensor], choices: Choices
) -> "DenoiserImport | AutoencoderImport":
    """The import of an open weight file, whose tensors are not read yet: call `read`, then `write`.

    Raises: UserError for a network that is unknown or incomplete.
    """
    if not any(name.startswith("blocks.") for name in tensors) and any("coder." in name for name in tensors):
        return AutoencoderImport.of(file, tensors, choices)
    return DenoiserImport.of(file, metadata, tensors, choices)


@dataclasses.dataclass(frozen=True)
class DenoiserImport:
    """A recognised SiT, DiT or LightningDiT file and the experiment that its checkpoint will hold."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    family: str
    head_from: str  # where the depth of the intermediate head comes from
    step: int
    experiment: Experiment
    naming: str  # "release" | "diffusers"
    left_out: list[str]  # parts of the file that the network does not need
    choices: Choices

    @classmethod
    def of(cls, file: Path, metadata: Mapping, tensors: Mapping[str, LazyTensor], choices: Choices) -> "DenoiserImport":
        """Recognise the network.  Raises: UserError for a network that is unknown or incomplete."""
        stored, naming, left_out = recognition.FileSettings.of(metadata), "release", [*choices.outside]
        if diffusers_dit.is_diffusers(tensors):
            found = diffusers_dit.config_json(file)
            heads, size = found.get("num_attention_heads"), found.get("sample_size")
            stored = dataclasses.replace(stored, family="dit", num_heads=heads if type(heads) is int else 0)
            size = choices.input_size or (size if type(size) is int and 0 < size <= 1024 else 32)
            tensors, naming = diffusers_dit.to_release(tensors, size), "diffusers"
        tensors, parts = published.without_training_parts(tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        asked, heads, depth = choices.family, choices.num_heads, choices.inter_depth
        settings = recognition.recognise(shapes, stored, family=asked, num_heads=heads, inter_depth=depth)
        family = recognition.family_of(shapes, stored, asked)
        model = DiTConfig(**settings, **ARITHMETIC)
        published.check_complete(shapes, model)
        for name, tensor in tensors.items():
            check(tensor.dtype in _FLOATS, f"dtype of tensor {name}", str(tensor.dtype), "a float type")
        latents = latent_scaling(model, choices.latent_stats, stored.latent_multiplier)
        config = bind(Experiment, experiment(choices, family, model, latents, stored))
        head_from = "stored in the file" if stored.inter_depth else "as in the release"
        head_from = "given" if choices.inter_depth else head_from
        left_out += parts
        return cls(file, tensors, family, head_from, stored.step, config, naming, left_out, choices)

    def describe(self) -> str:
        """What was recognised, line by line."""
        e, m = self.experiment, self.experiment.model
        sizes = [name for name, size in zoo.SIZES.items() if all(getattr(m, k) == v for k, v in size.items())]
        size = f"{sizes[0]}/{m.patch_size}" if sizes else "of no published size"
        shown = {"rope": m.rope, f"qk {m.qk_norm}": m.qk_norm != "none", "no shift": not m.adaln_shift}
        form = [m.norm, m.mlp, *(word for word, holds in shown.items() if holds), f"sigma channels {m.sigma_channels}"]
        count = sum(math.prod(shape) for shape in published.parameter_shapes(m).values())
        decoder = AUTOENCODERS.get(e.latents.name)
        raw = " (the raw weights)" if e.ema.decays == (RAW,) else ""
        lines = {
            "file": ", ".join(filter(None, (self.file.name, self.choices.place, f"EMA {e.ema.decays[0]}{raw}"))),
            "network": f"{self.family} {size}: {m.depth} blocks, width {m.width}, {m.num_heads} heads, "
            f"{m.input_size}x{m.input_size}x{m.channels}, {m.num_classes} classes; {count:,} parameters",
            "form": ", ".join([*form, m.clock]),
            "head": f"after block {m.inter_depth[0]} ({self.head_from})" if m.inter_depth else "none",
            "latents": e.latents.name + (f", decoded by {decoder}" if decoder else ""),
            "left out": ", ".join(self.left_out) or "nothing",
            "sample": ", ".join(f"{name} {value}" for name, value in e.sample.flat().items()),
        }
        return "\n".join(f"{title:<12}{text}" for title, text in lines.items())

    def read(self) -> dict[str, dict[str, jax.Array]]:
        """The items of the checkpoint, the file read one tensor at a time.  Raises: UserError for damage."""
        # The network computes its own tables, but not bitwise as torch does: the file's are kept for the way back.
        stored = [name for name in published.ROPE_BUFFERS if name in self.tensors]
        tables = {name: jnp.asarray(self.tensors[name].read()) for name in stored}
        published.check_rope_buffers(tables, self.experiment.model)
        items = {f"ema_{self.experiment.ema.names[0]}": self._read_params()}
        return items | ({BUFFERS: tables} if tables else {})

    def _read_params(self) -> dict[str, jax.Array]:
        model, params = self.experiment.model, {}
        state = {name: tensor.read for name, tensor in self.tensors.items()}
        with Progress(len(published.parameter_shapes(model)), "tensors", stream=sys.stderr) as progress:
            for name, array in published.read_params(state, model):
                array = np.asarray(array, np.float32, order="C")
                if not np.isfinite(array).all():
                    theirs = f"tensor {published.published_name(name, model)}"
                    what = f"{self.file}: {theirs} holds values that are not finite"
                    raise UserError(what, name=theirs, fix="take a checkpoint from before training diverged")
                params[name] = jnp.asarray(array)
                progress.count("read")
        return params

    def write(self, directory: Path, items: dict[str, dict[str, jax.Array]]) -> None:
        """The items as the one step of a work directory.  Raises: UserError when it cannot be written."""
        e = self.experiment
        dtypes = {name: str(t.dtype) for name, t in self.tensors.items() if t.dtype != np.float32}
        meta = {
            "config": e.as_dict(),
            "data": {},
            "labels": [str(i) for i in range(e.model.num_classes)],
            "versions": versions(),
            "devices": jax.device_count(),
            "source": {"file": self.file.name, "naming": self.naming, "dtypes": dtypes, **self.choices.source()},
        }
        ckpt.write_step(directory / "checkpoints", self.step, items, meta)
        (directory / "config.json").write_text(json.dumps(e.as_dict(), indent=2) + "\n")


def experiment(
    choices: Choices, family: str, model: DiTConfig, latents: LatentScaling, stored: recognition.FileSettings
) -> dict:
    """The sections of a converted checkpoint's config: the published settings, and what the file stores."""
    found = published_settings.of_network(family, model, latents)
    if found["process"]["kind"] != "gaussian":  # which has no choice of path and prediction
        found["process"] |= {"kind": stored.path or "linear", "prediction": stored.prediction or "velocity"}
    found["name"] = choices.name
    found["ema"] = {"decays": (EMA_DECAY if choices.which == "ema" else RAW,), "warmup": False}
    found["run"] |= {"steps": stored.step + 1}
    return found


def latent_scaling(model: DiTConfig, stats: str, multiplier: float = 1.0) -> LatentScaling:
    """The scaling of a network's latents, from the file of statistics or else from their shape.

    Raises: UserError for VA-VAE latents without statistics, or for statistics of other latents.
    """
    channels = model.channels
    if stats:
        mean, std = channel_statistics(hub.located(stats, "--latent_stats")[0], channels)
        return from_mean_std(f"va_vae_f{VA_VAE.factor}d{channels}", mean, std / multiplier, "half")
    if channels == SD_VAE.latent_channels:
        return SD_VAE_SCALING
    if channels == VA_VAE.latent_channels and model.input_size in (16, 32):
        what = f"latents of {model.input_size}x{model.input_size}x32 are VA-VAE's, whose statistics no checkpoint has"
        fix = f"give --latent_stats=latents_stats.pt, or {VA_VAE_STATS}"
        raise UserError(what, name="--latent_stats", value="", fix=fix)
    return LatentScaling("pixels", (0.0,) * channels, (1.0,) * channels, "half")


@dataclasses.dataclass(frozen=True)
class AutoencoderImport:
    """A recognised SD-VAE or VA-VAE file."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    config: AutoencoderConfig
    naming: str
    choices: Choices

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, LazyTensor], choices: Choices) -> "AutoencoderImport":
        """Recognise the network.  Raises: UserError for a network that is unknown or incomplete."""
        config = autoencoder_weights.recognise(tensors, groups=_groups(file))
        autoencoder_weights.check_complete(tensors, config)
        naming = autoencoder_weights.naming_of(tensors)
        return cls(file, tensors, config, naming, choices)

    def describe(self) -> str:
        """What was recognised, line by line."""
        c = self.config
        count = sum(leaf.size for leaf in autoencoder.shapes(c).values())
        return (
            f"file        {self.file.name}, {self.naming} names\n"
            f"autoencoder {c.factor}x smaller, {c.latent_channels} latent channels; levels {c.channels}, "
            f"{c.layers} blocks each, groups of {c.groups}; {count:,} parameters\n"
            f"left out    {', '.join(self.choices.outside) or 'nothing'}"
        )

    def read(self) -> dict[str, np.ndarray]:
        """The parameters by name.  Raises: UserError for damaged tensors."""
        return autoencoder_weights.to_params(self.tensors, self.config)

    def write(self, directory: Path, params: dict[str, np.ndarray]) -> None:
        """The autoencoder's directory.  Raises: UserError when it cannot be written."""
        autoencoder_checkpoint.save(directory, self.config, params, self.naming, self.choices.source())


def _groups(file: Path) -> int:
    """Groups of the norms, which no shape shows, from the config.json that diffusers puts next to the weights."""
    groups = diffusers_dit.config_json(file).get("norm_num_groups", 32)  # 32 in every published file
    name = f"{file.with_name('config.json')} norm_num_groups"
    check(type(groups) is int and groups > 0, name, groups, "a positive number of groups")
    return groups
