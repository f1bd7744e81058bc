"""Paths given by users, and files and directories that appear whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ig_jax.base import buckets
from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError, check

FILE_URL = "file://"


def user_path(text: str | os.PathLike, name: str = "path") -> Path:
    """The absolute path a user gave as `name`, ~ expanded; gs:// and s3:// paths through etils, with the same methods.

    Raises: UserError for a path that the system cannot look for (a name that is too long, a loop of links), and for a
    bucket that cannot be reached.
    """
    if "://" in str(text) and not str(text).startswith(FILE_URL):
        return typing.cast(Path, buckets.bucket_path(str(text), name))
    return local_path(text, name)


def run_path(text: str | os.PathLike, name: str) -> Path:
    """The path of a work directory or of checkpoints.  Raises: UserError for s3://, which Orbax does not write."""
    expected, fix = "a path on this machine or gs://, where Orbax writes checkpoints", "mount the bucket"
    check(not str(text).startswith("s3://"), name, str(text), expected, fix)
    return user_path(text, name)


def local_path(text: str | os.PathLike, name: str) -> Path:
    """The same for a place that must be on a file system.  Raises: UserError for any other URL too."""
    plain = str(text).removeprefix(FILE_URL) if str(text).startswith(f"{FILE_URL}/") else str(text)
    fix = "copy it here, or mount its bucket" if "://" in plain else "give another path"
    check("://" not in plain, name, str(text), "a path on this machine, not a URL", fix)
    try:
        path = Path(plain).expanduser().absolute()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # not there yet, or the caller says what it must be
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop, not allowed; a NUL; a home that nobody has
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(name=name, value=str(text), expected=f"a path that can be used ({why})", fix=fix) from error
    return path


def cache_folder() -> Path:
    """Of what can be made or fetched again: $IG_JAX_CACHE, by default ~/.cache/ig_jax."""
    return Path(os.environ.get("IG_JAX_CACHE") or "~/.cache/ig_jax").expanduser()


def is_file(text: str) -> bool:
    """Whether a local path is a file; False too where the system cannot even look (a name that is too long)."""
    return _exists(text, Path.is_file)


def is_dir(text: str) -> bool:
    """Whether a local path is a directory; False too where the system cannot even look."""
    return _exists(text, Path.is_dir)


def _exists(text: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(text).expanduser())
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a home that nobody has
        return False


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that is renamed to `path` once the block has succeeded and its bytes are on disk.

    Raises: UserError if the file cannot be written; an existing file is then untouched.
    """
    with _temporary(path) as temporary:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text with a newline behind it as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(f"{text}\n".encode())


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A new directory that is renamed to `path`, absent or empty, once the block has succeeded.

    Raises: UserError if it cannot be written.
    """
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary


def remove_leftovers(folder: Path) -> None:
    """Remove what `atomic_file` left half written in a folder when its process was killed."""
    if is_remote(folder):
        return  # an object appears whole
    for leftover in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be there, with everything in it."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # of etils
    else:
        shutil.rmtree(folder, ignore_errors=True)


def file_size(path: Path) -> int:
    """Bytes of a file."""
    found = path.stat()
    return found.length if is_remote(path) else found.st_size  # type: ignore[attr-defined]  # of etils


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist yet; a bucket has room for everything."""
    if is_remote(path):
        return 2**63
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def append_lines(path: Path, records: list[dict]) -> None:
    """Append the records to a JSON lines file; an empty list checks that it can be written, before the work.

    Raises: UserError if it cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)


def lock(file: typing.IO, path: Path, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process holds it and this one does not wait.

    A file system without locks is warned of, and no reason to stop.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        why = f"{path} cannot be locked ({error.strerror})"
        print(f"ig_jax: warning: {why}; use it from one process at a time", file=sys.stderr, flush=True)
    return True


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError from writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r}: {error.strerror or error}",
            name="path",
            value=str(path),
            fix="name a folder you may write to, on a disk with space left",
        ) from error


@contextlib.contextmanager
def _temporary(path: str | os.PathLike) -> Iterator[Path]:
    """A name for what will be moved to `path` once the block has succeeded; removed if it fails."""
    with writing(path), contextlib.ExitStack() as stack:
        if is_remote(path):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "whole"
        else:
            # In the same folder: a rename is atomic only within one file system. The suffix separates two writers.
            path = Path(path)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            buckets.put(temporary, path) if is_remote(path) else os.replace(temporary, path)
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
            raise


def matching(pattern: str) -> list[str]:
    """The checkpoints of a pattern such as RUN/checkpoints/*, by their steps; any other text is the one it names."""
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    paths: Iterable[Path]
    if "://" in pattern:
        folder, _, last = pattern.rpartition("/")
        paths = user_path(folder, "--checkpoint").glob(last)
    else:
        paths = map(Path, glob.glob(os.path.expanduser(pattern)))
    found = [path for path in paths if path.is_dir() and "tmp" not in path.name and path.name != "damaged"]
    check(bool(found), "--checkpoint", pattern, "a pattern that matches a directory")
    return [str(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]
