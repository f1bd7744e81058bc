"""Published autoencoder weights <-> our parameters: names, array layouts, and the config their shapes imply.

Three namings occur: "diffusers" (AutoencoderKL of huggingface/diffusers), "diffusers_old" (the same before
its attention was renamed; the files most people hold) and "ldm" (CompVis/latent-diffusion; VA-VAE). Nothing here
needs JAX.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ig_jax.errors import UserError, check
from ig_jax.models.autoencoder_config import AutoencoderConfig, parameter_shapes

# Training-only parts of an LDM or VA-VAE checkpoint: perceptual and discriminator loss, the frozen vision
# model, the projection its features are compared in, a moving average the published loader ignores too.
IGNORED_PREFIXES = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")

_LIMIT_DEPTH = 16  # a file can name thousands; the published ones have 5

# Our path component -> theirs; a component that is not listed keeps its name.
_LDM = {
    "blocks": "block", "attentions": "attn", "downsample": "downsample.conv", "upsample": "upsample.conv",
    "block1": "block_1", "attention": "attn_1", "block2": "block_2", "shortcut": "nin_shortcut",
    "out": "proj_out", "kernel": "weight", "scale": "weight",
}
_DIFFUSERS = {
    "down": "down_blocks", "up": "up_blocks", "blocks": "resnets", "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv", "mid": "mid_block", "block1": "resnets.0", "attention": "attentions.0",
    "block2": "resnets.1", "shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "norm": "group_norm",
    "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0", "kernel": "weight", "scale": "weight",
}
_DIFFUSERS_OLD = _DIFFUSERS | {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
NAMINGS = {"diffusers": _DIFFUSERS, "diffusers_old": _DIFFUSERS_OLD, "ldm": _LDM}


class Tensor(Protocol):
    """A stored tensor whose bytes are fetched only by read()."""

    shape: tuple[int, ...]

    def read(self) -> np.ndarray: ...


def weights_of(state: Mapping) -> dict[str, Tensor]:
    """The autoencoder's own tensors, out of a "state_dict" (nested or as a prefix), without IGNORED_PREFIXES.

    Counters and hyperparameters that a training framework stores beside the tensors are left out too.
    """
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    prefix = "state_dict."
    state = {name: t for name, t in state.items() if isinstance(name, str)}
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return {
        name: t for name, t in state.items() if hasattr(t, "shape") and not name.startswith(IGNORED_PREFIXES)
    }


def naming_of(state: Mapping) -> str:
    """Which of NAMINGS the stored names follow.  Raises: UserError if none."""
    weights = weights_of(state)
    for naming in NAMINGS:
        if "encoder." + _dotted(("mid", "attention", "q", "kernel"), naming) in weights:
            return naming
    names = ", ".join(f"{name!r:.100}" for name in sorted(weights)[:3])
    raise UserError(f"the tensors [{names}, ...] are no autoencoder; expected an AutoencoderKL of diffusers "
                    "or a latent-diffusion (VA-VAE) checkpoint")


def recognise(state: Mapping, groups: int = 32) -> AutoencoderConfig:
    """The config that names and shapes imply; equal to SD_VAE or VA_VAE for the published files.

    groups: of the norms, which leave no trace in a shape; every published file has 32.
    Raises: UserError if the tensors are no autoencoder of this family.
    """
    weights, naming = weights_of(state), naming_of(state)

    def shape(*path) -> tuple[int, ...]:
        name = _dotted((*path, "kernel"), naming)
        check(name in weights, "tensor", name, "in the file", "it is incomplete or of another family")
        check(len(weights[name].shape) == 4, f"{name} shape", tuple(weights[name].shape), "(out, in, h, w)")
        return tuple(weights[name].shape)

    def count(*path, end: tuple) -> int:
        n = 0
        while _dotted((*path, n, *end, "kernel"), naming) in weights:
            n += 1
        return n

    levels = count("encoder", "down", end=("blocks", 0, "conv1"))
    layers = count("encoder", "down", 0, "blocks", end=("conv1",))
    for name, found in (("levels", levels), ("blocks a level", layers)):
        check(found <= _LIMIT_DEPTH, f"autoencoder {name}", found, f"at most {_LIMIT_DEPTH}")
    return AutoencoderConfig(
        channels=tuple(shape("encoder", "down", i, "blocks", 0, "conv1")[0] for i in range(levels)),
        layers=layers,
        latent_channels=shape("decoder", "conv_in")[1],
        groups=groups,
        attention_levels=tuple(
            i for i in range(levels) if count("encoder", "down", i, "attentions", end=("q",))
        ),
        quant_convs=_dotted(("quant_conv", "kernel"), naming) in weights,
    )


def to_params(state: Mapping, config: AutoencoderConfig) -> dict:
    """Stored tensors -> nested dict of float32 numpy arrays, the parameter tree of Autoencoder(config).

    Raises: UserError naming the first missing, misshapen (stored and wanted shape) or extra tensor.
    """
    check_complete(state, config)  # all shapes before the first byte is read
    weights, naming = weights_of(state), naming_of(state)

    def read(path: tuple, ndim: int) -> np.ndarray:
        array = weights[_published_name(path, config, naming)].read()
        return _to_ours(np.asarray(array, np.float32), ndim)

    return _nested({path: read(path, len(shape)) for path, shape in parameter_shapes(config).items()})


def check_complete(state: Mapping, config: AutoencoderConfig) -> None:
    """Raise UserError naming the first missing, misshapen (stored and wanted shape) or extra tensor."""
    weights, naming = weights_of(state), naming_of(state)
    wanted = {_published_name(path, config, naming): _published_shape(shape, naming)
              for path, shape in parameter_shapes(config).items()}
    for name, shape in wanted.items():
        if name not in weights:
            raise UserError(f"tensor {name} of shape {shape} is missing; "
                            "the file is incomplete or of another family")
        stored = tuple(weights[name].shape)
        check(stored == shape, f"{name} shape", stored, f"{shape}", "the file is of another size or family")
    extra = [name for name in weights if name not in wanted]
    if extra:
        shape = tuple(weights[extra[0]].shape)
        raise UserError(f"tensor {extra[0]!r:.100} of shape {shape} has no place in {config}; "
                        "the file is of another size or family")


def to_published(params: dict, config: AutoencoderConfig, naming: str) -> dict[str, np.ndarray]:
    """Our parameters -> published name -> contiguous float32 array, the inverse of `to_params` to the byte.

    Raises: UserError for an unknown naming or a parameter that is missing or misshapen for config.
    """
    check(naming in NAMINGS, "naming", naming, f"one of {sorted(NAMINGS)}")
    published = {}
    for path, shape in parameter_shapes(config).items():
        node = params
        for part in path:
            check(part in node, "parameter", "/".join(map(str, path)), f"in the tree of {config}")
            node = node[part]
        check(node.shape == shape, f"{'/'.join(map(str, path))} shape", node.shape, f"{shape}")
        name = _published_name(path, config, naming)
        array = _to_theirs(np.asarray(node, np.float32))
        published[name] = np.ascontiguousarray(array.reshape(_published_shape(shape, naming)))
    return published


def flattened(params: Mapping) -> dict:
    """A parameter tree of arrays by dotted name, the form in which it is stored; `nested` is the way back."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": leaf for name, leaf in flattened(value).items()}
        else:
            flat[str(key)] = value
    return flat


