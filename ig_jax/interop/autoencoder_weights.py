"""Published autoencoder weights: names and layouts in both directions, and the config that their shapes imply.

Three namings occur: "diffusers" (AutoencoderKL of huggingface/diffusers), "diffusers_old" (the same before its
attention was renamed; the most common files) and "ldm" (CompVis/latent-diffusion; VA-VAE).
"""

import itertools
from collections.abc import Mapping

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.models import autoencoder
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.weightfiles.files import LazyTensor

# Training-only parts of an LDM or VA-VAE checkpoint: perceptual and discriminator loss, the frozen vision
# model, the projection its features are compared in, a moving average the published loader ignores too.
IGNORED_PREFIXES = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")

_LIMIT_DEPTH = 8  # levels, and blocks of each; the published files have 5 and 2, a hostile one may name thousands
_LIMIT_SIZE = 1 << 16  # of any dimension; the published files have 512

# Our path component -> theirs; a component that is not listed keeps its name.
_LDM = {
    "blocks": "block",
    "attentions": "attn",
    "downsample": "downsample.conv",
    "upsample": "upsample.conv",
    "block1": "block_1",
    "attention": "attn_1",
    "block2": "block_2",
    "shortcut": "nin_shortcut",
    "out": "proj_out",
    "kernel": "weight",
    "scale": "weight",
}
_DIFFUSERS = {
    "down": "down_blocks",
    "up": "up_blocks",
    "blocks": "resnets",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "mid": "mid_block",
    "block1": "resnets.0",
    "attention": "attentions.0",
    "block2": "resnets.1",
    "shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "kernel": "weight",
    "scale": "weight",
}
_DIFFUSERS_OLD = _DIFFUSERS | {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
# By name: the components, and whether the attention projections are stored as 1x1 convolutions.
NAMINGS = {"diffusers": (_DIFFUSERS, False), "diffusers_old": (_DIFFUSERS_OLD, False), "ldm": (_LDM, True)}
NAMINGS |= {
    "diffusers_conv": (_DIFFUSERS, True),
    "diffusers_old_conv": (_DIFFUSERS_OLD, True),
    "ldm_linear": (_LDM, False),
}


def weights_of(state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The autoencoder's own tensors by name, without IGNORED_PREFIXES."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(IGNORED_PREFIXES)}


def naming_of(state: Mapping) -> str:
    """The key of NAMINGS that the stored names and layouts follow.  Raises: UserError if there is none."""
    weights = weights_of(state)
    for naming, (_, convolutions) in NAMINGS.items():
        query = weights.get("encoder." + _renamed("mid.attention.q.kernel", naming))
        if query is not None and (len(query.shape) == 4) == convolutions:
            return naming
    expected = "those of an AutoencoderKL of diffusers or of a latent-diffusion (VA-VAE) checkpoint"
    raise UserError(name="tensors", value=[f"{name:.100}" for name in sorted(weights)[:3]], expected=expected)


def recognise(state: Mapping, groups: int = 32) -> AutoencoderConfig:
    """The config that names and shapes imply: SD_VAE or VA_VAE for the published files.

    groups: of every GroupNorm, which no shape shows; 32 in every published file.
    Raises: UserError if the tensors are not those of an autoencoder of this family.
    """
    weights, naming = weights_of(state), naming_of(state)

    def shape(module: str) -> tuple[int, ...]:
        name = _renamed(f"{module}.kernel", naming)
        check(name in weights, "tensor", name, "in the file", "it is incomplete or of another family")
        dims = tuple(weights[name].shape)
        sound = len(dims) == 4 and all(0 < n <= _LIMIT_SIZE for n in dims)
        check(sound, f"{name} shape", dims, f"(out, in, h, w), each in 1..{_LIMIT_SIZE}")
        return dims

    def count(module: str) -> int:
        return next(n for n in itertools.count() if _renamed(f"{module.format(n)}.kernel", naming) not in weights)

    levels = count("encoder.down.{}.blocks.0.conv1")
    layers = count("encoder.down.0.blocks.{}.conv1")
    for name, found in (("levels", levels), ("blocks per level", layers)):
        check(found <= _LIMIT_DEPTH, f"autoencoder {name}", found, f"at most {_LIMIT_DEPTH}")
    return AutoencoderConfig(
        channels=tuple(shape(f"encoder.down.{i}.blocks.0.conv1")[0] for i in range(levels)),
        layers=layers,
        latent_channels=shape("decoder.conv_in")[1],
        groups=groups,
        attention_levels=tuple(i for i in range(levels) if count(f"encoder.down.{i}.attentions.{{}}.q")),
        quant_convs=_renamed("quant_conv.kernel", naming) in weights,
    )


def to_params(state: Mapping, config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """Stored tensors -> the parameters of Autoencoder(config), float32 by name, once all shapes were checked.

    Raises: UserError naming the first missing, misshapen or extra tensor.
    """
    check_complete(state, config)
    weights, naming = weights_of(state), naming_of(state)
    return {
        name: _to_ours(np.asarray(weights[_published_name(name, config, naming)].read(), np.float32), len(leaf.shape))
        for name, leaf in autoencoder.shapes(config).items()
    }


def check_complete(state: Mapping, config: AutoencoderConfig) -> None:
    """Raise UserError naming the first missing, misshapen (stored and expected shape) or extra tensor."""
    weights, naming = weights_of(state), naming_of(state)
    wanted = {
        _published_name(name, config, naming): _published_shape(leaf.shape, naming)
        for name, leaf in autoencoder.shapes(config).items()
    }
    fix = "the file is incomplete or of another family"
    for name, shape in wanted.items():
        stored = tuple(weights[name].shape) if name in weights else "missing"
        check(stored == shape, f"tensor {name} shape", stored, f"{shape}", fix)
    extra = next((name for name in weights if name not in wanted), None)
    if extra is not None:
        what = f"tensor {extra!r:.100} of shape {tuple(weights[extra].shape)} has no place in {config}"
        raise UserError(what, name=f"tensor {extra!r:.100}", fix="the file is of another size or family")


def to_published(params: Mapping, config: AutoencoderConfig, naming: str) -> dict[str, np.ndarray]:
    """Our parameters -> contiguous float32 arrays by published name, the exact inverse of `to_params`.

    Raises: UserError for an unknown naming or a parameter that is missing or misshapen for config.
    """
    check(naming in NAMINGS, "naming", naming, f"one of {sorted(NAMINGS)}")
    published = {}
    for name, leaf in autoencoder.shapes(config).items():
        found = np.shape(params[name]) if name in params else "missing"
        check(found == leaf.shape, f"parameter {name} shape", found, f"{leaf.shape}")
        array = np.asarray(params[name], np.float32)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        array = np.ascontiguousarray(array.reshape(_published_shape(leaf.shape, naming)))
        published[_published_name(name, config, naming)] = array
    return published


def _renamed(name: str, naming: str) -> str:
    return ".".join(NAMINGS[naming][0].get(part, part) for part in name.split("."))


def _published_name(name: str, config: AutoencoderConfig, naming: str) -> str:
    parts = name.split(".")
    if NAMINGS[naming][0] is _LDM and parts[:2] == ["decoder", "up"]:  # where the levels count from the finest
        parts[2] = str(len(config.channels) - 1 - int(parts[2]))
    return _renamed(".".join(parts), naming)


def _published_shape(own: tuple[int, ...], naming: str) -> tuple[int, ...]:
    """Convolution HWIO -> OIHW; linear (in, out) -> (out, in) or (out, in, 1, 1); vectors unchanged."""
    if len(own) == 4:
        return (own[3], own[2], own[0], own[1])
    return (*own[::-1], 1, 1) if len(own) == 2 and NAMINGS[naming][1] else own[::-1]


def _to_ours(array: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse of the layouts of `_published_shape`."""
    if ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.reshape(array.shape[:ndim]).T)
