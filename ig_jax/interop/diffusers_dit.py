"""The names that huggingface/diffusers gives the tensors of a DiT, and the folder of its pipeline.

Its queries, keys and values are three tensors, each block has embedders of its own, and the table of positions is
computed. The release's networks share the embedders of the first block.

Source: huggingface/diffusers scripts/convert_dit_to_diffusers.py (names and layouts only).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.dit import DiTConfig
from ig_jax.models.layers import sincos_positions
from ig_jax.weightfiles.files import LazyTensor

FILE = "diffusion_pytorch_model.safetensors"
_MODULES = {  # release -> diffusers
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCKS = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_TENSOR = re.compile(r"(?:transformer_blocks\.(\d+)\.)?(.+)\.(weight|bias)", re.ASCII)


def is_diffusers(names: Mapping[str, Any]) -> bool:
    """Whether the tensors are named as in diffusers' DiT."""
    return "pos_embed.proj.weight" in names and any(name.startswith("transformer_blocks.") for name in names)


def to_release(tensors: Mapping[str, LazyTensor], input_size: int) -> dict[str, LazyTensor]:
    """The tensors under the release's names and in its layouts, for latents of `input_size` pixels along an edge.

    A name that is not known stays as it is.  Raises: UserError where the queries, keys and values do not fit together;
    on reading where blocks have different embedders, which the release's network cannot have.
    """
    proj = tensors["pos_embed.proj.weight"].shape
    check(len(proj) == 4 and proj[-1] > 0, "tensor pos_embed.proj.weight shape", list(proj), "4 dimensions")
    width, patch = proj[0], proj[-1]
    outside = {theirs: own for own, theirs in _MODULES.items()}
    inside = {theirs: own for own, theirs in _IN_BLOCKS.items()}
    embedders = {f"norm1.emb.{theirs}": own for own, theirs in _EMBEDDERS.items()}
    found: dict[str, LazyTensor] = {}
    shared: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        block, module, kind = match.groups() if match else (None, name, "")
        if block is None:
            found[f"{outside[module]}.{kind}" if module in outside else name] = tensor
        elif module in inside:
            found[f"blocks.{block}.{inside[module]}.{kind}"] = tensor
        elif module in embedders:
            shared.setdefault(f"{embedders[module]}.{kind}", []).append(tensor)
        elif module == _QKV[0]:
            found[f"blocks.{block}.attn.qkv.{kind}"] = _joined(tensors, f"transformer_blocks.{block}", kind)
        elif module not in _QKV:
            found[name] = tensor
    found |= {name: _same(name, copies) for name, copies in shared.items()}
    side = input_size // patch
    shape = (1, side**2, width)
    found["pos_embed"] = LazyTensor(shape, np.dtype(np.float32), lambda: sincos_positions(side, width)[None])
    return found


def _joined(tensors: Mapping[str, LazyTensor], block: str, kind: str) -> LazyTensor:
    parts = [tensors.get(f"{block}.{module}.{kind}") for module in _QKV]
    shapes = [list(part.shape) if part else "missing" for part in parts]
    check(shapes[0] == shapes[1] == shapes[2] != [], f"shapes of {block}.attn1.to_q, k, v", shapes, "the same")
    first = parts[0]
    assert first is not None
    shape = (3 * first.shape[0], *first.shape[1:])
    return LazyTensor(shape, first.dtype, lambda: np.concatenate([part.read() for part in parts if part]))


def _same(name: str, copies: list[LazyTensor]) -> LazyTensor:
    def read() -> np.ndarray:
        first = copies[0].read()
        if not all(np.array_equal(first, copy.read()) for copy in copies[1:]):
            what = f"{name} differs between blocks, which no DiT of the release has"
            raise UserError(what, name=name, fix="this variant is not supported")
        return first

    return LazyTensor(copies[0].shape, copies[0].dtype, read)


def from_release(tensors: Mapping[str, LazyTensor], model: DiTConfig) -> dict[str, LazyTensor]:
    """The tensors of a DiT under diffusers' names; the inverse of `to_release`.

    Raises: UserError for a network that diffusers' DiT is not.
    """
    form = (model.norm, model.mlp, model.qk_norm, model.sigma_channels, model.rope, model.inter_depth)
    if form != ("layernorm", "gelu", "none", "variance", False, ()):
        what = f"diffusers has no form of this network, only of DiT without an intermediate head: {model}"
        raise UserError(what, name="--to", value=str(model), fix="export it to a .pt, .pth or .safetensors file")
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in _MODULES:
            found[f"{_MODULES[module]}.{kind}"] = tensor
        elif module in _EMBEDDERS:
            for number in range(model.depth):
                found[f"transformer_blocks.{number}.norm1.emb.{_EMBEDDERS[module]}.{kind}"] = tensor
        elif module.startswith("blocks."):
            _, block, inside = module.split(".", 2)
            if inside != "attn.qkv":
                found[f"transformer_blocks.{block}.{_IN_BLOCKS[inside]}.{kind}"] = tensor
                continue
            for place, part in enumerate(_QKV):
                shape = (model.width, *tensor.shape[1:])
                read = lambda tensor=tensor, place=place: np.split(tensor.read(), 3)[place]
                found[f"transformer_blocks.{block}.{part}.{kind}"] = LazyTensor(shape, tensor.dtype, read)
    return found


def pipeline_files(model: DiTConfig, labels: list[str], autoencoder: AutoencoderConfig | None) -> dict[str, str]:
    """The JSON files of the pipeline's folder by their paths in it."""
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    transformer = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.width // model.num_heads,
        "in_channels": model.channels,
        "out_channels": 2 * model.channels,
        "num_layers": model.depth,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": 1e-6,
    }
    # The noise levels of DiT are the defaults of the scheduler.
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
    files = {"transformer/config.json": transformer, "scheduler/scheduler_config.json": scheduler}
    if autoencoder is not None:
        levels = len(autoencoder.channels)
        index["vae"] = ["diffusers", "AutoencoderKL"]
        files["vae/config.json"] = {
            "_class_name": "AutoencoderKL",
            "block_out_channels": autoencoder.channels,
            "layers_per_block": autoencoder.layers,
            "latent_channels": autoencoder.latent_channels,
            "norm_num_groups": autoencoder.groups,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "scaling_factor": 0.18215,
        }
    return {
        name: json.dumps(content, indent=2) + "\n" for name, content in (files | {"model_index.json": index}).items()
    }


def config_json(file: Path) -> dict[str, Any]:
    """The config.json that diffusers puts next to a weight file; empty where there is none."""
    try:
        found = json.loads(file.with_name("config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
