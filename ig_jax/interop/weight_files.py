"""Published weight files, `.pt` and `.safetensors`, read and written one tensor at a time and without torch.

A file is data to be checked, never code: reading one runs nothing and believes no length it claims.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ig_jax.errors import check
from ig_jax.files import atomic_file
from ig_jax.interop import torch_pickle
from ig_jax.interop.safetensors_file import read_safetensors, write_safetensors
from ig_jax.interop.tensor_storage import (
    COPY_AGAIN,
    LIMIT_INDEX_BYTES,
    SAVE_AGAIN,
    LazyTensor,
    SourceFile,
    bytes_of,
    shown,
)
from ig_jax.interop.zip_records import ZipRecords, write_entry

__all__ = ["LazyTensor", "WeightFile", "open_weights", "write_safetensors", "write_torch"]

_NOT_METADATA = {"model", "ema", "opt", "state_dict"}
_LIMIT_METADATA_NODES = 100_000  # a shared list inside shared lists grows exponentially when written out
_LIMIT_METADATA_DEPTH = 32

Format = Literal["sit", "lightningdit", "bare", "safetensors"]


@dataclass(frozen=True)
class WeightFile:
    """An open weight file: `format`, and `metadata`, its args, config or epoch as plain values."""

    format: Format
    metadata: dict[str, Any]
    _source: SourceFile = field(repr=False)
    _sets: dict[str, Any] = field(repr=False)

    def state_dict(self, which: Literal["ema", "model"]) -> dict[str, LazyTensor]:
        """Return one set of weights by tensor name, without the "module." of DistributedDataParallel.

        A bare state dict or a safetensors file holds one set, which is returned under either name.
        Raises: UserError if the set is missing or is not a dict of tensors.
        """
        check(which in ("ema", "model"), "which", which, '"ema" or "model"')
        if which not in self._sets:
            other = "the raw weights: --which=model" if which == "ema" else "the average: --which=ema"
            raise self._source.refusal(f'holds no "{which}" weights', f"if you mean it, ask for {other}")
        return _tensors(self._source, f'"{which}"', self._sets[which])


@contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[WeightFile]:
    """Open a `.safetensors` file, or under any other suffix one by torch.save, while the context lasts.

    Raises: UserError, here or when a tensor is read, naming the file, what is wrong with it and the mend.
    """
    with SourceFile(path) as source:
        is_safetensors = source.path.suffix.lower() == ".safetensors"
        yield _open_safetensors(source) if is_safetensors else _open_torch(source)


def _open_safetensors(source: SourceFile) -> WeightFile:
    metadata, tensors = read_safetensors(source)
    # The format has room for text alone: what a torch file holds as a dict stands there as JSON.
    metadata |= {key: _json(metadata[key]) for key in ("args", "config", "steps") if key in metadata}
    return WeightFile("safetensors", metadata, source, dict.fromkeys(("ema", "model"), tensors))


def _json(text: str) -> Any:
    """What a text means as JSON, or itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tensors(source: SourceFile, owner: str, entries: Any) -> dict[str, LazyTensor]:
    if type(entries) is not dict or not entries:
        raise source.refusal(f"has no state dict where {owner} should be", torch_pickle.SAVE_TENSORS)
    tensors = {}
    for key, tensor in entries.items():
        if type(key) is not str or not key.isprintable() or len(key) > 1000:
            raise source.refusal(f"has a tensor named {shown(key)} in {owner}", "rename it and save again")
        if type(tensor) is not LazyTensor:
            raise source.refusal(
                f"has {shown(tensor)} instead of a tensor as {shown(key)}", torch_pickle.SAVE_TENSORS
            )
        name = key.removeprefix("module.")
        if name in tensors:
            raise source.refusal(
                f'has {shown(name)} both with and without "module."', torch_pickle.SAVE_TENSORS
            )
        tensors[name] = tensor
    return tensors


