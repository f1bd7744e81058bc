"""Names and layouts of the published PyTorch weights of SiT, DiT and LightningDiT, in both directions."""

import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from einops import rearrange

from ig_jax.base.errors import UserError, check
from ig_jax.models import dit
from ig_jax.models.dit import DiTConfig
from ig_jax.models.layers import rope_table
from ig_jax.weightfiles.files import LazyTensor

# Patterns of our names and what they are in the published code, replaced in this order.
_NAMES = {
    r"^patch_embed": "x_embedder.proj",
    r"^time_embed\.fc1": "t_embedder.mlp.0",
    r"^time_embed\.fc2": "t_embedder.mlp.2",
    r"^label_embed\.table": "y_embedder.embedding_table.weight",
    r"^(final_head|inter_heads\.0)\.norm": r"\1.norm_final",
    r"^final_head": "final_layer",
    r"^inter_heads\.0": "final_layer_xr",
    r"\bmodulation\.linear": "adaLN_modulation.1",
    r"\.(kernel|scale)$": ".weight",
}
# The same for networks with a setting of this value, replaced after those above.
_VARIANT_NAMES = {("mlp", "swiglu"): {r"\bmlp\.fc1": "mlp.w12", r"\bmlp\.fc2": "mlp.w3"}}
# Parts of published training codes that no sampler calls: the projectors of REPA and REG, SRA's head, teachers, the
# counters of profilers and of averages, and the class token of REG, without which its network runs as a SiT.
_TRAINING_ONLY = re.compile(
    r"(projectors?|ap_head|teacher\w*|\w+_teacher|cls_projectors2|wg_norm|final_layer\.linear_cls)\..*"
    r"|(.*\.)?total_(ops|params)|n_averaged|num_updates|initted|step|decay"
)
_CLASS_TOKEN = "cls_projectors2.weight"
ROPE_BUFFERS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def published_name(name: str, config: DiTConfig) -> str:
    """The published name of our parameter `name`, of a network with at most one intermediate head."""
    variants = [names for (key, value), names in _VARIANT_NAMES.items() if getattr(config, key) == value]
    for names in (_NAMES, *variants):
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
    return name


def without_training_parts(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors of the network, and the names of the parts that only training needs, each once."""
    kept = {name: tensor for name, tensor in tensors.items() if not _TRAINING_ONLY.fullmatch(name)}
    position = kept.get("pos_embed")
    if _CLASS_TOKEN in tensors and position is not None and len(position.shape) == 3 and position.shape[1] > 1:
        shape = (position.shape[0], position.shape[1] - 1, position.shape[2])
        kept["pos_embed"] = LazyTensor(shape, position.dtype, lambda: position.read()[:, 1:])
    return kept, list(dict.fromkeys(_part(name) for name in tensors if name not in kept))


def _part(name: str) -> str:
    """The part that a tensor belongs to, for people: a counter of many modules by its own name."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last.startswith("total_"):
        return last
    return "final_layer.linear_cls" if first == "final_layer" else first


def to_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """A published tensor in the layout of our parameter `name`, its dtype unchanged."""
    if name == "pos_embed":
        return tensor[0]
    if name == "patch_embed.kernel":
        return rearrange(tensor, "d c p q -> (p q c) d")
    return tensor.T if name.endswith(".kernel") else tensor


def to_published(name: str, array: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Our parameter `name` in the published layout."""
    if name == "pos_embed":
        return array[None]
    if name == "patch_embed.kernel":
        return rearrange(array, "(p q c) d -> d c p q", p=config.patch_size, q=config.patch_size)
    return array.T if name.endswith(".kernel") else array


def parameter_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter.  Raises: UserError for several intermediate heads: no published code has."""
    expected, fix = "of at most one intermediate head", "a network with several has no published form"
    check(len(config.inter_depth) <= 1, "inter_depth", config.inter_depth, expected, fix)
    return {name: leaf.shape for name, leaf in dit.shapes(config).items()}


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published state dict, RoPE tables included.

    Raises: UserError for several intermediate heads.
    """
    shapes = {
        published_name(name, config): to_published(name, np.broadcast_to(np.float32(0), shape), config).shape
        for name, shape in parameter_shapes(config).items()
    }
    if config.rope:
        shapes |= dict.fromkeys(ROPE_BUFFERS, (config.side**2, config.width // config.num_heads))
    return shapes


def rope_buffers(config: DiTConfig) -> dict[str, np.ndarray]:
    """The two constant tables in a published LightningDiT state dict, each (tokens, head width) float32."""
    return dict(zip(ROPE_BUFFERS, rope_table(config.side, config.width // config.num_heads)))


def check_complete(shapes: Mapping[str, tuple[int, ...]], config: DiTConfig) -> None:
    """Raise UserError naming the first missing, unknown or misshapen tensor of a state dict."""
    wanted = published_shapes(config)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name in ROPE_BUFFERS and name not in shapes:
            continue
        stored = list(shapes[name]) if name in shapes else "missing"
        expected = str(list(wanted[name])) if name in wanted else "absent: it belongs to no part of this network"
        fix = "the file is incomplete or of another code or family"
        check(str(stored) == expected, f"tensor {name:.100} shape", stored, expected, fix)


def check_rope_buffers(buffers: Mapping[str, np.ndarray | jax.Array], config: DiTConfig) -> None:
    """Raise UserError where stored rotary tables differ by more than rounding from those of the network."""
    for name, own in rope_buffers(config).items():
        stored = np.asarray(buffers.get(name, own))
        rounding = 1e-4 if stored.dtype == np.float32 else 5e-3
        if not np.allclose(stored.astype(np.float32), own, rtol=0, atol=rounding):
            what = f"tensor {name} holds another rotary embedding than theta 10000 over rows and columns"
            raise UserError(what, name=f"tensor {name}", fix="this variant is not supported")


def read_params(state: Mapping[str, Callable[[], np.ndarray]], config: DiTConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (our name, float array) for every parameter, one tensor in memory at a time.

    `state` maps a published name to a function that reads the tensor.
    """
    for name in parameter_shapes(config):
        yield name, to_ours(name, state[published_name(name, config)]())
