"""Copies of what lies in a bucket, for readers that need files and for results that grow."""

import concurrent.futures
import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ig_jax.base.buckets import is_remote, put, reaching
from ig_jax.base.errors import check
from ig_jax.base.files import cache_folder, free_bytes, lock, user_path, writing

AT_ONCE = 8  # objects fetched


def local_copy(text: str | os.PathLike, name: str = "path") -> Path:
    """A path that a user gave as `name`; of a file, a folder or a pattern in a bucket, the path of a copy.

    Copies lie in $IG_JAX_CACHE, by default ~/.cache/ig_jax. An object is fetched once, and again when it has changed.
    Raises: UserError as `user_path`, and where the objects cannot be read or do not fit on the disk.
    """
    path = user_path(text, name)
    if not is_remote(path):
        return path
    import fsspec  # late: only buckets need it

    cache = cache_folder() / str(path).partition("://")[0]
    system, root = fsspec.core.url_to_fs(str(path))
    note = (cache / root).with_name(f".{path.name}.versions")
    with writing(note):
        note.parent.mkdir(parents=True, exist_ok=True)
        with open(note, "a+") as file:
            lock(file, note, wait=True)  # one process of this machine fetches, the others wait and find it there
            file.seek(0)
            versions = json.loads(file.read() or "{}")
            with reaching(path, name):
                wanted = _fetched(system, root, cache, versions, str(path))
            file.truncate(0)
            file.write(json.dumps(wanted))
    return cache / root


@contextlib.contextmanager
def at_hand(path: Path) -> Iterator[Path]:
    """A file itself, or of one in a bucket a copy that lasts as long as the context."""
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            copy = Path(folder) / path.name
            with path.open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
            path = copy
        yield path


@contextlib.contextmanager
def results_folder(text: str | os.PathLike, name: str, put_back: bool) -> Iterator[Path]:
    """The folder of results that a user gave as `name`; of one in a bucket a copy that lasts as long as the context.

    put_back: whether the bucket becomes what the copy is, however the context ends (of several processes, one's does).
    Raises: UserError as `user_path`, and where the bucket cannot be read or written.
    """
    path = user_path(text, name)
    if not is_remote(path):
        yield path
        return
    import fsspec  # late, as above

    system, root = fsspec.core.url_to_fs(str(path))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / root  # named in errors
        with reaching(path, name):
            found = _fetched(system, root, Path(folder), {}, str(path))
            copy.mkdir(parents=True, exist_ok=True)
        try:
            yield copy
        finally:
            if put_back:
                put(copy, path)
                with reaching(path, name):
                    for key in found:
                        if not (Path(folder) / key).exists():
                            system.rm_file(key)


def _fetched(system, root: str, cache: Path, have: dict[str, str], text: str) -> dict[str, str]:
    """Make the files below `cache` those of the bucket, and return their versions."""
    system.invalidate_cache()
    listed = system.glob(root, detail=True) if glob.has_magic(root) else system.find(root, detail=True)
    wanted = {key: _version(info) for key, info in listed.items() if info["type"] == "file"}
    new = [key for key, version in wanted.items() if have.get(key) != version or not (cache / key).exists()]
    size, free = sum(listed[key]["size"] for key in new), free_bytes(cache)
    fix = "make space, or set IG_JAX_CACHE to a folder on a larger disk"
    check(size <= free, "bucket", text, f"at most the {free / 1e9:,.1f} GB free in {cache}", fix)

    def fetch(key: str) -> None:
        part = cache / f"{key}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(key, str(part))
        os.replace(part, cache / key)

    for key in have.keys() - wanted.keys():
        (cache / key).unlink(missing_ok=True)
    if new:
        print(f"fetching {len(new)} objects, {size / 1e9:,.2f} GB, from {text}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, new))
    return wanted


def _version(info: dict) -> str:
    """What changes when an object does."""
    return str(info.get("etag") or info.get("ETag") or info.get("md5Hash") or info["size"])