def _open_torch(source: SourceFile) -> WeightFile:
    start = source.read(0, min(source.size, 4)).tobytes()
    if start == b"\x80\x02\x8a\n":  # the magic number of the old form
        raise source.refusal("is a torch file of the kind written before torch 1.6", SAVE_AGAIN)
    if start[:1] == b"\x80":
        raise source.refusal("is a plain pickle, not a torch file", torch_pickle.SAVE_TENSORS)
    if start != b"PK\x03\x04":
        raise source.refusal("is empty, cut short or neither a torch nor a .safetensors file", COPY_AGAIN)
    top = _read_torch(source, ZipRecords(source))
    if type(top) is not dict:
        raise source.refusal(f"holds {shown(top)}, not a dict of tensors", torch_pickle.SAVE_TENSORS)
    sets = {name: top[name] for name in ("model", "ema") if type(top.get(name)) is dict}
    if sets:
        return WeightFile(_wrapper_format(top, sets), _metadata(source, top), source, sets)
    lightning = type(top.get("state_dict")) is dict  # PyTorch Lightning's form, as VA-VAE was trained
    only_set = top["state_dict"] if lightning else top
    metadata = _metadata(source, top) if lightning else {}
    return WeightFile("bare", metadata, source, dict.fromkeys(("ema", "model"), only_set))


def _read_torch(source: SourceFile, records: ZipRecords) -> Any:
    pickles = [name for name in records.names() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise source.refusal(f"has {len(pickles)} data.pkl entries where a torch file has one")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in records.names():  # absent before torch 2.1
        if records.record(f"{folder}byteorder").nbytes != len("little"):
            raise source.refusal("has big-endian data", "save it again on a little-endian machine")
    record = records.record(pickles[0])
    if record.nbytes > LIMIT_INDEX_BYTES:
        raise source.refusal(f"has a pickle of {record.nbytes} bytes", torch_pickle.SAVE_TENSORS)
    data = record.read().tobytes()
    return torch_pickle.load(source, data, lambda key: records.record(f"{folder}data/{key}"))


def _wrapper_format(top: dict, sets: dict[str, dict]) -> Format:
    prefixed = any(str(key).startswith("module.") for entries in sets.values() for key in entries)
    return "lightningdit" if "config" in top or prefixed else "sit"


def _metadata(source: SourceFile, top: dict) -> dict[str, Any]:
    """Return the entries that are not weights as plain dicts, lists, strings and numbers."""
    left = _LIMIT_METADATA_NODES

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _LIMIT_METADATA_DEPTH:
            raise source.refusal("has settings nested too deeply or too large", torch_pickle.SAVE_TENSORS)
        if type(value) is torch_pickle.Namespace:
            value = value.fields
        if type(value) is dict:
            return {key: plain(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [plain(item, depth + 1) for item in value]
        if type(value) is torch_pickle.Global:
            return value.name.replace(" ", ".")
        plain_value = value is None or type(value) in (bool, int, float, str)
        return value if plain_value else shown(value)

    return {key: plain(value, 0) for key, value in top.items() if key not in _NOT_METADATA}


def write_torch(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Write what torch.load(path, weights_only=True) returns as `tree`, one tensor in memory at a time.

    `tree` nests dicts, lists, plain values and LazyTensors: {"model": {...}, "ema": {...}} or a state dict.
    The file appears whole or not at all. Raises: UserError if it cannot be written.
    """
    pickle, tensors = torch_pickle.dump(tree)
    with atomic_file(path) as handle, zipfile.ZipFile(handle, "w") as archive:
        write_entry(archive, handle, "archive/data.pkl", pickle)
        write_entry(archive, handle, "archive/byteorder", b"little")
        for key, tensor in enumerate(tensors):
            write_entry(archive, handle, f"archive/data/{key}", bytes_of(f"storage {key}", tensor))
        write_entry(archive, handle, "archive/version", b"3\n")
