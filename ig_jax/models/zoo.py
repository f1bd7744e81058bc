"""Families and sizes of published networks. A new family is one more entry of PUBLISHED."""

import re
from typing import Any, NamedTuple

from ig_jax.base.errors import UserError, check


class Family(NamedTuple):
    """A family of networks as its paper publishes it."""

    name: str  # as the paper writes it
    sizes: tuple[str, ...]  # keys of SIZES
    form: dict[str, Any]  # the entries of DiTConfig that set the family apart


# Blocks, width and heads of the published sizes.
SIZES = {
    "S": dict(depth=12, width=384, num_heads=6),
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=28, width=1152, num_heads=16),
    "1p0B": dict(depth=24, width=1536, num_heads=24),
    "1p6B": dict(depth=28, width=1792, num_heads=28),
}
DIT_SIZES = ("S", "B", "L", "XL")
PATCHES = (1, 2, 4, 8)

# Blocks run before the intermediate head: the release uses 8 for every size, the paper 4 for B.
INTER_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8, "1p0B": 8, "1p6B": 8}

_DIT = dict(
    norm="layernorm",
    mlp="gelu",
    rope=False,
    qk_norm="none",
    adaln_shift=True,
    sigma_channels="none",
    clock="noise_at_1",
    inter_head_init="zero",
)
_LIGHTNINGDIT = dict(norm="rmsnorm", mlp="swiglu", rope=True, clock="noise_at_0", inter_head_init="xavier")
PUBLISHED = {
    "sit": Family("SiT", DIT_SIZES, _DIT),
    "dit": Family("DiT", DIT_SIZES, _DIT | dict(sigma_channels="variance")),
    "lightningdit": Family("LightningDiT", tuple(SIZES), _DIT | _LIGHTNINGDIT),
}
FAMILIES = {key: family.form for key, family in PUBLISHED.items()}
NAMES = {family.name: key for key, family in PUBLISHED.items()}


def settings(family: str, size: str) -> dict[str, Any]:
    """The entries of DiTConfig that a family and a size fix; configs add latent shape, classes and precision.

    Raises: UserError for an unknown family or size.
    """
    check(family in FAMILIES, "family", family, f"one of {', '.join(FAMILIES)}")
    check(size in SIZES, "size", size, f"one of {', '.join(SIZES)}")
    return {**FAMILIES[family], **SIZES[size], "mlp_ratio": 4.0, "inter_depth": (INTER_DEPTH[size],)}


def named(name: str) -> dict[str, Any]:
    """The entries of DiTConfig of a published name such as "SiT-XL/2": `settings` and the patch size.

    Raises: UserError for a name that is not family-size/patch, or for a size that the family does not have.
    """
    parts = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    family = NAMES.get(parts[1]) if parts else None
    if not parts or not family or parts[2] not in PUBLISHED[family].sizes or int(parts[3]) not in PATCHES:
        sizes = ", ".join(PUBLISHED[family].sizes if family else SIZES)
        expected = (
            f"family-size/patch, such as SiT-XL/2, of {', '.join(NAMES)}; {sizes}; {', '.join(map(str, PATCHES))}"
        )
        raise UserError(f"model name {name!r} must be {expected}", name="model name", value=name, expected=expected)
    return {**settings(family, parts[2]), "patch_size": int(parts[3])}
