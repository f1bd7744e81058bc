"""Which SiT, DiT or LightningDiT a state dict is, from the names and shapes of its tensors.

Tensors decide what they can. What they leave open the user may say, then the file's own claims, then the
published sizes. Nothing here reads a tensor, imports JAX or is slow, whatever a file holds.
"""

import math
import re
from collections.abc import Mapping

from ig_jax.errors import UserError
from ig_jax.interop.claims import Claims
from ig_jax.interop.published import ROPE_BUFFERS
from ig_jax.models import zoo

RELEASE_INTER_DEPTH = 8  # both releases place the head after block 8 and do not store it
LIMIT_BLOCKS = 1000  # the deepest published network has 28
# Head counts are not in the weights; they follow from the width in every published size.
_HEADS_BY_WIDTH = {size["width"]: size["num_heads"] for size in zoo.SIZES.values()}
_BLOCK = re.compile(r"blocks\.(\d+)\.", re.ASCII)
_NEEDED = (
    "pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
    "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight",
)


def recognise(
    shapes: Mapping[str, tuple[int, ...]], claims: Claims = Claims(), *,
    family: str = "", num_heads: int = 0, inter_depth: int = 0,
) -> dict:
    """The entries of DiTConfig that fit a state dict, from its names and shapes.

    `family`, `num_heads`, `inter_depth`: what the user says, "" and 0 for nothing.
    Raises: UserError when the file is no network of this kind, or when it fits two families.
    """
    for name in _NEEDED:
        if name not in shapes:
            raise UserError(f"tensor {name} is missing: not a SiT, DiT or LightningDiT checkpoint")
    width, channels, patch, _ = _dims(shapes, "x_embedder.proj.weight", 4)
    outputs = channels * patch**2
    family = family_of(shapes, claims, family)
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    return {
        **zoo.FAMILIES[family],
        "input_size": _side(shapes) * patch, "channels": channels, "patch_size": patch,
        "depth": _depth(shapes), "width": width,
        "num_heads": _num_heads(shapes, claims, num_heads, width),
        "mlp_ratio": _mlp_ratio(shapes, swiglu, width),
        "num_classes": _num_classes(shapes, claims),
        "inter_depth": _inter_depth(shapes, claims, inter_depth),
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in shapes else "layernorm",
        "mlp": "swiglu" if swiglu else "gelu",
        # The published module stores its tables: without them nothing turns, unless the file says so.
        "rope": ROPE_BUFFERS[0] in shapes or bool(claims.rope),
        "qk_norm": _qk_norm(shapes),
        "adaln_shift": _dims(shapes, "blocks.0.adaLN_modulation.1.weight", 2)[0] == 6 * width,
        "sigma_channels": _sigma_channels(shapes, family, outputs),
        "clock": _clock(shapes, claims, family, outputs),
    }


def family_of(shapes: Mapping[str, tuple[int, ...]], claims: Claims = Claims(), asked: str = "") -> str:
    """The family that tensors, user or file name.  Raises: UserError if they disagree or leave two."""
    if asked and asked not in zoo.FAMILIES:
        raise UserError(f"--family={asked!r} must be one of {', '.join(zoo.FAMILIES)}")
    if asked and claims.family not in ("", asked):
        raise UserError(f"--family={asked!r} does not fit: the file says that it is a {claims.family}")
    named, lightning = asked or claims.family, _lightning(shapes)
    if lightning and named not in ("", "lightningdit"):
        raise UserError(f"--family={named!r} does not fit: the tensors are a LightningDiT's")
    if named == "lightningdit" and not lightning and not claims.family:
        raise UserError(f"--family={named!r} does not fit: the tensors have no RoPE, RMSNorm or SwiGLU")
    if lightning or named:
        return named or "lightningdit"
    _, channels, patch, _ = _dims(shapes, "x_embedder.proj.weight", 4)
    if _learned_sigma(shapes, channels * patch**2) and not claims.path:  # DiT has no path to choose
        raise UserError("the tensors fit both an original SiT and a DiT (learned sigma); "
                        "give --family=sit or dit")
    return "sit"


def _lightning(shapes) -> bool:
    """Whether a tensor shows what only LightningDiT has: RoPE, SwiGLU, RMSNorm or adaLN without shift."""
    modulation = "blocks.0.adaLN_modulation.1.weight"
    return (
        any(name in shapes for name in (ROPE_BUFFERS[0], "blocks.0.mlp.w12.weight", "blocks.0.norm1.weight"))
        or _qk_norm(shapes) == "rmsnorm"
        or _dims(shapes, modulation, 2)[0] == 4 * shapes[modulation][1]
    )


