"""Lazy tensors and the files behind them, read within their bounds."""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ig_jax.base.errors import UserError

COPY_AGAIN = "download or copy the file again"
OTHER_FILE = "take another file of these weights, .safetensors if there is one"

# A full-size checkpoint (model, EMA, Adam) needs 0.15 MB of pickle and 0.1 MB of zip directory; the limits
# leave room for ten thousand tensors and keep what hostile bytes expand to under 200 MB of objects, made in
# a quarter of a second.
LIMIT_INDEX_BYTES = 2 << 20
LIMIT_RANK = 64  # numpy's own
LIMIT_BROADCAST_BYTES = 1 << 20


class Mark:
    """The name of something in a file that is not read and never executed; equal to itself alone."""

    def __init__(self, name: str):
        self.name = name


def shown(value) -> str:
    """text from a file as one short printable line."""
    if isinstance(value, Mark):
        value = value.name.replace(" ", ".")
    if not isinstance(value, (str, int)):
        return "a tensor" if isinstance(value, LazyTensor) else f"a {type(value).__name__}"
    text = repr(value[:80] if isinstance(value, str) else value)
    cut = len(text) > 100 or isinstance(value, str) and len(value) > 80
    return f"{text[:80]}..." if cut else text


@dataclass(frozen=True)
class LazyTensor:
    """A tensor read on demand: `shape`, `dtype`, and `read()`, a C-ordered array that the caller owns."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "LazyTensor":
        """Wrap an array that is already in memory."""
        return cls(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))

    @property
    def nbytes(self) -> int:
        """Size of the array that `read` returns, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SourceFile:
    """A file read at any place; every error is one line that names the file and the fix."""

    def __init__(self, path: str | os.PathLike):
        """Raises: UserError if `path` is not a regular file."""
        self.path = Path(path)
        if not self.path.is_file():  # a directory, or a pipe that would block
            raise self.refusal("is not a file", "check the path")
        self.size = self.path.stat().st_size

    def refusal(self, what: str, fix: str = COPY_AGAIN) -> UserError:
        """The error "path: what; fix", for the caller to raise."""
        return UserError(f"{self.path}: {what}", name=str(self.path), fix=fix)

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes [offset, offset + nbytes) as uint8.  Raises: UserError where the file is shorter or unreadable."""
        if min(offset, nbytes) < 0 or offset + nbytes > self.size:  # before anything is allocated
            raise self.refusal(f"is cut short or damaged ({nbytes} bytes at {offset} of {self.size})")
        try:
            data = np.fromfile(self.path, np.uint8, nbytes, offset=offset)
        except OSError as error:
            raise self.refusal(f"cannot be read ({error.strerror})", "check its permissions and the disk") from None
        if data.size != nbytes:
            raise self.refusal("became shorter while it was read")
        return data


def check_shape(source: SourceFile, shape, itemsize: int) -> tuple[int, ...]:
    """`shape` as a tuple of plain counts that numpy can hold.  Raises: UserError."""
    counts = type(shape) in (tuple, list) and len(shape) <= LIMIT_RANK
    if not counts or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise source.refusal("describes a tensor whose shape or stride is not a list of counts")
    if math.prod(n for n in shape if n) * itemsize >= 1 << 62:
        raise source.refusal("describes a tensor too large for any machine")
    return tuple(shape)


def unstorable(name: str, dtype: np.dtype, known: Iterable[np.dtype]) -> UserError:
    """The error of a tensor whose dtype a file format does not have, for the caller to raise."""
    fix = f"cast it to {', '.join(map(str, known))}"
    return UserError(f"{name} has dtype {dtype}", name=name, value=str(dtype), fix=fix)


def bytes_of(name: str, tensor: LazyTensor) -> memoryview:
    """Read a tensor as its bytes in C order.  Raises: ValueError if it is not of the dtype and size it declares."""
    array = np.ascontiguousarray(tensor.read())
    if array.dtype != tensor.dtype or array.size != math.prod(tensor.shape):
        raise ValueError(f"{name} read as {array.dtype}{list(array.shape)}, not {tensor.dtype}{list(tensor.shape)}")
    return array.reshape(-1).view(np.uint8).data
