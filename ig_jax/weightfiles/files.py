"""Published weight files, read one tensor at a time without torch or TensorFlow; torch and safetensors are written too.

Formats: torch and TorchScript, safetensors, shards and folders of these, pickles of numpy arrays, TensorFlow graphs.

Reading executes nothing that a file holds and trusts no length that it declares. The first bytes decide what a file is,
not its name.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ig_jax.base.errors import UserError
from ig_jax.base.files import atomic_file
from ig_jax.weightfiles import graph_file, torch_pickle
from ig_jax.weightfiles.safetensors_file import read_safetensors, write_safetensors
from ig_jax.weightfiles.tensor_storage import (
    COPY_AGAIN,
    LIMIT_INDEX_BYTES,
    OTHER_FILE,
    LazyTensor,
    Mark,
    SourceFile,
    bytes_of,
    shown,
)
from ig_jax.weightfiles.zip_entries import ZipEntries, write_entry

__all__ = ["LazyTensor", "WeightFile", "open_weights", "write_safetensors", "write_torch"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_LIMIT_DEPTH = 6  # of dicts in which tensors are looked for
_LIMIT_ENTRIES = 1_000_000  # of all of them: a dict that holds another one twice has its entries twice
_SHARD = re.compile(r"-(\d{5})-of-(?!00001)(\d{5})\.\w+$")


@dataclass(frozen=True)
class WeightFile:
    """An open weight file.

    `sets`: the dicts that hold tensors, by their place such as "ema", "ema.shadow" or "" for the file itself;
    `metadata`: what else the file holds; `paths`: the files read, several for shards.
    """

    paths: tuple[Path, ...]
    sets: dict[str, dict]
    metadata: dict[str, Any]
    source: SourceFile = field(repr=False)

    def joined(self) -> dict[str, LazyTensor]:
        """The tensors of all sets, by the whole place of each with dots in between."""
        named = {
            f"{place}.{name}" if place else name: t for place, level in self.sets.items() for name, t in level.items()
        }
        return {str(name): tensor for name, tensor in named.items() if type(tensor) is LazyTensor}


@contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[WeightFile]:
    """Open a torch or safetensors file, the index of its shards, or the folder of any of them, while the context lasts.

    Raises: UserError, here or when a tensor is read, naming the file, what is wrong with it and the fix.
    """
    path = Path(path)
    source = SourceFile(_weights_in(path) if path.is_dir() else path)
    with ExitStack() as stack:
        if source.path.name.endswith(".index.json"):
            yield _open_index(source, stack)
            return
        if shard := _SHARD.search(source.path.name):
            what = f"is shard {int(shard[1])} of {int(shard[2])}"
            raise source.refusal(what, "give the .index.json next to it, or the folder")
        yield _open_file(source, stack)


def _weights_in(folder: Path) -> Path:
    """The weight file of a folder, or the index of its shards; of two formats of one file, safetensors."""
    names = sorted(entry.name for entry in folder.iterdir())
    indexes = [name for name in names if name.endswith(".index.json")]
    single = [name for name in names if name.endswith(SUFFIXES) and not _SHARD.search(name)]
    for choices in (indexes, single):
        safe = [name for name in choices if ".safetensors" in name]
        if len(found := safe or choices) == 1:
            return folder / found[0]
        if found:
            what = f"holds {len(found)} weight files: {', '.join(found[:5])}"
            raise UserError(f"{folder} {what}", name=str(folder), fix="give the path of one of them")
    fix = f"give a folder with one of {', '.join(SUFFIXES)}"
    raise UserError(f"{folder} holds no weight file", name=str(folder), fix=fix)


def _open_file(source: SourceFile, stack: ExitStack) -> WeightFile:
    start = source.read(0, min(source.size, 9)).tobytes()
    if start[:4] == b"PK\x03\x04":
        return _with_sets(source, read_torch(source))
    if source.path.suffix.lower() == ".safetensors" or start[8:] == b"{":
        text, tensors = read_safetensors(source, stack)
        # The format has room for text alone: what a torch file holds as a dict stands there as JSON.
        metadata = text | {key: _json(text[key]) for key in ("args", "config", "steps") if key in text}
        return WeightFile((source.path,), {"": tensors}, metadata, source)
    if start[:4] == b"\x80\x02\x8a\n":  # the magic number of the old form
        raise source.refusal("is a torch file of the kind written before torch 1.6", OTHER_FILE)
    if start[:1] == b"\x80":
        return _with_sets(source, read_pickle(source))
    if start[:1] == b"\n":
        return WeightFile((source.path,), {"": graph_file.read_graph(source)}, {}, source)
    raise source.refusal("is empty, cut short or neither a torch nor a safetensors file", COPY_AGAIN)


def read_pickle(source: SourceFile) -> Any:
    """What a pickle of dicts, plain values and numpy arrays holds; storages of torch are not found in one."""

    def entry(key: str):
        raise source.refusal("is a plain pickle of torch's tensors", OTHER_FILE)

    return torch_pickle.load(source, source.read(0, source.size).tobytes(), entry)


def _json(text: str) -> Any:
    """What a text means as JSON, or itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _open_index(source: SourceFile, stack: ExitStack) -> WeightFile:
    """The tensors of all shards, as the index of huggingface's libraries lists them."""
    if source.size > LIMIT_INDEX_BYTES:
        raise source.refusal(f"is an index of {source.size} bytes")
    index = _json(source.read(0, source.size).tobytes().decode(errors="replace"))
    places = index.get("weight_map") if type(index) is dict else None
    if type(places) is not dict or not all(type(name) is str and Path(name).name == name for name in places.values()):
        raise source.refusal("is no index of shards: its weight_map must name files in its own folder")
    shards = {name: _open_file(SourceFile(source.path.with_name(name)), stack) for name in sorted({*places.values()})}
    for name, file in places.items():
        if name not in shards[file].sets.get("", {}):
            raise source.refusal(f"lists {shown(name)} in {file}, which does not hold it")
    tensors = {name: shards[file].sets[""][name] for name, file in places.items()}
    paths = tuple(shard.paths[0] for shard in shards.values())
    return WeightFile((source.path, *paths), {"": tensors}, {}, source)


