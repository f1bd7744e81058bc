"""Recognition of the network in a published file from the names and shapes of its tensors, none of which is read.

What the tensors leave open is decided by the user, then by the settings stored in the file, then by the published
sizes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ig_jax.base.errors import UserError, check
from ig_jax.interop.published import ROPE_BUFFERS
from ig_jax.models import zoo

Shapes = Mapping[str, tuple[int, ...]]

RELEASE_INTER_DEPTH = 8  # both releases place the head after block 8 and do not store it
# Bounds on what a file may claim, so that a hostile one is refused before a network of its sizes is traced.
LIMIT_BLOCKS = 100  # the deepest published network has 28
LIMIT_SIZE = 1 << 20  # of any dimension
LIMIT_POSITIONS = 1 << 25  # elements of the table of positions, which is computed; the published ones have 1.2 million
# Head counts are not in the weights; they follow from the width in every published size.
_HEADS_BY_WIDTH = {size["width"]: size["num_heads"] for size in zoo.SIZES.values()}
_BLOCK = re.compile(r"blocks\.(\d+)\.", re.ASCII)
_MODULATION, _QK_NORM = "blocks.0.adaLN_modulation.1.weight", "blocks.0.attn.q_norm"
_NEEDED = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
_NEEDED_IN_BLOCKS = ("blocks.0.attn.qkv.weight", _MODULATION)
# The training codes' names of a path. Those of the transport library (SiT, LightningDiT) are capitalised, and its
# clock has noise at 0; SiT with IG and its relatives write small letters and have noise at 1.
_PATHS = {
    "Linear": ("linear", "noise_at_0"),
    "GVP": ("cosine", "noise_at_0"),
    "VP": ("vp", "noise_at_0"),
    "linear": ("linear", "noise_at_1"),
    "cosine": ("cosine", "noise_at_1"),
}
_PREDICTIONS = {"v": "velocity", "velocity": "velocity", "noise": "noise", "score": "score"}


@dataclasses.dataclass(frozen=True)
class FileSettings:
    """Settings of the training code that a file stores next to its tensors; most published files store none.

    SiT, DiT and SiT with IG store {"args": {...}}, LightningDiT {"config": {...}}. They are trusted only for a choice
    that the tensors leave open. A field is empty, zero or None where the file does not store it.
    """

    family: str = ""  # a name in zoo.FAMILIES
    num_heads: int = 0
    inter_depth: int = 0  # blocks
    num_classes: int = 0
    rope: bool | None = None
    path: str = ""  # "linear" | "cosine" | "vp"
    clock: str = ""  # as in DiTConfig
    prediction: str = ""  # "velocity" | "noise" | "score"
    latent_multiplier: float = 1.0
    step: int = 0

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "FileSettings":
        """The settings in a file's metadata; an entry of another form or type counts as not stored."""

        def section(mapping: Mapping[str, Any], key: str) -> dict:
            return mapping[key] if isinstance(mapping.get(key), dict) else {}

        def text(mapping: dict, key: str) -> str:
            return mapping[key] if type(mapping.get(key)) is str else ""

        def count(mapping: Mapping[str, Any], key: str) -> int:
            value = mapping.get(key)
            return value if type(value) is int and 0 < value < 2**31 else 0

        args, config = section(metadata, "args"), section(metadata, "config")
        model, transport, data = (section(config, name) for name in ("model", "transport", "data"))
        name = text(args, "model") or text(model, "model_type")
        family = name.split("-")[0].split("/")[0].lower()
        path, clock = _PATHS.get(text(args, "path_type") or text(transport, "path_type"), ("", ""))
        factor = data.get("latent_multiplier")
        return cls(
            family=family if family in zoo.FAMILIES else "",
            num_heads=count(args, "num_heads"),
            inter_depth=count(args, "encoder_depth") or count(model, "encoder_depth"),
            num_classes=count(args, "num_classes") or count(data, "num_classes"),
            rope=model["use_rope"] if type(model.get("use_rope")) is bool else None,
            path=path,
            clock=clock,
            prediction=_PREDICTIONS.get(text(args, "prediction") or text(transport, "prediction"), ""),
            latent_multiplier=float(factor) if isinstance(factor, int | float) and 0 < factor < math.inf else 1.0,
            step=count(metadata, "steps"),
        )


