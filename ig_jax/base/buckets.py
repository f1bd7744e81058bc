"""Paths on gs:// and s3://.

An object of a bucket can neither be mapped into memory nor appended to nor locked. What is read is copied to this
machine first (base/copies.py), what is written is made here and put there whole.
"""

import importlib.util
import os
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
    try:
        path.exists()
    except Exception as error:  # of many types, from the network's to the library's own
        raise unreachable(text, name, error) from error
    return path


def unreachable(text: object, name: str, error: Exception) -> UserError:
    """The error of a bucket that does not answer, or does not allow it."""
    fix = "check the name, the network and the credentials of this machine"
    return UserError(f"{name}={str(text)!r}: {one_line(error)}", name=name, value=str(text), fix=fix)


def put(source: Path, path: Any) -> None:
    """Write a file, or the files of a folder, to a path in a bucket; those at the top of a folder come last.

    Raises: UserError where that fails.
    """
    import fsspec  # late, as above

    system, root = fsspec.core.url_to_fs(str(path))
    files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
    try:
        for file in sorted(files, key=lambda file: -len(file.parts)):
            system.put_file(str(file), root if file == source else f"{root}/{file.relative_to(source)}")
    except Exception as error:  # as above
        raise unreachable(path, "path", error) from error
