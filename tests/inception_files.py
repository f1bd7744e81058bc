"""The FID network with weights that follow from their names, and its published files as others write them."""

import functools
import hashlib
import json
import math
import pickle
from pathlib import Path

import numpy as np

from ig_jax.models import inception
from ig_jax.weightfiles.files import LazyTensor, write_torch

GOLDEN = Path(__file__).parent / "golden"
TORCH = {"scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
GRAPH = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
NVIDIA = {"kernel": "weight", "bias": "beta", "mean": "mean", "var": "var"}


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in (0, 1), float64, that a counter gives through splitmix64."""
    key = int.from_bytes(hashlib.sha256(f"ig_jax-0:{name}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (((z >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24).reshape(shape)


@functools.cache
def torch_state() -> dict[str, np.ndarray]:
    """All tensors by their names in pytorch-fid's file, gamma of 1 and the zeros of no tensor."""
    found = {
        "fc.weight": 0.02 * (2 * hashed("fc.weight", (1008, 2048)) - 1),
        "fc.bias": 2 * hashed("fc.bias", (1008,)) - 1,
    }
    for name, leaf in inception.shapes().items():
        layer, _, kind = name.rpartition(".")
        if kind == "kernel" and layer != "fc":
            rows, columns, inputs, outputs = leaf.shape
            u = hashed(theirs := f"{layer}.conv.weight", (outputs, inputs, rows, columns))
            found[theirs] = (2 * u - 1) * math.sqrt(6 / (inputs * rows * columns))
        elif layer != "fc":
            u = hashed(theirs := f"{layer}.{TORCH[kind]}", leaf.shape)
            found[theirs] = {"scale": 0.75 + 0.5 * u, "var": 0.5 + u}.get(kind, 0.25 * (2 * u - 1))
    return {name: array.astype(np.float32) for name, array in found.items()}


def params() -> dict[str, np.ndarray]:
    """The same as the parameters of models.inception."""
    kinds, found = {theirs: ours for ours, theirs in TORCH.items()} | {"conv.weight": "kernel"}, {}
    for name, array in torch_state().items():
        layer, *rest = name.split(".")[:-2], *name.split(".")[-2:]
        if name.startswith("fc."):
            found["fc.bias" if array.ndim == 1 else "fc.kernel"] = array.T
        else:
            found[".".join([*layer, kinds[".".join(rest)]])] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return found


def without_gamma() -> dict[str, np.ndarray]:
    """The parameters with every gamma 1, as in the published network; only these have an NVIDIA file."""
    return {name: np.ones_like(a) if name.endswith(".scale") else a for name, a in params().items()}


def published(name: str, naming: str, places: dict[str, list[str]]) -> str:
    """The name of a parameter in a file; places: of each layer in the graph and in NVIDIA's file."""
    layer, _, kind = name.rpartition(".")
    kernel = kind == "kernel"
    if layer == "fc":
        forms = {"pytorch": ("fc.weight", "fc.bias"), "graph": ("softmax/weights", "softmax/biases")}
        forms |= {"jax_fid": ("fc/kernel", "fc/bias"), "nvidia": ("output.weight", "output.bias")}
        return forms[naming][not kernel]
    graph, nvidia = places[layer]
    return {
        "pytorch": f"{layer}.{'conv.weight' if kernel else TORCH[kind]}",
        "jax_fid": f"{layer.replace('.', '/')}/{'conv' if kernel else 'bn'}/{kind}",
        "graph": f"{graph}/conv2d_params" if kernel else f"{graph}/batchnorm/{GRAPH[kind]}",
        "nvidia": f"{nvidia}.{NVIDIA.get(kind)}",
    }[naming]


def write(path: Path, naming: str, arrays: dict[str, np.ndarray]) -> Path:
    """A file of these parameters: "pytorch", "graph", "nvidia" (a state dict) or "jax_fid"."""
    places = json.loads((GOLDEN / "inception_names.json").read_text())
    named = {name: published(name, naming, places) for name in arrays}
    if naming in ("pytorch", "nvidia"):
        kept = {
            named[name]: array for name, array in arrays.items() if naming == "pytorch" or not name.endswith(".scale")
        }
        turned = {name: a.transpose((3, 2, 0, 1) if a.ndim == 4 else range(a.ndim)[::-1]) for name, a in kept.items()}
        extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)} if naming == "pytorch" else {}
        write_torch(path, {name: LazyTensor.of(np.ascontiguousarray(a)) for name, a in (turned | extra).items()})
    elif naming == "graph":
        path.write_bytes(graph_def({named[name]: array for name, array in arrays.items()}))
    else:
        tree: dict = {}
        for name, array in arrays.items():
            *folders, last = named[name].split("/")
            functools.reduce(lambda level, key: level.setdefault(key, {}), folders, tree)[last] = array
        path.write_bytes(pickle.dumps(tree, protocol=4))
    return path


def graph_def(arrays: dict[str, np.ndarray]) -> bytes:
    """A GraphDef of constants; a bias of the last layer that is constant is stored as one number."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    for name, array in arrays.items():
        tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
        tensor.dtype = 1
        for side in array.shape:
            tensor.tensor_shape.dim.add(size=side)
        if array.ndim == 1 and (array == array[0]).all():
            tensor.float_val.append(float(array[0]))
        else:
            tensor.tensor_content = np.ascontiguousarray(array, "<f4").tobytes()
    return graph.SerializeToString()
