"""The pickle inside a torch file, or of numpy arrays alone, read and written without torch.

Reading executes nothing that the file names. Calls that make tensors and plain containers are looked up in a table
here; every other object becomes a Mark, which is refused where a tensor should be and ignored elsewhere. The opcodes
are checked before the first is executed, so that no memo index or length in the file allocates memory.

Source: pytorch/pytorch torch/_weights_only_unpickler.py and torch/_utils.py (formats only).
"""

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from ig_jax.base.errors import UserError
from ig_jax.weightfiles.tensor_storage import (
    COPY_AGAIN,
    LIMIT_BROADCAST_BYTES,
    OTHER_FILE,
    LazyTensor,
    Mark,
    SourceFile,
    check_shape,
    shown,
    unstorable,
)
from ig_jax.weightfiles.zip_entries import Entry

LIMIT_OPCODES = 500_000  # SiT-XL with EMA and Adam has 45,000
_PLAIN = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CONTAINERS = {"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND"}
_MEMO = {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "STOP", "SHORT_BINUNICODE"}
_CALLING = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "BINPERSID"}
_OTHERS = {
    "APPENDS",
    "SETITEM",
    "SETITEMS",
    "EMPTY_SET",
    "ADDITEMS",
    "FROZENSET",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINBYTES8",
}
_OPCODES = _PLAIN | _CONTAINERS | _MEMO | _CALLING | _OTHERS | {"POP", "POP_MARK", "BYTEARRAY8"}
_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGES = {f"torch {name}": dtype for name, dtype in _DTYPES.items()}
_STORAGES |= {"torch.storage UntypedStorage": np.dtype(np.uint8)}  # its element type comes with the tensor
_UNTYPED_DTYPES = {f"torch {name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}


class Namespace(dict):
    """The attributes of an argparse.Namespace or of a TorchScript module."""


class _Array(Mark):
    """A numpy array whose contents come next."""


class _Dtype(Mark):
    """A numpy dtype: its letters and bytes, and its order once that is set; without `plain` for objects and records."""

    def __init__(self, code: Any):
        super().__init__("numpy dtype")
        self.plain = np.dtype(code) if code in _NUMPY_CODES else None


_NUMPY_CODES = ("b1", "f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)))


@dataclass(frozen=True, slots=True)
class _Storage:
    """Raw elements of `dtype` that tensors are views of; several tensors may share one."""

    entry: Entry
    dtype: np.dtype


def load(source: SourceFile, data: bytes, entry: Callable[[str], Entry]) -> Any:
    """What a torch pickle holds, with a LazyTensor for each tensor and a Namespace for argparse's.

    `entry` returns the bytes of a storage by its key.  Raises: UserError for what no checkpoint needs.
    """
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(data)):
            if count >= LIMIT_OPCODES:
                raise source.refusal(f"holds a pickle of over {LIMIT_OPCODES} opcodes", OTHER_FILE)
            if opcode.name not in _OPCODES:
                raise source.refusal(f"holds the pickle opcode {opcode.name}, not used by torch", OTHER_FILE)
        return _Reader(source, data, entry).load()
    except UserError:
        raise
    # What pickle raises on bytes that are not a pickle (Warning: where made an error).
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, struct.error, Warning,
            pickle.UnpicklingError) as error:  # fmt: skip
        what = f"holds a pickle that is damaged or not of weights alone ({type(error).__name__})"
        raise source.refusal(what, f"{COPY_AGAIN} or, {OTHER_FILE}") from None


