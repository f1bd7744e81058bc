"""The safetensors format: eight bytes of header length, a JSON header, then every tensor, end to end.

Source: huggingface/safetensors README.md ("Format").
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from ig_jax.errors import UserError
from ig_jax.files import atomic_file
from ig_jax.interop.tensor_storage import (
    LIMIT_INDEX_BYTES,
    LazyTensor,
    SourceFile,
    bytes_of,
    check_shape,
    shown,
)

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(source: SourceFile) -> tuple[dict[str, str], dict[str, LazyTensor]]:
    """Return the metadata and the tensors by name, in the order of the header. Raises: UserError."""
    header_bytes = struct.unpack("<Q", source.read(0, 8).tobytes())[0]
    if header_bytes > LIMIT_INDEX_BYTES:
        raise source.refusal(f"claims a header of {header_bytes} bytes")
    text = source.read(8, header_bytes).tobytes()
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (RecursionError, ValueError) as error:
        reason = str(error) if str(error).startswith("the name ") else "it is not JSON"
        raise source.refusal(f"has a header that cannot be read: {reason}") from None
    if type(header) is not dict:
        raise source.refusal("has a header that is not a dict")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise source.refusal("has __metadata__ that is not a dict of strings")
    return metadata, _lay_out(source, header, 8 + header_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {shown(twice)} occurs twice")
    return found


def _lay_out(source: SourceFile, header: dict, data_start: int) -> dict[str, LazyTensor]:
    """Return the tensors of a header, once they fill the file exactly, without holes or overlaps."""
    places = [(*_place(source, name, entry), name, entry) for name, entry in header.items()]
    end, tensors = 0, {}
    for start, stop, name, entry in sorted(places, key=lambda place: place[:2]):
        if start != end:
            raise source.refusal(
                f"has tensor {shown(name)} at byte {start} where the one before it ends at {end}"
            )
        dtype = _DTYPES[entry["dtype"]]
        shape = check_shape(source, entry["shape"], dtype.itemsize)
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise source.refusal(f"has {stop - start} bytes for tensor {shown(name)} of {dtype}{list(shape)}")
        read = partial(_read_plain, source, data_start + start, stop - start, dtype, shape)
        tensors[name], end = LazyTensor(shape, dtype, read), stop
    if data_start + end != source.size:
        raise source.refusal(f"has {source.size} bytes where its tensors end at {data_start + end}")
    return {name: tensors[name] for name in header}


def _place(source: SourceFile, name: str, entry: Any) -> tuple[int, int]:
    """Return where the data of a header entry starts and stops, once the entry has the right form."""
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise source.refusal(f"has a header entry {shown(name)} that does not describe a tensor")
    if type(entry["dtype"]) is not str or entry["dtype"] not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise source.refusal(
            f"has tensor {shown(name)} of dtype {shown(entry['dtype'])}", f"save it as one of {known}"
        )
    offsets = check_shape(source, entry["data_offsets"], 0)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise source.refusal(f"has impossible offsets for tensor {shown(name)}")
    return offsets


def _read_plain(source: SourceFile, start: int, nbytes: int, dtype: np.dtype, shape: tuple) -> np.ndarray:
    return source.read(start, nbytes).view(dtype).reshape(shape)


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors by name, and text about them, to a `.safetensors` file, one tensor in memory at a time.

    The file appears whole or not at all. Raises: UserError if it cannot be written.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}  # some readers want the format
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in codes:
            raise UserError(
                f"tensor {name} has dtype {tensor.dtype}; cast it to {', '.join(map(str, codes))}"
            )
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            handle.write(bytes_of(name, tensor))
