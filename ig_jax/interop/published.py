"""Published PyTorch weights of SiT, DiT and LightningDiT, tensor by tensor, to our parameters and back.

One table names every tensor; both directions and the recognition of a file read it. A new family with other
names is one more entry in `_MODULES`.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange

from ig_jax.errors import UserError
from ig_jax.models import dit, zoo
from ig_jax.models.layers import rope_table

# Ours -> published, for whole modules; blocks and heads keep their inner structure.
_MODULES = {
    "patch_embed": "x_embedder.proj",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "final_head": "final_layer",
    "inter_heads.0": "final_layer_xr",
}
_INSIDE = {"modulation.linear": "adaLN_modulation.1"}
_HEAD_INSIDE = {"norm": "norm_final"}
_SWIGLU_INSIDE = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
ROPE_BUFFERS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")

# Head counts are not in the weights; they follow from the width in every published size.
_HEADS_BY_WIDTH = {size["width"]: size["num_heads"] for size in zoo.SIZES.values()}
RELEASE_INTER_DEPTH = 8  # both releases place the head after block 8 and do not store it


def published_name(name: str, config: dit.DiTConfig) -> str:
    """The published name of our parameter `name`.

    Raises: UserError for a second intermediate head, which no published code has.
    """
    if name == "pos_embed":
        return name
    if name == "label_embed.table":
        return "y_embedder.embedding_table.weight"
    module, _, kind = name.rpartition(".")
    if module.startswith("inter_heads.") and not module.startswith("inter_heads.0"):
        raise UserError(f"{name} has no published name; only models with at most one intermediate head can be exported")
    module = _renamed(module, _MODULES)
    if module.startswith("final_layer"):
        module = _renamed_tail(module, _HEAD_INSIDE)
    inside = _INSIDE | (_SWIGLU_INSIDE if config.mlp == "swiglu" else {})
    module = _renamed_tail(module, inside)
    return f"{module}.{'bias' if kind == 'bias' else 'weight'}"


def _renamed(module: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if module == ours or module.startswith(ours + "."):
            return theirs + module[len(ours):]
    return module


def _renamed_tail(module: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if module.endswith("." + ours):
            return module[: -len(ours)] + theirs
    return module


def to_ours(name: str, tensor: np.ndarray, config: dit.DiTConfig) -> np.ndarray:
    """A published tensor as our parameter `name`, float32 unless the file says otherwise."""
    if name == "pos_embed":
        return tensor[0]
    if name == "patch_embed.kernel":
        return rearrange(tensor, "d c p q -> (p q c) d")
    return tensor.T if name.endswith(".kernel") else tensor


def to_published(name: str, array: np.ndarray, config: dit.DiTConfig) -> np.ndarray:
    """Our parameter `name` in the published layout, contiguous."""
    if name == "pos_embed":
        array = array[None]
    elif name == "patch_embed.kernel":
        array = rearrange(array, "(p q c) d -> d c p q", p=config.patch_size, q=config.patch_size)
    elif name.endswith(".kernel"):
        array = array.T
    return np.ascontiguousarray(array)


def published_shapes(config: dit.DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published state dict, RoPE buffers included."""
    shapes = {}
    for name, leaf in dit.shapes(config).items():
        blank = np.broadcast_to(np.float32(0), leaf.shape)
        if name == "patch_embed.kernel":
            p = config.patch_size
            shapes[published_name(name, config)] = (config.width, config.channels, p, p)
        elif name == "pos_embed":
            shapes[name] = (1, *leaf.shape)
        else:
            shapes[published_name(name, config)] = (blank.T if name.endswith(".kernel") else blank).shape
    if config.rope:
        shapes |= dict.fromkeys(ROPE_BUFFERS, (config.side**2, config.width // config.num_heads))
    return shapes


def rope_buffers(config: dit.DiTConfig) -> dict[str, np.ndarray]:
    """The two constant tables a published LightningDiT state dict carries."""
    return dict(zip(ROPE_BUFFERS, rope_table(config.side, config.width // config.num_heads)))


def check_complete(shapes: Mapping[str, tuple[int, ...]], config: dit.DiTConfig) -> None:
    """Raise UserError naming the first missing, unknown or misshapen tensor of a state dict."""
    wanted = published_shapes(config)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            if name in ROPE_BUFFERS:
                continue
            raise UserError(f"tensor {name} {list(wanted[name])} is missing; the file is not a whole checkpoint")
        if name not in wanted:
            raise UserError(f"tensor {name} {list(shapes[name])} belongs to no known part of this network")
        if tuple(shapes[name]) != tuple(wanted[name]):
            raise UserError(f"tensor {name} is {list(shapes[name])}, expected {list(wanted[name])}")


def read_params(state: Mapping[str, Callable[[], np.ndarray]], config: dit.DiTConfig):
    """Yield (our name, float array) for every parameter, one tensor in memory at a time.

    `state` maps a published name to a function that reads the tensor.
    """
    for name in dit.shapes(config):
        yield name, to_ours(name, state[published_name(name, config)](), config)


def recognise(
    shapes: Mapping[str, tuple[int, ...]], *, family: str = "", num_heads: int = 0, inter_depth: int = 0
) -> dict:
    """The entries of DiTConfig that fit a state dict, from its names and shapes.

    `family`, `num_heads`, `inter_depth` say what the tensors cannot (0 and "" for what is usual).
    Raises: UserError when the file is no network of this kind, or when it fits two families.
    """
    for name in ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.weight",
                 "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight"):
        if name not in shapes:
            raise UserError(f"tensor {name} is missing: not a SiT, DiT or LightningDiT checkpoint")
    width, channels, patch, _ = _dims(shapes, "x_embedder.proj.weight", 4)
    tokens = _dims(shapes, "pos_embed", 3)[1]
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.") and name.split(".")[1].isdigit()}
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    heads = num_heads or _HEADS_BY_WIDTH.get(width, 0)
    if not heads:
        raise UserError(f"width {width} is no published size, so its number of heads is unknown; give --num_heads")
    family = _family(shapes, family, channels * patch**2)
    inter = "final_layer_xr.linear.weight" in shapes
    hidden_name = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc1.weight"
    hidden = _dims(shapes, hidden_name, 2)[1 if swiglu else 0]
    return {
        **zoo.FAMILIES[family],
        "input_size": math.isqrt(tokens) * patch, "channels": channels, "patch_size": patch,
        "depth": len(blocks), "width": width, "num_heads": heads,
        "mlp_ratio": 4.0 if swiglu else hidden / width,
        "num_classes": _dims(shapes, "y_embedder.embedding_table.weight", 2)[0] - 1,
        "inter_depth": (inter_depth or min(RELEASE_INTER_DEPTH, len(blocks)),) if inter else (),
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in shapes else "layernorm",
        "mlp": "swiglu" if swiglu else "gelu",
        "rope": ROPE_BUFFERS[0] in shapes or family == "lightningdit",
        "qk_norm": _qk_norm(shapes),
        "adaln_shift": shapes["blocks.0.adaLN_modulation.1.weight"][0] == 6 * width,
        "sigma_channels": _sigma_channels(shapes, family, channels * patch**2),
        "clock": _clock(shapes, family, channels * patch**2),
    }


def _dims(shapes: Mapping[str, tuple[int, ...]], name: str, count: int) -> tuple[int, ...]:
    if len(shapes[name]) != count:
        raise UserError(f"tensor {name} is {list(shapes[name])}, expected {count} dimensions")
    return tuple(shapes[name])


def _learned_sigma(shapes, plain_outputs: int) -> bool:
    return shapes["final_layer.linear.weight"][0] == 2 * plain_outputs


def _family(shapes, asked: str, plain_outputs: int) -> str:
    if asked and asked not in zoo.FAMILIES:
        raise UserError(f"--family={asked!r} must be one of {', '.join(zoo.FAMILIES)}")
    lightning = "blocks.0.mlp.w12.weight" in shapes or ROPE_BUFFERS[0] in shapes
    if asked and lightning != (asked == "lightningdit"):
        raise UserError(f"--family={asked!r} does not fit: the tensors are {'' if lightning else 'not '}a LightningDiT's")
    if lightning or asked:
        return asked or "lightningdit"
    if _learned_sigma(shapes, plain_outputs):
        raise UserError("the tensors fit both an original SiT and a DiT (learned sigma); give --family=sit or dit")
    return "sit"


def _qk_norm(shapes) -> str:
    if "blocks.0.attn.q_norm.weight" not in shapes:
        return "none"
    return "layernorm" if "blocks.0.attn.q_norm.bias" in shapes else "rmsnorm"


def _sigma_channels(shapes, family: str, plain_outputs: int) -> str:
    if not _learned_sigma(shapes, plain_outputs):
        return "none"
    return "variance" if family == "dit" else "unused"


def _clock(shapes, family: str, plain_outputs: int) -> str:
    """Original SiT (learned sigma) and LightningDiT run from noise at 0; SiT with IG and DiT from data at 0."""
    reversed_clock = family == "lightningdit" or (family == "sit" and _learned_sigma(shapes, plain_outputs))
    return "noise_at_0" if reversed_clock else "noise_at_1"
