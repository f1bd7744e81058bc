"""Paths on gs:// and s3://.

An object of a bucket can neither be mapped into memory nor appended to nor locked. What is read is copied to this
machine first (base/copies.py), what is written is made here and put there whole.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ig_jax.base.errors import UserError, check, one_line

LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> module, extra of pyproject.toml
# etils would take TensorFlow for gs://, and knows no s3:// then; it decides once, for all paths.
os.environ.setdefault("EPATH_USE_TF", "false")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return str(path).partition("://")[0] in LIBRARIES and "://" in str(path)


def bucket_path(text: str, name: str) -> Any:
    """The etils path of a URL that a user gave as `name`, with the methods of pathlib.

    Raises: UserError for another scheme, without its library, and where the bucket does not answer.
    """
    scheme = text.partition("://")[0]
    known = " or ".join(f"{known}://" for known in LIBRARIES)
    check(scheme in LIBRARIES, name, text, f"a path on this machine, {known}", "copy it here, or mount its bucket")
    module, extra = LIBRARIES[scheme]
    if importlib.util.find_spec(module) is None:
        fix = f'pip install -e ".[{extra}]", or mount the bucket'
        raise UserError(f"{name}={text!r} needs {module}", name=name, value=text, fix=fix)
    from etils import epath  # late: only buckets need it

    path = epath.Path(text)
    with reaching(text, name):
        path.exists()
    return path


@contextlib.contextmanager
def reaching(text: object, name: str) -> Iterator[None]:
    """Turn what goes wrong between here and a bucket into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types, from the network's to the library's own and the disk's
        fix = "check the name, the network and the credentials of this machine"
        what = f"{name}={str(text)!r}: {one_line(error)}"
        raise UserError(what, name=name, value=str(text), fix=fix) from error


def put(source: Path, path: Any) -> None:
    """Write a file, or the files of a folder, to a path in a bucket; those at the top of a folder come last.

    Raises: UserError where that fails.
    """
    import fsspec  # late, as above

    system, root = fsspec.core.url_to_fs(str(path))
    files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
    with reaching(path, "path"):
        for file in sorted(files, key=lambda file: -len(file.parts)):
            system.put_file(str(file), root if file == source else f"{root}/{file.relative_to(source)}")
