"""Networks of the published families in options that the other files here do not have; without torch.

tests/golden/variants.npz holds what tests/interop/torch_networks.py computes for them (see make_variants.py).
"""

import zlib

import numpy as np

CLASSES = 10
BATCH = 2

# Arguments of torch_networks.Network, and which published code has them.
VARIANTS = {
    "sit_qk": dict(code="sit", size=8, patch=2, channels=4, qk_norm=True, head=2),
    "sit_512": dict(code="sit", size=16, patch=4, channels=4, head=1, width=64, depth=4),
    "sit_plain_sigma": dict(code="sit", size=8, patch=2, channels=4, learn_sigma=True),
    "dit_sigma_qk": dict(code="dit", size=8, patch=4, channels=4, learn_sigma=True, qk_norm=True, mlp_ratio=2.5),
    "ldit_qk_no_shift": dict(
        code="lightningdit",
        size=8,
        patch=1,
        channels=8,
        rms=True,
        swiglu=True,
        rope=True,
        qk_norm=True,
        shift=False,
        head=2,
    ),
    "ldit_layernorm": dict(code="lightningdit", size=8, patch=2, channels=4, rope=True, qk_norm=True, head=1),
    "ldit_sigma": dict(
        code="lightningdit",
        size=8,
        patch=2,
        channels=4,
        rms=True,
        swiglu=True,
        rope=True,
        learn_sigma=True,
        head=2,
        mlp_ratio=3.0,
    ),
    "ldit_no_rope": dict(code="lightningdit", size=8, patch=2, channels=4, rms=True, swiglu=True, qk_norm=True),
    "ldit_no_shift_gelu": dict(code="lightningdit", size=8, patch=1, channels=4, rope=True, shift=False, head=3),
}


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in [-1, 1), a hash of name and position, nowhere zero."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return (x / 2.0**31 - 1).reshape(shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name` of a variant: of about the size that keeps activations near 1, norms near 1."""
    u = hashed(name, shape)
    if len(shape) == 1:
        return u * np.float32(0.2) + np.float32(1 if "norm" in name and name.endswith("weight") else 0)
    fan_in = int(np.prod(shape[1:])) if "embedding_table" not in name and name != "pos_embed" else 3
    return u * np.float32(np.sqrt(3 / fan_in))


def inputs(variant: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents [B, C, H, W], times [B] in the network's own clock, labels [B], the last the null label)."""
    settings = VARIANTS[variant]
    x = 1.7 * hashed(variant, (BATCH, settings["channels"], settings["size"], settings["size"]))
    t = np.array([17.0, 803.0] if settings["code"] == "dit" else [0.23, 0.81], np.float32)
    return x.astype(np.float32), t, np.array([3, CLASSES])