def _with_sets(source: SourceFile, top: Any) -> WeightFile:
    if not isinstance(top, dict):
        raise source.refusal(f"holds {shown(top)}, not a dict of tensors", OTHER_FILE)
    sets: dict[str, dict] = {}
    entries = 0

    def walk(place: str, level: dict, depth: int) -> None:
        nonlocal entries
        entries += len(level)
        if entries > _LIMIT_ENTRIES:
            raise source.refusal("holds dicts that are nested too deeply or too large", OTHER_FILE)
        if any(type(value) is LazyTensor for value in level.values()):
            sets[place] = level
        for key, value in level.items():
            if type(key) is str and isinstance(value, dict) and depth < _LIMIT_DEPTH:
                walk(f"{place}.{key}" if place else key, value, depth + 1)

    walk("", top, 0)
    if not sets:
        mark = next((f": {shown(k)} is {shown(v)}" for k, v in top.items() if type(v) is Mark), "")
        raise source.refusal(f"holds no tensors{mark}", OTHER_FILE)
    weights = {"opt", "optimizer", *(place.split(".")[0] for place in sets)}
    metadata = {key: value for key, value in top.items() if key not in weights and type(value) is not LazyTensor}
    return WeightFile((source.path,), sets, metadata, source)


def read_torch(source: SourceFile) -> Any:
    """What a torch file holds, with a LazyTensor for each tensor.  Raises: UserError."""
    entries = ZipEntries(source)
    pickles = [name for name in entries.names() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise source.refusal(f"has {len(pickles)} data.pkl entries where a torch file has one")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"  # absent before torch 2.1
    if order in entries.names() and entries.entry(order).nbytes != len("little"):
        raise source.refusal("has big-endian data", OTHER_FILE)
    program = entries.entry(pickles[0])
    if program.nbytes > LIMIT_INDEX_BYTES:
        raise source.refusal(f"has a pickle of {program.nbytes} bytes", OTHER_FILE)
    return torch_pickle.load(source, program.read().tobytes(), lambda key: entries.entry(f"{folder}data/{key}"))


def write_torch(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Write what torch.load(path, weights_only=True) returns as `tree`, one tensor in memory at a time.

    `tree` nests dicts, lists, plain values and LazyTensors: {"model": {...}, "ema": {...}} or a state dict.
    The file appears complete or not at all. Raises: UserError if it cannot be written.
    """
    pickle, tensors = torch_pickle.dump(tree)
    with atomic_file(path) as handle, zipfile.ZipFile(handle, "w") as archive:
        write_entry(archive, handle, "archive/data.pkl", pickle)
        write_entry(archive, handle, "archive/byteorder", b"little")
        for key, tensor in enumerate(tensors):
            write_entry(archive, handle, f"archive/data/{key}", bytes_of(f"storage {key}", tensor))
        write_entry(archive, handle, "archive/version", b"3\n")
