"""The constants of a TensorFlow graph, read without TensorFlow: a graph is a message of protobuf."""

import math
from functools import partial

import numpy as np

from ig_jax.weightfiles.tensor_storage import LIMIT_BROADCAST_BYTES, LazyTensor, SourceFile, check_shape, shown

_FLOAT = 1  # DT_FLOAT
_LIMIT_SHORT_BYTES = 16 * LIMIT_BROADCAST_BYTES  # of a constant that is stored as one number


def read_graph(source: SourceFile) -> dict[str, LazyTensor]:
    """The float32 constants of a GraphDef by the names of their nodes.  Raises: UserError for damage."""
    from google.protobuf.message import DecodeError  # late: only such a file needs them
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    try:
        graph.ParseFromString(source.read(0, source.size).tobytes())
    except DecodeError:
        raise source.refusal("is cut short, damaged or no TensorFlow graph") from None
    found = {}
    for node in graph.node:
        value = node.attr["value"].tensor if node.op == "Const" and "value" in node.attr else None
        if value is None or value.dtype != _FLOAT:
            continue
        if node.name in found:
            raise source.refusal(f"has the constant {shown(node.name)} twice", "do not use this file")
        shape = check_shape(source, [side.size for side in value.tensor_shape.dim], 4)
        count, numbers = math.prod(shape), len(value.tensor_content) // 4 or len(value.float_val)
        short = numbers == 1 and count * 4 <= _LIMIT_SHORT_BYTES
        if len(value.tensor_content) % 4 or not (numbers == count or short):
            raise source.refusal(f"has {numbers} numbers for the constant {shown(node.name)} of {shape}")
        found[node.name] = LazyTensor(shape, np.dtype(np.float32), partial(_read, value, shape))
    if not found:
        raise source.refusal("is no TensorFlow graph with constants")
    return found


def _read(value, shape: tuple[int, ...]) -> np.ndarray:
    """One number stands for all."""
    stored = np.frombuffer(value.tensor_content, "<f4") if value.tensor_content else np.array(value.float_val, "f4")
    return np.broadcast_to(stored if stored.size == 1 else stored.reshape(shape), shape).astype(np.float32)