def path_type(path: str, clock: str) -> str:
    """The training codes' name of a path and clock; "" where none has one."""
    return next((word for word, meaning in _PATHS.items() if meaning == (path, clock)), "")


def recognise(
    shapes: Shapes, stored: FileSettings = FileSettings(), *, family: str = "", num_heads: int = 0, inter_depth: int = 0
) -> dict:
    """The entries of DiTConfig that fit a state dict, from its names and shapes.

    `family`, `num_heads`, `inter_depth`: the user's choice, "" and 0 for none.
    Raises: UserError when the file is not a network of this kind, or when it fits two families.
    """
    for name in _NEEDED + _NEEDED_IN_BLOCKS:
        check(name in shapes, "tensor", name, "in the file", "every SiT, DiT and LightningDiT checkpoint has it")
    width, channels, patch, _ = _dims(shapes, "x_embedder.proj.weight", 4)
    outputs = channels * patch**2
    family = family_of(shapes, stored, family)
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    depth = _depth(shapes)
    return {
        **zoo.FAMILIES[family],
        "input_size": _side(shapes, width) * patch,
        "channels": channels,
        "patch_size": patch,
        "depth": depth,
        "width": width,
        "num_heads": _num_heads(shapes, stored, num_heads, width),
        "mlp_ratio": _mlp_ratio(shapes, swiglu, width),
        "num_classes": _num_classes(shapes, stored),
        "inter_depth": _inter_depth(shapes, stored, inter_depth, depth),
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in shapes else "layernorm",
        "mlp": "swiglu" if swiglu else "gelu",
        # The published module stores its tables: a network without them has no RoPE, unless the file says so.
        "rope": ROPE_BUFFERS[0] in shapes or bool(stored.rope),
        "qk_norm": _qk_norm(shapes),
        "adaln_shift": _dims(shapes, _MODULATION, 2)[0] == 6 * width,
        "sigma_channels": _sigma_channels(shapes, family, outputs),
        "clock": _clock(shapes, stored, family, outputs),
    }


def family_of(shapes: Shapes, stored: FileSettings = FileSettings(), asked: str = "") -> str:
    """The family that tensors, user and file agree on.  Raises: UserError if they disagree or two families fit."""
    check(asked in ("", *zoo.FAMILIES), "--family", asked, f"one of {', '.join(zoo.FAMILIES)}")
    check(asked == "" or stored.family in ("", asked), "--family", asked, f"{stored.family}, which the file stores")
    named, lightning = asked or stored.family, _lightning(shapes)
    if lightning:
        check(named in ("", "lightningdit"), "--family", named, "lightningdit, which the tensors are")
        return "lightningdit"
    if named == "lightningdit" and not stored.family:
        raise UserError(name="--family", value=named, expected="sit or dit: no tensor shows RoPE, RMSNorm or SwiGLU")
    if named:
        return named
    _, channels, patch, _ = _dims(shapes, "x_embedder.proj.weight", 4)
    if _learned_sigma(shapes, channels * patch**2) and not stored.path:  # DiT has no path to choose
        what = "the tensors fit both an original SiT and a DiT (learned sigma)"
        raise UserError(what, name="--family", fix="give --family=sit or dit")
    return "sit"


def _lightning(shapes: Shapes) -> bool:
    """Whether a tensor shows what only LightningDiT has: RoPE, SwiGLU, RMSNorm or adaLN without shift."""
    return (
        any(name in shapes for name in (ROPE_BUFFERS[0], "blocks.0.mlp.w12.weight", "blocks.0.norm1.weight"))
        or _qk_norm(shapes) == "rmsnorm"
        or _dims(shapes, _MODULATION, 2)[0] == 4 * shapes[_MODULATION][1]
    )


