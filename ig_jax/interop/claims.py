"""What a published file says of itself besides its tensors: the args or config its training code stored.

SiT, DiT and SiT with IG store {"args": {...}}, LightningDiT {"config": {...}}; most published files store
nothing. Nothing here is trusted further than a choice the tensors leave open.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ig_jax.models import zoo

# The training codes' words for a path. Those of the transport library (SiT, LightningDiT) are capitalised,
# and its clock has noise at 0; SiT with IG and its relatives write small letters and have noise at 1.
_PATHS = {
    "Linear": ("linear", "noise_at_0"), "GVP": ("cosine", "noise_at_0"), "VP": ("vp", "noise_at_0"),
    "linear": ("linear", "noise_at_1"), "cosine": ("cosine", "noise_at_1"),
}
_PREDICTIONS = {"v": "velocity", "velocity": "velocity", "noise": "noise", "score": "score"}


@dataclasses.dataclass(frozen=True)
class Claims:
    """Each field is empty, zero or None where the file says nothing."""

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


def read(metadata: Mapping[str, Any]) -> Claims:
    """The claims in a file's metadata; whatever has another form or type counts as not said."""
    args, config = _section(metadata, "args"), _section(metadata, "config")
    model, transport, data = (_section(config, name) for name in ("model", "transport", "data"))
    name = _text(args, "model") or _text(model, "model_type")
    family = name.split("-")[0].split("/")[0].lower()
    path, clock = _PATHS.get(_text(args, "path_type") or _text(transport, "path_type"), ("", ""))
    return Claims(
        family=family if family in zoo.FAMILIES else "",
        num_heads=_count(args, "num_heads"),
        inter_depth=_count(args, "encoder_depth") or _count(model, "encoder_depth"),
        num_classes=_count(args, "num_classes") or _count(data, "num_classes"),
        rope=model["use_rope"] if type(model.get("use_rope")) is bool else None,
        path=path,
        clock=clock,
        prediction=_PREDICTIONS.get(_text(args, "prediction") or _text(transport, "prediction"), ""),
        latent_multiplier=_factor(data, "latent_multiplier"),
        step=_count(metadata, "steps"),
    )


def path_type(path: str, clock: str) -> str:
    """The training codes' word for a path and clock, "" where none has one."""
    return next((word for word, meaning in _PATHS.items() if meaning == (path, clock)), "")


def _section(mapping: Mapping[str, Any], key: str) -> dict:
    value = mapping.get(key)
    return value if type(value) is dict else {}


def _text(mapping: dict, key: str) -> str:
    value = mapping.get(key)
    return value if type(value) is str else ""


def _count(mapping: Mapping[str, Any], key: str) -> int:
    value = mapping.get(key)
    return value if type(value) is int and 0 < value < 2**31 else 0


def _factor(mapping: dict, key: str) -> float:
    value = mapping.get(key)
    return float(value) if type(value) in (int, float) and 0 < value < float("inf") else 1.0
