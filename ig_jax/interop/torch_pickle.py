"""The pickle inside a torch file, read and written without torch.

Reading interprets the few opcodes a checkpoint needs. A global is only ever a name looked up in the tables
below: nothing it names is imported, called or set. No opcode copies a container, so n opcodes make n objects.

Source: pytorch/pytorch torch/_weights_only_unpickler.py and torch/_utils.py (formats only).
"""

import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ig_jax.errors import UserError
from ig_jax.interop.tensor_storage import (
    COPY_AGAIN,
    LIMIT_BROADCAST_BYTES,
    LazyTensor,
    SourceFile,
    check_shape,
    shown,
)
from ig_jax.interop.zip_records import Record

SAVE_TENSORS = 'if you trust it, save its tensors alone: torch.save({"ema": checkpoint["ema"]}, path)'
LIMIT_OPCODES = 500_000  # SiT-XL with EMA and Adam has 45,000

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
_INERT = {"torch Tensor", "torch.nn.parameter Parameter"} | {
    f"torch {name}"
    for name in (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}


@dataclass(frozen=True, slots=True)
class Global:
    """The name "module attribute" of something on the allow-list; it stands for itself only."""

    name: str


class Namespace:
    """The attributes of an argparse.Namespace, as a dict."""

    __slots__ = ("fields",)

    def __init__(self):
        self.fields: dict = {}


@dataclass(frozen=True, slots=True)
class _Storage:
    """Raw elements of `dtype` that tensors are views of; several tensors may share one."""

    record: Record
    dtype: np.dtype


def load(source: SourceFile, data: bytes, record: Callable[[str], Record]) -> Any:
    """Return what a torch pickle holds, with a LazyTensor for each tensor and a Namespace for argparse's.

    `record` returns the bytes of a storage by its key. Raises: UserError for what no checkpoint needs.
    """
    machine = _Machine(source, record)
    try:
        return machine.run(data)
    except UserError:
        raise
    # What pickletools and the stack raise on bytes that are not a pickle (Warning: where made an error).
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, Warning) as error:
        what = f"holds a pickle that is damaged or not of weights alone ({type(error).__name__})"
        raise source.refusal(what, f"{COPY_AGAIN} or, {SAVE_TENSORS}") from None


class _Machine:
    """A stack machine for pickle protocols 2 to 5, without the opcodes a checkpoint has no use for."""

    def __init__(self, source: SourceFile, record: Callable[[str], Record]):
        self.source, self.record = source, record
        self.stack: list = []
        self.marked: list[list] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, data: bytes) -> Any:
        """Return the value the pickle leaves."""
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if count >= LIMIT_OPCODES:
                raise self.source.refusal(f"holds a pickle of over {LIMIT_OPCODES} opcodes", SAVE_TENSORS)
            if opcode.name == "STOP":
                return self.stack.pop()
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise self.source.refusal(
                    f"holds the pickle opcode {opcode.name}, not used by torch", SAVE_TENSORS
                )
            operation(self, arg)

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def make_tuple(self, count: int | None) -> None:
        if count is None:
            items = self.pop_to_mark()
        else:
            items = [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys could be made to collide, or to hash forever.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 60):
                raise self.source.refusal(f"has a dict whose key is {shown(key)}, not a string", SAVE_TENSORS)
            if key in target:
                raise self.source.refusal(f"has the key {shown(key)} twice in one dict", SAVE_TENSORS)
            target[key] = value

    def look_up(self, name: str) -> None:
        if name not in _ALLOWED:
            name = shown(name.replace(" ", "."))
            raise self.source.refusal(
                f"asks for {name}, which weights do not need; nothing was run", SAVE_TENSORS
            )
        self.stack.append(Global(name))

    def look_up_stack(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self.look_up(f"{module} {name}")

    def reduce(self, _) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """Return what the allow-listed `function` stands for, given its arguments."""
        call = _CALLS.get(function.name) if type(function) is Global else None
        if call is None or type(args) is not tuple:
            raise TypeError
        return call(self, *args)

    def new(self, _) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not Global or cls.name not in _CLASSES or type(args) is not tuple or args:
            raise TypeError
        self.stack.append(_CLASSES[cls.name]())

    def build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace and type(state) is dict:
            target.fields = state
        elif type(target) is not dict:  # torch sets _metadata, module versions, on a state dict
            raise TypeError

    def storage(self, _) -> None:
        """Replace ("storage", type, key, location, elements) by its _Storage."""
        kind, storage_type, key, _, count = self.stack.pop()
        known = type(storage_type) is Global and storage_type.name in _STORAGES
        if kind != "storage" or not known or type(key) is not str or type(count) is not int:
            raise TypeError
        dtype = _STORAGES[storage_type.name]
        record = self.storages[key].record if key in self.storages else self.record(key)
        if record.nbytes != count * dtype.itemsize:
            raise self.source.refusal(
                f"claims {shown(count)} {dtype} elements for storage {key}, which has {record.nbytes} bytes"
            )
        self.storages[key] = _Storage(record, dtype)
        self.stack.append(self.storages[key])

    def tensor(self, storage, offset, shape, strides, requires_grad, hooks, extra=None) -> LazyTensor:
        if extra:
            raise self.source.refusal("has a tensor with pending conjugation or negation", SAVE_TENSORS)
        return self.view(storage, offset, shape, strides)

    def untyped_tensor(
        self, storage, offset, shape, strides, requires_grad, hooks, dtype, extra=None
    ) -> LazyTensor:
        if extra or type(dtype) is not Global or type(storage) is not _Storage:
            raise TypeError
        return self.view(_Storage(storage.record, _UNTYPED_DTYPES[dtype.name]), offset, shape, strides)

    def view(self, storage, offset, shape, strides) -> LazyTensor:
        """Return the tensor at `offset`, with `strides` (both in elements), checked to lie in `storage`."""
        if type(storage) is not _Storage or type(offset) is not int or not 0 <= offset < 1 << 48:
            raise TypeError
        itemsize = storage.dtype.itemsize
        shape = check_shape(self.source, shape, itemsize)
        if type(strides) is not tuple or len(strides) != len(shape):
            raise TypeError
        # The stride of a dimension of one is never used, and torch may write any.
        strides = check_shape(
            self.source, [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)], 0
        )
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
        if (offset + extent) * itemsize > storage.record.nbytes:
            raise self.source.refusal(f"has a tensor of {shape} that reaches past the end of its storage")
        if math.prod(shape) * itemsize > max(storage.record.nbytes, LIMIT_BROADCAST_BYTES):
            raise self.source.refusal(
                f"has a tensor of {shape} expanded from a storage of {storage.record.nbytes} bytes",
                "call .contiguous() on it before torch.save",
            )
        return LazyTensor(shape, storage.dtype, partial(_read_view, storage, offset, extent, shape, strides))

    def parameter(self, data, requires_grad, hooks, state=None) -> LazyTensor:
        if type(data) is not LazyTensor:
            raise TypeError
        return data

    def from_type(self, function, tensor_type, args, state) -> LazyTensor:
        # Only these functions: from_type inside itself would nest without end.
        if type(function) is not Global or function.name not in _TENSOR_CALLS:
            raise TypeError
        return self.call(function, args)

    def size(self, shape) -> tuple:
        return check_shape(self.source, shape, 0)

    def device(self, kind, index=0) -> str:
        if type(kind) is not str or len(kind) > 16 or type(index) is not int:
            raise TypeError
        return f"{kind}:{index}" if index else kind


