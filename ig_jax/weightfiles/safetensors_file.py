"""The safetensors format, read through its library and written one tensor at a time.

Source: huggingface/safetensors README.md ("Format").
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ig_jax.base.errors import UserError, one_line
from ig_jax.base.files import atomic_file
from ig_jax.weightfiles.tensor_storage import (
    LIMIT_INDEX_BYTES,
    LazyTensor,
    SourceFile,
    bytes_of,
    check_shape,
    shown,
    unstorable,
)

_DTYPES = {
    f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}")
    for kind, sizes in {"float": (64, 32, 16), "int": (64, 32, 16, 8), "uint": (64, 32, 16, 8)}.items()
    for bits in sizes
} | {"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(np.bool_)}


def read_safetensors(source: SourceFile, stack: ExitStack) -> tuple[dict[str, str], dict[str, LazyTensor]]:
    """the metadata and the tensors by name; `stack` closes the library's file.  Raises: UserError."""
    _check_header(source)
    try:
        # Its own reads instead of a memory map: a file that becomes shorter would end the process.
        file = stack.enter_context(safetensors.safe_open(source.path, "numpy", backend="pread"))
        return file.metadata() or {}, {name: _tensor(source, file, name) for name in file.offset_keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise source.refusal(f"is cut short or no safetensors file: {one_line(error)}") from None


def _check_header(source: SourceFile) -> None:
    """Refuse a large header, and a name that occurs twice: the library would take the last of the two."""
    header_bytes = struct.unpack("<Q", source.read(0, 8).tobytes())[0]
    if header_bytes > LIMIT_INDEX_BYTES:
        raise source.refusal(f"declares a header of {header_bytes} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> None:
        name, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if count > 1:
            raise source.refusal(f"has a header in which the name {shown(name)} occurs twice")

    try:
        json.loads(source.read(8, header_bytes).tobytes(), object_pairs_hook=unique)
    except UserError:
        raise
    except (RecursionError, ValueError):
        raise source.refusal("has a header that is not JSON") from None


def _tensor(source: SourceFile, file: Any, name: str) -> LazyTensor:
    part = file.get_slice(name)
    code = part.get_dtype()
    if code not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise source.refusal(f"has tensor {shown(name)} of dtype {shown(code)}", f"save it as one of {known}")
    dtype = _DTYPES[code]
    return LazyTensor(check_shape(source, part.get_shape(), dtype.itemsize), dtype, partial(_read, source, file, name))


def _read(source: SourceFile, file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise source.refusal(f"tensor {shown(name)} cannot be read: {one_line(error)}") from None


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors by name, and text about them, to a `.safetensors` file, one tensor in memory at a time.

    The library would need all of them in memory. The file appears complete or not at all.
    Raises: UserError if it cannot be written.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}  # some readers need the format
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in codes:
            raise unstorable(f"tensor {name}", tensor.dtype, codes)
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            handle.write(bytes_of(name, tensor))