def _dims(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    check(name in shapes, "tensor", name, "in the file", "it is not a complete checkpoint")
    sound = len(shapes[name]) == count and all(0 < n <= LIMIT_SIZE for n in shapes[name])
    check(sound, f"tensor {name} shape", list(shapes[name]), f"{count} dimensions, each in 1..{LIMIT_SIZE}")
    return tuple(shapes[name])


def _depth(shapes: Shapes) -> int:
    blocks = {int(match[1]) for match in map(_BLOCK.match, shapes) if match}
    missing = next((i for i in range(len(blocks)) if i not in blocks), None)
    check(missing is None, "tensors", f"blocks.{missing}.*", "in the file", "it is not a complete checkpoint")
    check(len(blocks) <= LIMIT_BLOCKS, "blocks of the file", len(blocks), f"at most {LIMIT_BLOCKS}")
    return len(blocks)


def _side(shapes: Shapes, width: int) -> int:
    tokens = _dims(shapes, "pos_embed", 3)[1]
    side = math.isqrt(tokens)
    check(side**2 == tokens, "tokens of pos_embed", tokens, "the square of a whole number")
    check(tokens * width <= LIMIT_POSITIONS, "pos_embed elements", tokens * width, f"at most {LIMIT_POSITIONS}")
    return side


def _num_heads(shapes: Shapes, stored: FileSettings, asked: int, width: int) -> int:
    """From a tensor of one head's size; otherwise the user's, the stored, or the published one of this width."""
    for name in (f"{_QK_NORM}.weight", ROPE_BUFFERS[0]):
        if name in shapes:
            head = (0, *shapes[name])[-1]
            heads = width // head if head else 0
            if heads * head != width or asked not in (0, heads):
                what = f"tensor {name} {list(shapes[name])} fits no {asked or 'whole number of'} heads of width {width}"
                fix = f"it fits --num_heads={heads}" if heads else "the file is damaged or of another family"
                raise UserError(what, name="--num_heads", value=asked, fix=fix)
            return heads
    heads = asked or stored.num_heads or _HEADS_BY_WIDTH.get(width, 0)
    if not heads:
        what = f"width {width} is of no published size, so its number of heads is unknown"
        raise UserError(what, name="--num_heads", fix="give --num_heads")
    return heads


def _mlp_ratio(shapes: Shapes, swiglu: bool, width: int) -> float:
    """The ratio from which DiTConfig computes the same hidden units, for which it truncates."""
    name, share = ("mlp.w3", 2 / 3) if swiglu else ("mlp.fc2", 1)
    hidden = _dims(shapes, f"blocks.0.{name}.weight", 2)[1]
    ratios = (4.0, hidden / (share * width), (hidden + 0.5) / (share * width))
    return next(ratio for ratio in ratios if int(share * (width * ratio)) == hidden)


def _num_classes(shapes: Shapes, stored: FileSettings) -> int:
    rows = _dims(shapes, "y_embedder.embedding_table.weight", 2)[0]
    fix = "networks trained without label dropout are not supported"
    check(1 < rows != stored.num_classes, "rows of the label table", rows, "the classes and the null label", fix)
    return rows - 1


def _inter_depth(shapes: Shapes, stored: FileSettings, asked: int, depth: int) -> tuple[int, ...]:
    if "final_layer_xr.linear.weight" in shapes:
        return (asked or stored.inter_depth or min(RELEASE_INTER_DEPTH, depth),)
    check(not asked, "--inter_depth", asked, "left out: the file has no intermediate head, final_layer_xr")
    return ()


def _learned_sigma(shapes: Shapes, plain_outputs: int) -> bool:
    return shapes["final_layer.linear.weight"][:1] == (2 * plain_outputs,)


def _qk_norm(shapes: Shapes) -> str:
    if f"{_QK_NORM}.weight" not in shapes:
        return "none"
    return "layernorm" if f"{_QK_NORM}.bias" in shapes else "rmsnorm"


def _sigma_channels(shapes: Shapes, family: str, plain_outputs: int) -> str:
    of_family = zoo.FAMILIES[family]["sigma_channels"]
    if _learned_sigma(shapes, plain_outputs):
        return "unused" if of_family == "none" else of_family
    name, rows = "final_layer.linear.weight", 2 * plain_outputs
    expected = f"[{rows}, width]: every {zoo.PUBLISHED[family].name} here has a learned sigma"
    fix = "if it is a SiT, give --family=sit"
    check(of_family == "none", f"tensor {name} shape", list(shapes[name]), expected, fix)
    return "none"


def _clock(shapes: Shapes, stored: FileSettings, family: str, plain_outputs: int) -> str:
    """That of the family; of SiT, which has two, the original one has a learned sigma and noise at 0."""
    if family != "sit":
        return zoo.FAMILIES[family]["clock"]
    return stored.clock or ("noise_at_0" if _learned_sigma(shapes, plain_outputs) else "noise_at_1")