def flat_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Dotted name and shape of every parameter, all float32, of Autoencoder(config)."""
    return {".".join(map(str, path)): shape for path, shape in parameter_shapes(config).items()}


def nested(flat: Mapping, config: AutoencoderConfig) -> dict:
    """The parameter tree of Autoencoder(config) from its arrays by dotted name."""
    return _nested({path: flat[".".join(map(str, path))] for path in parameter_shapes(config)})


def _nested(flat: Mapping[tuple, object]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def _dotted(path: tuple, naming: str) -> str:
    return ".".join(NAMINGS[naming].get(part, str(part)) for part in path)


def _published_name(path: tuple, config: AutoencoderConfig, naming: str) -> str:
    if naming == "ldm" and path[:2] == ("decoder", "up"):  # ldm counts the decoder's levels from the finest
        path = (*path[:2], len(config.channels) - 1 - path[2], *path[3:])
    return _dotted(path, naming)


def _published_shape(ours: tuple[int, ...], naming: str) -> tuple[int, ...]:
    if len(ours) == 2 and naming == "ldm":  # attention projections are 1x1 convolutions there
        return (*ours[::-1], 1, 1)
    return (ours[3], ours[2], ours[0], ours[1]) if len(ours) == 4 else ours[::-1]


def _to_ours(array: np.ndarray, ndim: int) -> np.ndarray:
    """Convolution OIHW -> HWIO; linear (out, in) or (out, in, 1, 1) -> (in, out); vectors unchanged."""
    if ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.reshape(array.shape[:ndim]).T)


def _to_theirs(array: np.ndarray) -> np.ndarray:
    """Convolution HWIO -> OIHW; linear (in, out) -> (out, in); vectors unchanged."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T