def _read_view(storage: _Storage, offset: int, extent: int, shape: tuple, strides: tuple) -> np.ndarray:
    """Read the bytes a view spans, and return them in C order."""
    itemsize = storage.dtype.itemsize
    data = storage.record.read(offset * itemsize, extent * itemsize)
    view = np.ndarray(shape, storage.dtype, data, strides=[s * itemsize for s in strides])
    return view if view.flags.c_contiguous else view.copy(order="C")


_TENSOR_CALLS = {
    "torch._utils _rebuild_tensor_v2": _Machine.tensor,
    "torch._utils _rebuild_tensor_v3": _Machine.untyped_tensor,
    "torch._utils _rebuild_parameter": _Machine.parameter,
    "torch._utils _rebuild_parameter_with_state": _Machine.parameter,
}
_CALLS = _TENSOR_CALLS | {
    "torch._tensor _rebuild_from_type_v2": _Machine.from_type,
    "collections OrderedDict": lambda machine: {},
    "torch Size": _Machine.size,
    "torch device": _Machine.device,
}
_CLASSES = {"argparse Namespace": Namespace}
_ALLOWED = frozenset({*_CALLS, *_CLASSES, *_STORAGES, *_UNTYPED_DTYPES, *_INERT})


def _pushing(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, arg: machine.stack.append(make(arg))


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "NONE": _pushing(lambda _: None),
    "NEWTRUE": _pushing(lambda _: True),
    "NEWFALSE": _pushing(lambda _: False),
    "EMPTY_TUPLE": _pushing(lambda _: ()),
    "EMPTY_LIST": _pushing(lambda _: []),
    "EMPTY_DICT": _pushing(lambda _: {}),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": _Machine.memoize,
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "GLOBAL": _Machine.look_up,
    "STACK_GLOBAL": _Machine.look_up_stack,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
} | dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    _pushing(lambda arg: arg),
)


def dump(tree: Mapping[str, Any]) -> tuple[bytes, list[LazyTensor]]:
    """Return the pickle of nested dicts, lists and plain values, and its tensors; tensor k is storage "k".

    Raises: UserError for a dtype, TypeError for a value, that has no place in a torch file.
    """
    out, tensors = bytearray(b"\x80\x02"), []
    _emit(tree, out, tensors)
    return bytes(out + b"."), tensors


def _emit(value: Any, out: bytearray, tensors: list[LazyTensor]) -> None:
    if isinstance(value, LazyTensor):
        _emit_tensor(value, out, tensors)
    elif isinstance(value, Mapping):
        out += b"}("
        for key, item in value.items():
            _emit(key, out, tensors)
            _emit(item, out, tensors)
        out += b"u"
    elif isinstance(value, (list, tuple)):
        out += b"](" if isinstance(value, list) else b"("
        for item in value:
            _emit(item, out, tensors)
        out += b"e" if isinstance(value, list) else b"t"
    else:
        out += _plain_opcode(value)


def _plain_opcode(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + struct.pack("<B", len(data)) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    raise TypeError(f"a torch file of weights cannot hold a {type(value).__name__}")


def _emit_tensor(tensor: LazyTensor, out: bytearray, tensors: list[LazyTensor]) -> None:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if tensor.dtype not in names:
        raise UserError(
            f"a torch file cannot hold a tensor of {tensor.dtype}; cast it to {', '.join(map(str, names))}"
        )
    strides = [math.prod(max(n, 1) for n in tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
    out += _plain_opcode("storage") + f"ctorch\n{names[tensor.dtype]}\n".encode()
    for value in (str(len(tensors)), "cpu", math.prod(tensor.shape)):
        out += _plain_opcode(value)
    out += b"tQ" + _plain_opcode(0)
    _emit(tuple(tensor.shape), out, tensors)
    _emit(tuple(strides), out, tensors)
    out += _plain_opcode(False) + b"ccollections\nOrderedDict\n)RtR"
    tensors.append(tensor)
