"""Lazy tensors and the files behind them, read within their bounds."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ig_jax.errors import UserError

COPY_AGAIN = "download or copy the file again"
SAVE_AGAIN = "save it again with a recent torch: torch.save(torch.load(old, weights_only=True), new)"

# A full-size checkpoint (model, EMA, Adam) needs 0.15 MB of pickle and 0.1 MB of zip directory; the limits
# leave room for ten thousand tensors and keep what hostile bytes expand to under 200 MB of objects, made in
# a quarter of a second.
LIMIT_INDEX_BYTES = 2 << 20
LIMIT_RANK = 64  # numpy's own
LIMIT_BROADCAST_BYTES = 1 << 20


def shown(value) -> str:
    """Return text from a file as one short printable line."""
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
    """A file open for reading at any place; every error is one line that names the file and the mend."""

    def __init__(self, path: str | os.PathLike):
        """Open `path`. Raises: UserError if it is not a readable regular file."""
        self.path = Path(path)
        if not self.path.is_file():  # a directory, or a pipe that would block
            raise self.refusal("is not a file", "check the path")
        try:
            self._handle = open(self.path, "rb", buffering=0)
            self.size = os.fstat(self._handle.fileno()).st_size
        except OSError as error:
            raise self.refusal(f"cannot be opened ({error.strerror})", "check its permissions") from None

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(self, *_) -> None:
        self._handle.close()

    def refusal(self, what: str, mend: str = COPY_AGAIN) -> UserError:
        """Return the error "path: what; mend", for the caller to raise."""
        return UserError(f"{self.path}: {what}; {mend}")

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes [offset, offset + nbytes) as uint8. Raises: UserError where the file is shorter."""
        if min(offset, nbytes) < 0 or offset + nbytes > self.size:  # before anything is allocated
            raise self.refusal(f"is cut short or damaged ({nbytes} bytes at {offset} of {self.size})")
        data = np.empty(nbytes, np.uint8)
        rest = memoryview(data)
        try:
            self._handle.seek(offset)
            while rest:
                count = self._handle.readinto(rest)
                if not count:
                    raise self.refusal("became shorter while it was read")
                rest = rest[count:]
        except OSError as error:
            raise self.refusal(f"cannot be read ({error.strerror})", "check the disk") from None
        return data


def check_shape(source: SourceFile, shape, itemsize: int) -> tuple[int, ...]:
    """Return `shape` as a tuple of plain counts that numpy can hold. Raises: UserError."""
    counts = type(shape) in (tuple, list) and len(shape) <= LIMIT_RANK
    if not counts or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise source.refusal("describes a tensor whose shape or stride is not a list of counts")
    if math.prod(n for n in shape if n) * itemsize >= 1 << 62:
        raise source.refusal("describes a tensor too large for any machine")
    return tuple(shape)


def bytes_of(name: str, tensor: LazyTensor) -> memoryview:
    """Read a tensor as its bytes in C order. Raises: ValueError if it is not the array it said it is."""
    array = np.ascontiguousarray(tensor.read())
    if array.dtype != tensor.dtype or array.size != math.prod(tensor.shape):
        raise ValueError(
            f"{name} read as {array.dtype}{list(array.shape)}, not {tensor.dtype}{list(tensor.shape)}"
        )
    return memoryview(array.reshape(-1).view(np.uint8))
