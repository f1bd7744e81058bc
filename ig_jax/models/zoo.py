"""Families and sizes by name. A new family is one more entry here."""

import re

from ig_jax.errors import UserError

NAMES = {"SiT": "sit", "DiT": "dit", "LightningDiT": "lightningdit"}  # as the papers write them
PATCHES = (1, 2, 4, 8)

# What sets a family apart, in the words of DiTConfig.
FAMILIES = {
    "sit": dict(
        norm="layernorm", mlp="gelu", rope=False, qk_norm="none", adaln_shift=True, sigma_channels="none",
        clock="noise_at_1", inter_head_init="zero",
    ),
    "dit": dict(
        norm="layernorm", mlp="gelu", rope=False, qk_norm="none", adaln_shift=True, sigma_channels="variance",
        clock="noise_at_1", inter_head_init="zero",
    ),
    "lightningdit": dict(
        norm="rmsnorm", mlp="swiglu", rope=True, qk_norm="none", adaln_shift=True, sigma_channels="none",
        clock="noise_at_0", inter_head_init="xavier",
    ),
}

# Blocks, width and heads of the published sizes; S, B, L, XL are DiT's, the rest LightningDiT's alone.
SIZES = {
    "S": dict(depth=12, width=384, num_heads=6),
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=28, width=1152, num_heads=16),
    "1p0B": dict(depth=24, width=1536, num_heads=24),
    "1p6B": dict(depth=28, width=1792, num_heads=28),
}

# Blocks run before the intermediate head: the release uses 8 for every size, the paper 4 for B.
INTER_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8, "1p0B": 8, "1p6B": 8}


def settings(family: str, size: str) -> dict:
    """The entries of DiTConfig that a family and a size fix; configs add latent shape, classes and precision.

    Raises: UserError for an unknown family or size.
    """
    for name, value, known in (("family", family, FAMILIES), ("size", size, SIZES)):
        if value not in known:
            raise UserError(f"{name}={value!r} must be one of {', '.join(known)}")
    return {**FAMILIES[family], **SIZES[size], "mlp_ratio": 4.0, "inter_depth": (INTER_DEPTH[size],)}


def named(name: str) -> dict:
    """The entries of DiTConfig behind a published name such as "SiT-XL/2": `settings` and the patch size.

    Raises: UserError for a name that is not family-size/patch.
    """
    parts = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    if parts is None or parts[1] not in NAMES or parts[2] not in SIZES or int(parts[3]) not in PATCHES:
        raise UserError(f"model name {name!r} must be family-size/patch, such as SiT-XL/2, of "
                        f"{', '.join(NAMES)}; {', '.join(SIZES)}; {', '.join(map(str, PATCHES))}")
    return {**settings(NAMES[parts[1]], parts[2]), "patch_size": int(parts[3])}
