"""Parameters and floating-point operations of a network, counted from its config.

The compiler counts the body of a loop once, so speed and utilisation are always computed from these numbers.
"""

import dataclasses
import math

from ig_jax.models.dit import FROZEN, DiTConfig, shapes
from ig_jax.models.layers import FREQUENCIES


def parameter_count(config: DiTConfig) -> int:
    """Trainable parameters, all heads included."""
    return sum(math.prod(s.shape) for name, s in shapes(config).items() if name not in FROZEN)


def head_parameter_share(config: DiTConfig) -> float:
    """Trainable parameters of the intermediate heads as a fraction of those of the plain model."""
    total = parameter_count(config)
    heads = sum(math.prod(s.shape) for name, s in shapes(config).items() if name.startswith("inter_heads."))
    return heads / (total - heads)


def head_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one output head for one image."""
    return config.side**2 * config.width * config.patch_size**2 * config.out_channels + 2 * config.width**2


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of all matrix products of one forward pass of one image, all heads included."""
    c, tokens = config, config.side**2
    products = 2 if c.mlp == "gelu" else 3
    block = tokens * c.width * (4 * c.width + products * c.mlp_hidden)  # qkv, projection, MLP
    block += 2 * tokens**2 * c.width  # scores and their application
    block += (6 if c.adaln_shift else 4) * c.width**2
    embed = tokens * c.patch_size**2 * c.channels * c.width + (FREQUENCIES + c.width) * c.width
    return embed + c.depth * block + (1 + len(c.inter_depth)) * head_macs(c)


def train_step_flops(config: DiTConfig, global_batch: int, *, ema_forward: bool) -> int:
    """FLOPs of one train step: forward, twice that backward, and one EMA forward where the target needs it."""
    return 2 * forward_macs(config) * global_batch * (4 if ema_forward else 3)


def sample_flops(config: DiTConfig, images: int, evaluations: float) -> float:
    """FLOPs of sampling `images` images with `evaluations` forward passes each."""
    return 2.0 * forward_macs(config) * images * evaluations


def prefix_macs(config: DiTConfig, head: int) -> int:
    """Multiply-accumulates of one forward pass that stops after the intermediate head with index `head`."""
    heads = config.inter_depth[: head + 1]
    return forward_macs(dataclasses.replace(config, depth=heads[-1], inter_depth=heads)) - head_macs(config)
