"""The four published files of the FID InceptionV3: their names and layouts, and their import.

"pytorch" (pytorch-fid, torch-fidelity), "graph" (the TensorFlow graph of ADM's evaluator), "nvidia" (StyleGAN, EDM; no
gamma, which is 1) and "jax_fid". All give the same parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.checkpoints import inception as checkpoint
from ig_jax.models import inception
from ig_jax.weightfiles.files import LazyTensor

_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


class Naming(NamedTuple):
    """Where a file keeps the arrays of a layer, by our kinds."""

    anchor: str  # a tensor that only such a file has
    place: Callable[[str], str]  # our layer -> theirs
    kinds: Mapping[str, str]  # our kind -> what follows the place
    dense: tuple[str, str]  # kernel and bias of the last layer
    transposed: bool  # kernels are (out, in, ...)


def _graph_place(layer: str) -> str:
    """ "Mixed_6b.branch7x7_2" -> "mixed_4/tower/conv_1"."""
    block, _, branch = layer.partition(".")
    if not branch:
        return _numbered("conv", _STEM.index(block.removeprefix("Conv2d_")))
    place = _numbered("mixed", _BLOCKS.index(block.removeprefix("Mixed_")))
    name, _, step = branch.partition("_")
    if not step:
        return f"{place}/conv"
    if step == "pool":
        return f"{place}/tower_2/conv"
    second = block != "Mixed_6a" and name.endswith(("dbl", "x7x3"))
    fork = "ab".find(step[-1])
    last = f"mixed/{_numbered('conv', fork)}" if fork >= 0 else _numbered("conv", int(step) - 1)
    return f"{place}/{_numbered('tower', second)}/{last}"


def _numbered(word: str, number: int) -> str:
    return f"{word}_{int(number)}" if number else word


def _nvidia_place(layer: str) -> str:
    block, *rest = _graph_place(layer).split("/")
    return f"layers.{block}{'.' if rest else ''}{('_' if block in ('mixed_9', 'mixed_10') else '.').join(rest)}"


def _kinds(kernel: str, scale: str, bias: str, mean: str, var: str) -> dict[str, str]:
    return {"kernel": kernel, "scale": scale, "bias": bias, "mean": mean, "var": var}


_TORCH_KINDS = _kinds(".conv.weight", ".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var")
_JAX_KINDS = _kinds(".conv.kernel", ".bn.scale", ".bn.bias", ".bn.mean", ".bn.var")
_NORM = [f"/batchnorm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")]
NAMINGS = {
    "pytorch": Naming("Conv2d_1a_3x3.conv.weight", str, _TORCH_KINDS, ("fc.weight", "fc.bias"), True),
    "jax_fid": Naming("Conv2d_1a_3x3.conv.kernel", str, _JAX_KINDS, ("fc.kernel", "fc.bias"), False),
    "graph": Naming(
        "conv/conv2d_params",
        _graph_place,
        _kinds("/conv2d_params", *_NORM),
        ("softmax/weights", "softmax/biases"),
        False,
    ),
    "nvidia": Naming(
        "layers.conv.weight",
        _nvidia_place,
        _kinds(".weight", "", ".beta", ".mean", ".var"),
        ("output.weight", "output.bias"),
        True,
    ),
}


def naming_of(names: Mapping[str, Any]) -> str | None:
    """The key of NAMINGS that a file follows, None for another network."""
    return next((key for key, naming in NAMINGS.items() if naming.anchor in names), None)


def published_name(name: str, naming: Naming) -> str:
    """Theirs for the name of one of our parameters; "" for a gamma that the file does not have."""
    layer, _, kind = name.rpartition(".")
    if layer == "fc":
        return naming.dense[kind == "bias"]
    return f"{naming.place(layer)}{naming.kinds[kind]}" if naming.kinds[kind] else ""


@dataclasses.dataclass(frozen=True)
class InceptionImport:
    """A recognised and complete file of the network."""

    file: Path
    tensors: Mapping[str, LazyTensor]
    naming: str
    source: Mapping[str, Any]  # where the file comes from

    @classmethod
    def of(cls, file: Path, tensors: Mapping[str, LazyTensor], source: Mapping[str, Any]) -> "InceptionImport":
        """Check names and shapes.  Raises: UserError for torchvision's network, and for the first that is wrong."""
        key = naming_of(tensors)
        assert key is not None
        found, naming = cls(file, tensors, key, source), NAMINGS[key]
        if any(name.startswith("AuxLogits.") for name in tensors):
            what = f"{file}: is torchvision's InceptionV3 (AuxLogits), another network than that of FID"
            raise UserError(what, name=str(file), fix="take pt_inception-2015-12-05-6726825d.pth of pytorch-fid")
        for name, leaf in inception.shapes().items():
            if theirs := published_name(name, naming):
                stored = tensors[theirs].shape if theirs in tensors else "missing"
                shape = _transposed(leaf.shape, naming)
                check(stored == shape, f"{file} tensor {theirs} shape", stored, f"{shape}", "the file is incomplete")
                floats = np.issubdtype(tensors[theirs].dtype, np.floating)
                check(floats, f"{file} tensor {theirs} dtype", str(tensors[theirs].dtype), "a float type")
        return found

    def describe(self) -> str:
        """What was recognised."""
        count = sum(leaf.size for leaf in inception.shapes().values())
        return f"file        {self.file.name}, {self.naming} names\nnetwork     InceptionV3 of FID; {count:,} numbers"

    def read(self) -> dict[str, np.ndarray]:
        """The parameters by name, float32.  Raises: UserError for damage and for numbers that cannot be."""
        naming, params = NAMINGS[self.naming], {}
        for name, leaf in inception.shapes().items():
            theirs = published_name(name, naming)
            array = self.tensors[theirs].read().astype(np.float32) if theirs else np.ones(leaf.shape, np.float32)
            sound = bool(np.isfinite(array).all()) and (not name.endswith(".var") or bool((array >= 0).all()))
            check(sound, f"{self.file} tensor {theirs}", "NaN, infinity or a negative variance", "finite numbers")
            if naming.transposed and array.ndim > 1:
                array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
            params[name] = np.ascontiguousarray(array)
        return params

    def write(self, directory: Path, params: dict[str, np.ndarray]) -> None:
        """The directory of the network.  Raises: UserError when it cannot be written."""
        checkpoint.save(directory, params, {"naming": self.naming, **self.source})


def _transposed(shape: tuple[int, ...], naming: Naming) -> tuple[int, ...]:
    """HWIO -> OIHW and (in, out) -> (out, in), where the file has them so."""
    if not naming.transposed or len(shape) == 1:
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