class _Reader(pickle._Unpickler):
    """The unpickler in Python, with the opcodes that call or set something replaced."""

    stack: list
    pop_mark: Callable[[], list]

    def __init__(self, source: SourceFile, data: bytes, entry: Callable[[str], Entry]):
        super().__init__(io.BytesIO(data))
        self.source, self.entry = source, entry
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Mark:
        """The name alone."""
        return Mark(f"{module} {name}")

    def append_items(self, items: list) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif type(self.stack[-1]) is not Mark:
            raise TypeError

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is Mark:
            return
        if type(target) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 60):
                key = Mark(f"{shown(key)} as key")  # itself it could be made to collide, or to hash forever
            if key in target:
                raise self.source.refusal(f"has the key {shown(key)} twice in one dict", OTHER_FILE)
            target[key] = value

    def call(self, table: Mapping[str, Callable], function: Any, args: Any) -> Any:
        """What `function` makes of its arguments if it is in the table, and otherwise its Mark."""
        if type(function) is not Mark or type(args) is not tuple:
            raise TypeError
        return table[function.name](self, *args) if function.name in table else function

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(_CALLS, function, args))

    def new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        scripted = type(cls) is Mark and cls.name.startswith("__torch__")
        table = {cls.name if scripted else "argparse Namespace": lambda reader: Namespace()}
        self.stack.append(self.call(table, cls, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace and type(state) is dict:
            target |= state
        elif type(target) is _Dtype and target.plain is not None:
            target.plain = target.plain.newbyteorder({"<": "<", ">": ">", "|": "|"}[state[1]])
        elif type(target) is _Array:
            _, shape, dtype, fortran, data = state
            self.stack[-1] = self.numpy_array(data, dtype, shape, "F" if fortran is True else "C")
        elif type(target) not in (dict, Mark):  # torch sets _metadata, module versions, on a state dict
            raise TypeError

    def persistent_load(self, pid: Any) -> _Storage | Mark:
        """The storage described by ("storage", type, key, location, elements)."""
        kind, storage_type, key, _, count = pid
        if kind != "storage" or type(storage_type) is not Mark or type(key) is not str or type(count) is not int:
            raise TypeError
        if storage_type.name not in _STORAGES:
            return storage_type
        dtype = _STORAGES[storage_type.name]
        entry = self.storages[key].entry if key in self.storages else self.entry(key)
        if entry.nbytes != count * dtype.itemsize:
            what = f"declares {shown(count)} {dtype} elements for storage {key}, which has {entry.nbytes} bytes"
            raise self.source.refusal(what)
        self.storages[key] = _Storage(entry, dtype)
        return self.storages[key]

    def tensor(self, storage, offset, shape, strides, requires_grad, hooks, extra=None) -> LazyTensor | Mark:
        if extra:
            return Mark("torch conjugated_or_negated_tensor")
        return self.view(storage, offset, shape, strides)

    def untyped_tensor(self, storage, offset, shape, strides, requires_grad, hooks, dtype, extra=None):
        if type(dtype) is not Mark or type(storage) is not _Storage:
            raise TypeError
        if extra or dtype.name not in _UNTYPED_DTYPES:
            return dtype
        return self.view(_Storage(storage.entry, _UNTYPED_DTYPES[dtype.name]), offset, shape, strides)

    def view(self, storage, offset, shape, strides) -> LazyTensor | Mark:
        """The tensor at `offset`, with `strides` (both in elements), checked to lie in `storage`."""
        if type(storage) is Mark:
            return storage
        if type(storage) is not _Storage or type(offset) is not int or not 0 <= offset < 1 << 48:
            raise TypeError
        itemsize, nbytes = storage.dtype.itemsize, storage.entry.nbytes
        shape = check_shape(self.source, shape, itemsize)
        if type(strides) is not tuple or len(strides) != len(shape):
            raise TypeError
        # The stride of a dimension of one is never used, and torch may write any.
        strides = check_shape(self.source, [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)], 0)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
        if (offset + extent) * itemsize > nbytes:
            raise self.source.refusal(f"has a tensor of {shape} that reaches past the end of its storage")
        if math.prod(shape) * itemsize > max(nbytes, LIMIT_BROADCAST_BYTES):
            raise self.source.refusal(f"has a tensor of {shape} expanded from a storage of {nbytes} bytes", OTHER_FILE)
        return LazyTensor(shape, storage.dtype, partial(_read_view, storage, offset, extent, shape, strides))

    def numpy_array(self, data, dtype, shape, order: str = "C") -> LazyTensor | Mark:
        """An array of plain numbers, in the byte order of this machine."""
        if type(dtype) is not _Dtype or dtype.plain is None or type(data) not in (bytes, bytearray):
            return Mark("numpy objects")
        shape, dtype = check_shape(self.source, shape, dtype.plain.itemsize), dtype.plain
        if math.prod(shape) * dtype.itemsize != len(data):
            raise self.source.refusal(f"has an array of {shape} with {len(data)} bytes")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
        return LazyTensor.of(np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape))

    def numpy_scalar(self, dtype, data) -> Any:
        found = self.numpy_array(data, dtype, ())
        return found.read().item() if type(found) is LazyTensor else found

    def from_type(self, function, tensor_type, args, state):
        return self.call(_TENSOR_CALLS, function, args)  # not _CALLS: from_type inside itself would nest without end

    dispatch: ClassVar[Any] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _OPCODES)
    } | {
        pickle.APPEND[0]: lambda self: self.append_items([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.append_items(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.EMPTY_SET[0]: lambda self: self.stack.append(Mark("builtins set")),  # its elements could collide
        pickle.ADDITEMS[0]: lambda self: self.append_items(self.pop_mark()),
        pickle.FROZENSET[0]: lambda self: (self.pop_mark(), self.stack.append(Mark("builtins frozenset"))),
        pickle.NEWOBJ_EX[0]: lambda self: (self.stack.pop(), self.new()),
        pickle.REDUCE[0]: reduce,
        pickle.NEWOBJ[0]: new,
        pickle.BUILD[0]: build,
    }


def _read_view(storage: _Storage, offset: int, extent: int, shape: tuple, strides: tuple) -> np.ndarray:
    """Read the bytes a view spans, and return them in C order."""
    itemsize = storage.dtype.itemsize
    data = storage.entry.read(offset * itemsize, extent * itemsize)
    view = np.ndarray(shape, storage.dtype, data, strides=[s * itemsize for s in strides])
    return view if view.flags.c_contiguous else view.copy(order="C")


_TENSOR_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _Reader.tensor,
    "torch._utils _rebuild_tensor_v3": _Reader.untyped_tensor,
    "torch._utils _rebuild_parameter": lambda reader, data, *_: data,
    "torch._utils _rebuild_parameter_with_state": lambda reader, data, *_: data,
}
_CALLS = _TENSOR_CALLS | {
    "torch._tensor _rebuild_from_type_v2": _Reader.from_type,
    "collections OrderedDict": lambda reader: {},
    "collections defaultdict": lambda reader, factory=None: {},
    "torch Size": lambda reader, shape: check_shape(reader.source, shape, 0),
    "numpy dtype": lambda reader, code, *flags: _Dtype(code),
    "_codecs encode": lambda reader, text, coding: text.encode("latin1") if coding == "latin1" else Mark("text"),
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _CALLS |= {
        f"{_numpy}.multiarray _reconstruct": lambda reader, *kind: _Array("numpy ndarray"),
        f"{_numpy}.multiarray scalar": _Reader.numpy_scalar,
        f"{_numpy}.numeric _frombuffer": _Reader.numpy_array,
    }


def dump(tree: Mapping[str, Any]) -> tuple[bytes, list[LazyTensor]]:
    """The pickle of nested dicts, lists and plain values, and its tensors; tensor k is storage "k".

    Raises: UserError for a dtype, TypeError for a value, that has no place in a torch file.
    """
    writer = _Writer(out := io.BytesIO())
    writer.dump(dict(tree))
    return out.getvalue(), writer.tensors


class _Writer(pickle._Pickler):
    """The pickler in Python for plain values alone, with tensors and globals written as torch writes them."""

    write: Callable[[bytes], Any]
    save: Callable[[Any], None]

    def __init__(self, out: io.BytesIO):
        super().__init__(out, 2)
        self.fast = True  # no memo: the same weights give the same bytes
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, obj: Any) -> Any:
        """Nothing is reduced to a call of its own choice."""
        if type(obj) not in self.dispatch:
            raise TypeError(f"a torch file of weights cannot hold a {type(obj).__name__}")
        return NotImplemented

    def save_global_name(self, name: Mark) -> None:
        self.write(pickle.GLOBAL + name.name.replace(" ", "\n").encode() + b"\n")

    def save_tensor(self, tensor: LazyTensor) -> None:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        if tensor.dtype not in names:
            raise unstorable(f"storage {len(self.tensors)}", tensor.dtype, names)
        size, storage_type = math.prod(tensor.shape), Mark(f"torch {names[tensor.dtype]}")
        strides = tuple(math.prod(max(n, 1) for n in tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        self.save(Mark("torch._utils _rebuild_tensor_v2"))
        self.write(pickle.MARK)
        self.save(("storage", storage_type, str(len(self.tensors)), "cpu", size))
        self.write(pickle.BINPERSID)
        for argument in (0, tuple(tensor.shape), strides, False, Mark("collections OrderedDict"), ()):
            self.save(argument)
        self.write(pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
        self.tensors.append(tensor)

    dispatch: ClassVar[Any] = {
        kind: pickle._Pickler.dispatch[kind] for kind in (type(None), bool, int, float, str, dict, list, tuple)
    } | {Mark: save_global_name, LazyTensor: save_tensor}