def _dims(shapes: Mapping[str, tuple[int, ...]], name: str, count: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"tensor {name} is missing; the file is not a whole checkpoint")
    if len(shapes[name]) != count or 0 in shapes[name]:
        raise UserError(f"tensor {name} is {list(shapes[name])}, expected {count} dimensions, none of them 0")
    return tuple(shapes[name])


def _depth(shapes) -> int:
    blocks = {int(match[1]) for match in map(_BLOCK.match, shapes) if match}
    missing = next((i for i in range(len(blocks)) if i not in blocks), None)
    if missing is not None:
        raise UserError(f"tensors blocks.{missing}.* are missing; the file is not a whole checkpoint")
    if len(blocks) > LIMIT_BLOCKS:
        raise UserError(f"the file has {len(blocks)} blocks, expected at most {LIMIT_BLOCKS}")
    return len(blocks)


def _side(shapes) -> int:
    tokens = _dims(shapes, "pos_embed", 3)[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"pos_embed has {tokens} tokens, which fill no square image")
    return math.isqrt(tokens)


def _num_heads(shapes, claims: Claims, asked: int, width: int) -> int:
    """From the size of one head where a tensor shows it; else as asked, as the file says, or as is usual."""
    for name in ("blocks.0.attn.q_norm.weight", ROPE_BUFFERS[0]):
        if name in shapes:
            head = (0, *shapes[name])[-1]
            heads = width // head if head else 0
            if heads * head != width or asked not in (0, heads):
                fits = f"; it fits --num_heads={heads}" if heads else ""
                raise UserError(f"tensor {name} {list(shapes[name])} does not fit {asked or 'any number of'} "
                                f"heads of width {width}{fits}")
            return heads
    heads = asked or claims.num_heads or _HEADS_BY_WIDTH.get(width, 0)
    if not heads:
        raise UserError(f"width {width} is of no published size, so its number of heads is unknown; "
                        "give --num_heads")
    return heads


def _mlp_ratio(shapes, swiglu: bool, width: int) -> float:
    """The ratio from which DiTConfig computes the same hidden units, for which it truncates."""
    name, share = ("mlp.w3", 2 / 3) if swiglu else ("mlp.fc2", 1)
    hidden = _dims(shapes, f"blocks.0.{name}.weight", 2)[1]
    ratios = (4.0, hidden / (share * width), (hidden + 0.5) / (share * width))
    return next(ratio for ratio in ratios if int(share * (width * ratio)) == hidden)


def _num_classes(shapes, claims: Claims) -> int:
    rows = _dims(shapes, "y_embedder.embedding_table.weight", 2)[0]
    if rows < 2 or rows == claims.num_classes:
        raise UserError(f"the label table has {rows} rows and so no null label; "
                        "networks trained without label dropout are not supported")
    return rows - 1


def _inter_depth(shapes, claims: Claims, asked: int) -> tuple[int, ...]:
    if "final_layer_xr.linear.weight" not in shapes:
        if asked:
            raise UserError(f"--inter_depth={asked} does not fit: the file has no intermediate head, "
                            "final_layer_xr")
        return ()
    return (asked or claims.inter_depth or min(RELEASE_INTER_DEPTH, _depth(shapes)),)


def _learned_sigma(shapes, plain_outputs: int) -> bool:
    return shapes["final_layer.linear.weight"][:1] == (2 * plain_outputs,)


def _qk_norm(shapes) -> str:
    if "blocks.0.attn.q_norm.weight" not in shapes:
        return "none"
    return "layernorm" if "blocks.0.attn.q_norm.bias" in shapes else "rmsnorm"


def _sigma_channels(shapes, family: str, plain_outputs: int) -> str:
    if _learned_sigma(shapes, plain_outputs):
        return "variance" if family == "dit" else "unused"
    if family == "dit":
        raise UserError(f"tensor final_layer.linear.weight {list(shapes['final_layer.linear.weight'])} has no rows "
                        "for a learned sigma, which every DiT here has; if it is a SiT, give --family=sit")
    return "none"


def _clock(shapes, claims: Claims, family: str, plain_outputs: int) -> str:
    """Original SiT (learned sigma) and LightningDiT have noise at 0; SiT with IG and DiT have it at 1."""
    if family == "sit" and claims.clock:
        return claims.clock
    reversed_clock = family == "lightningdit" or (family == "sit" and _learned_sigma(shapes, plain_outputs))
    return "noise_at_0" if reversed_clock else "noise_at_1"
