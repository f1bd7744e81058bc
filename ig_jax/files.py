"""Files and directories that appear whole or not at all, and files of results that grow by lines."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ig_jax.errors import UserError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` only when the block ends well and its bytes are on disk.

    Raises: UserError if the file cannot be written; whatever had the name before is then untouched.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A new directory that takes the name `path`, of none or an empty one, only when the block ends well.

    Raises: UserError if it cannot be written.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)


def append_lines(path: Path, records: list[dict]) -> None:
    """Add the records to a file of JSON lines; with none of them, see that it can be written before the work begins.

    Raises: UserError if it cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into the one line of it.  Raises: UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r}: {error.strerror or error}; "
            "name a folder you may write to, on a disk with space left") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` for what will be renamed to it; whatever still has it afterwards is removed."""
    # In the same folder, since a rename is atomic only within one file system; the suffix parts two writers.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)
            raise
