"""Published PyTorch weights of SiT, DiT and LightningDiT, tensor by tensor, to our parameters and back.

One table names every tensor, for both directions. A new family with other names is one more entry in `_MODULES`.
Names and shapes need no JAX: a file is checked by them before JAX is imported.
"""

from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange

from ig_jax.errors import UserError
from ig_jax.models import dit_config
from ig_jax.models.dit_config import DiTConfig

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


def published_name(name: str, config: DiTConfig) -> str:
    """The published name of our parameter `name`, of a network with at most one intermediate head."""
    if name == "pos_embed":
        return name
    if name == "label_embed.table":
        return "y_embedder.embedding_table.weight"
    module, _, kind = name.rpartition(".")
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


def to_ours(name: str, tensor: np.ndarray, config: DiTConfig) -> np.ndarray:
    """A published tensor as our parameter `name`, float32 unless the file says otherwise."""
    if name == "pos_embed":
        return tensor[0]
    if name == "patch_embed.kernel":
        return rearrange(tensor, "d c p q -> (p q c) d")
    return tensor.T if name.endswith(".kernel") else tensor


def to_published(name: str, array: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Our parameter `name` in the published layout, contiguous."""
    if name == "pos_embed":
        array = array[None]
    elif name == "patch_embed.kernel":
        array = rearrange(array, "(p q c) d -> d c p q", p=config.patch_size, q=config.patch_size)
    elif name.endswith(".kernel"):
        array = array.T
    return np.ascontiguousarray(array)


def parameter_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a network that has a published form.

    Raises: UserError for several intermediate heads, which no published code has.
    """
    if len(config.inter_depth) > 1:
        raise UserError(f"inter_depth={config.inter_depth} has no published form; "
                        "only a model with at most one intermediate head can be exported")
    return dit_config.parameter_shapes(config)


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published state dict, RoPE buffers included.

    Raises: UserError for several intermediate heads.
    """
    shapes = {}
    for name, shape in parameter_shapes(config).items():
        if name == "pos_embed":
            shape = (1, *shape)
        elif name == "patch_embed.kernel":
            shape = (config.width, config.channels, config.patch_size, config.patch_size)
        elif name.endswith(".kernel"):
            shape = shape[::-1]
        shapes[published_name(name, config)] = shape
    if config.rope:
        shapes |= dict.fromkeys(ROPE_BUFFERS, (config.side**2, config.width // config.num_heads))
    return shapes


def rope_buffers(config: DiTConfig) -> dict[str, np.ndarray]:
    """The two constant tables a published LightningDiT state dict carries."""
    from ig_jax.models.layers import rope_table  # late: brings JAX

    return dict(zip(ROPE_BUFFERS, rope_table(config.side, config.width // config.num_heads)))


def check_complete(shapes: Mapping[str, tuple[int, ...]], config: DiTConfig) -> None:
    """Raise UserError naming the first missing, unknown or misshapen tensor of a state dict."""
    wanted = published_shapes(config)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            if name in ROPE_BUFFERS:
                continue
            raise UserError(f"tensor {name} {list(wanted[name])} is missing; the file is no whole checkpoint")
        if name not in wanted:
            raise UserError(f"tensor {name:.100} {list(shapes[name])} belongs to no known part of this "
                            "network; the file is of another code or family")
        if tuple(shapes[name]) != tuple(wanted[name]):
            raise UserError(f"tensor {name} is {list(shapes[name])}, expected {list(wanted[name])}; "
                            "the file is of another code or family")


def check_rope_buffers(buffers: Mapping[str, np.ndarray], config: DiTConfig) -> None:
    """Raise UserError where stored rotary tables are not, to rounding, those the network computes."""
    for name, ours in rope_buffers(config).items():
        stored = np.asarray(buffers.get(name, ours))
        rounding = 1e-4 if stored.dtype == np.float32 else 5e-3
        if not np.allclose(stored.astype(np.float32), ours, rtol=0, atol=rounding):
            raise UserError(f"tensor {name} holds another rotary embedding than theta 10000 over rows and "
                            "columns; this variant is not supported")


def read_params(state: Mapping[str, Callable[[], np.ndarray]], config: DiTConfig):
    """Yield (our name, float array) for every parameter, one tensor in memory at a time.

    `state` maps a published name to a function that reads the tensor.
    """
    for name in parameter_shapes(config):
        yield name, to_ours(name, state[published_name(name, config)](), config)
