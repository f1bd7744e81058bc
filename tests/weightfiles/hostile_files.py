"""Hostile and damaged weight files, each with words of the one-line error that it must end in."""

import collections
import datetime
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

DATA = np.arange(6, dtype=np.float32).tobytes()
SCRIPT = "touch {canary}"
READ = "read"  # instead of a refusal: what is hostile lies next to the tensors, is not executed and takes no time


class Executes:
    """Pickles to a call of `function` with `args`."""

    def __init__(self, function: Callable, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def value(item) -> bytes:
    """The opcodes that leave `item` on the stack."""
    return pickle.dumps(item, 2)[2:-1]


def tensor(key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1), kind="FloatStorage") -> bytes:
    """The opcodes of a tensor, as torch.save writes them."""
    storage = b"(" + value("storage") + f"ctorch\n{kind}\n".encode() + value(key) + value("cpu") + value(count) + b"tQ"
    place = value(offset) + value(shape) + value(strides) + value(False) + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"tR"


def entries(*pairs: tuple[str, bytes]) -> bytes:
    """The opcodes of a dict, from the opcodes of its values."""
    return b"}" + b"".join(value(name) + item + b"s" for name, item in pairs)


def zipped(pairs: Iterable[tuple[str, bytes]], compressed: Collection[str] = ()) -> bytes:
    """A zip file of these entries, stored but for the `compressed` ones."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, data in pairs:
            method = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def torch_file(program: bytes, *more: tuple[str, bytes], protocol: int = 2) -> bytes:
    """A torch file of one storage, "0", whose pickle is these opcodes."""
    data = bytes([0x80, protocol]) + program + b"."
    return zipped([("a/data.pkl", data), ("a/data/0", DATA), *more])


def with_args(program: bytes, protocol: int = 2) -> bytes:
    """A torch file of a good model whose `args` are these opcodes."""
    first = b"}X\x04\0\0\0args" + program + b"s"  # the program counts what it memorises from 0
    return torch_file(first + value("model") + entries(("w", tensor())) + b"s", protocol=protocol)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the last occurrence of `old` replaced."""
    at = data.rindex(old)
    return data[:at] + new + data[at + len(old) :]


def safetensors(header, data: bytes = DATA) -> bytes:
    """A safetensors file of this header (JSON, or its text)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def place(start=0, stop=24, shape=(2, 3), dtype="F32") -> dict:
    """A header entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


# What training codes keep next to their tensors: no hostile objects, but none that the reader knows.
OBJECTS = [
    datetime.timedelta(1),
    collections.Counter("aab"),
    collections.defaultdict(list, a=[1]),
    Path("x"),
    {1.5: 2, None: 3, (1, 2): 4},
    {1, 2},
    frozenset({1}),
    b"bytes" * 100,
    np.float64(1.5),
    np.dtype("f4"),
    np.random.default_rng(0),
    complex(1, 2),
    zipfile.ZIP_STORED,
    Executes(os.getcwd),
]
GOOD = torch_file(entries(("w", tensor())))


def laughs(levels: int) -> bytes:
    """Opcodes of a list of ten references to a list of ten references, and so on."""
    program = b"(]q\x00"
    for i in range(levels):
        program += b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1)
    return program + b"t"


def executing(canary: str) -> dict[str, tuple[bytes, str]]:
    """Torch files that would run something if they were unpickled."""
    command = SCRIPT.format(canary=canary)
    system = value(Executes(os.system, command))
    new = pickle.dumps(Executes(os.system, command), 4)
    return {
        "os_system.pt": (torch_file(system), "holds 'posix.system', not a dict"),
        "os_system_in_args.pt": (with_args(system), READ),
        "os_system_in_tensor_key.pt": (torch_file(entries(("w", system))), "no tensors: 'w' is 'posix.system'"),
        "os_system_protocol_4.pt": (torch_file(new[2:-1], protocol=4), "holds 'posix.system', not a dict"),
        "os_system_without_zip.pt": (new, "holds 'posix.system', not a dict"),
        "os_system_protocol_0.pt": (pickle.dumps(Executes(os.system, command), 0), "neither a torch nor"),
        "os_system_inst.pt": (torch_file(b"(" + value(command) + b"ios\nsystem\n"), "opcode INST"),
        "eval.pt": (torch_file(value(Executes(eval, f"open({canary!r}, 'w')"))), "holds '[^ ]*eval', not"),
        "popen.pt": (torch_file(b"csubprocess\nPopen\n" + value((command,)) + b"\x81"), "subprocess.Popen"),
        "torch_attribute.pt": (torch_file(b"ctorch\nload\n" + value((canary,)) + b"R"), "torch.load', not a dict"),
        "extension.pt": (torch_file(b"\x82\x01)R"), "opcode EXT1"),
        "numpy_scalar.pt": (with_args(value(np.float64(1.5))), READ),
        "whole_model.pt": (torch_file(b"cmodels\nSiT\n)\x81"), "models.SiT"),
    }


def zips() -> dict[str, tuple[bytes, str]]:
    """Torch files whose zip is hostile or broken."""
    bomb = bytes(20 << 20)
    good = [("a/data.pkl", b"\x80\x02" + entries(("w", tensor())) + b"."), ("a/data/0", DATA)]
    overlap = bytearray(zipped([*good, ("b", b"x" * 100), ("c", b"y" * 100)]))
    at = overlap.rindex(b"PK\x01\x02")
    overlap[at + 42 : at + 46] = struct.pack("<I", GOOD.index(b"PK\x03\x04", 4))
    encrypted = bytearray(GOOD)
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    many = zipped([*good, *((f"a/{i:060d}", b"") for i in range(45_000))])
    return {
        "traversal.pt": (zipped([*good, ("../evil", b"x")]), "unsafe name '../evil'"),
        "traversal_inside.pt": (zipped([*good, ("a/../../evil", b"x")]), "unsafe name"),
        "absolute.pt": (zipped([*good, ("/tmp/evil", b"x")]), "unsafe name"),
        "backslash.pt": (patched(zipped([*good, ("a/x/e", b"x")]), b"a/x/e", b"a\\x\\e"), "unsafe name"),
        "bomb.pt": (zipped([good[0], ("a/data/0", bomb)], {"a/data/0"}), "compressed"),
        "bomb_pickle.pt": (zipped([("a/data.pkl", bomb)], {"a/data.pkl"}), "compressed"),
        "large_pickle.pt": (zipped([("a/data.pkl", bomb)]), "pickle of 20971520 bytes"),
        "entry_twice.pt": (zipped([*good, good[1]]), "'a/data/0' twice"),
        "entries_overlap.pt": (bytes(overlap), "running into the next"),
        "encrypted.pt": (bytes(encrypted), "encrypted"),
        "entry_renamed.pt": (GOOD.replace(b"a/data/0", b"a/data/1", 1), "contradicts the zip directory"),
        "directory_far_away.pt": (
            GOOD[:-6] + b"\xf0\xff\xff\x7f\0\0",
            "damaged zip directory|cut short or damaged|contradicts",
        ),
        "directory_large.pt": (many, "damaged zip directory"),
        "directory_count.pt": (GOOD[:-12] + b"\x09\0" + GOOD[-10:], "declares 9"),
        "zip64_nowhere.pt": (GOOD[:-22] + b"PK\x06\x07" + b"\xff" * 16 + GOOD[-22:], "damaged zip directory"),
        "no_pickle.pt": (zipped([("a/data/0", DATA)]), "0 data.pkl"),
        "two_pickles.pt": (zipped([*good, ("b/data.pkl", good[0][1])]), "2 data.pkl"),
        "big_endian.pt": (zipped([*good, ("a/byteorder", b"big")]), "big-endian"),
        "damaged_data.pt": (GOOD.replace(DATA, DATA[::-1]), "fails its CRC-32"),
        "cut.pt": (GOOD[:-30], "cut short"),
        "bytes_added.pt": (GOOD + b"\0" * 30, "bytes added"),
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"<html>404</html>", "neither a torch nor"),
        "tar.pt": (tarred(), "neither a torch nor"),
    }


def tarred() -> bytes:
    """A tar file that would write outside its folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../evil.txt"))
    return out.getvalue()


def pickles() -> dict[str, tuple[bytes, str]]:
    """Torch files whose pickle is too large or describes tensors that are not there."""
    nested = b"]" * 200_000 + b"a" * 199_999
    itself = b"}q\x99" + value("self") + b"h\x99s"
    namespace = b"cargparse\nNamespace\n)\x81q\x99}" + value("self") + b"h\x99sb"
    chain = b"ctorch._tensor\n_rebuild_from_type_v2\n" * 2 + b"NNN\x87tR"
    collisions = b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"Ns" for k in range(1, 9))
    whole = {
        "opcodes.pt": (b"]" * 600_000, "over 500000 opcodes"),
        "dicts.pt": (b"}q\x00" * 200_000, "holds no tensors"),
        "memo.pt": (b"}r\xff\xff\xff\x7f", "holds no tensors"),
        "memo_missing.pt": (b"h\x07", "pickle that is damaged"),
        "string_terabyte.pt": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"x", "pickle that is damaged"),
        "bytes_terabyte.pt": (b"\x8e" + struct.pack("<Q", 1 << 40) + b"x", "pickle that is damaged"),
        "string_gigabytes.pt": (b"X" + struct.pack("<I", (1 << 32) - 1) + b"x", "pickle that is damaged"),
        "long_integer.pt": (b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20), "opcode LONG4"),
        "warns.pt": (b"S'\\d'\n", "pickle that is damaged|opcode STRING"),  # as an error, or as a warning
        "no_stack.pt": (b"00", "pickle that is damaged"),
        "underflow.pt": (b"tR", "pickle that is damaged"),
        "call_chain.pt": (chain, "pickle that is damaged"),
        "call_number.pt": (value(1) + b")R", "pickle that is damaged"),
        "parameter_of_text.pt": (
            b"ctorch._utils\n_rebuild_parameter\n" + value(("x", True, None)) + b"R",
            "holds 'x', not a dict",
        ),
        "list.pt": (b"]" + tensor() + b"a", "a list, not a dict"),
        "tensor.pt": (tensor(), "not a dict"),
        "number.pt": (value(3), "not a dict"),
        "nothing.pt": (b"}", "holds no tensors"),
        "number_as_key.pt": (b"}" + value(5) + tensor() + b"s", "tensor named 5"),
        "colliding_keys.pt": (b"}" + collisions, "holds no tensors"),
        "tuple_as_key.pt": (b"}" + value((1, 2)) + b"Ns", "holds no tensors"),
        "key_twice.pt": (entries(("w", tensor()), ("w", tensor())), "'w' twice"),
        "prefix_twice.pt": (entries(("w", tensor()), ("module.w", tensor())), "with and without"),
        "key_with_newline.pt": (entries(("a\nb", tensor())), "named 'a.nb'"),
        "key_surrogate.pt": (entries(("\ud800", tensor())), "named"),
        "not_a_tensor.pt": (entries(("w", tensor()), ("step", value(7))), READ),
        "unknown_next_to_tensors.pt": (
            entries(("w", tensor()), ("v", value(Executes(os.getcwd)))),
            "has 'posix.getcwd' instead of a tensor as 'v'",
        ),
        "model_is_flat.pt": (entries(("model", entries(("w", value("x"))))), "holds no tensors"),
    }
    whole |= {name: (entries(("w", program)), message) for name, (program, message) in views().items()}
    found = {name: (torch_file(program), message) for name, (program, message) in whole.items()}
    settings = {"nested": nested, "itself": itself, "namespace_itself": namespace, "laughs": laughs(30)}
    for protocol in (2, 4, 5):
        settings[f"objects_{protocol}"] = pickle.dumps(OBJECTS, protocol)[
            2 if protocol < 4 else 11 : -1
        ]  # without its frame
    found |= {f"args_{name}.pt": (with_args(p, protocol=5), READ) for name, p in settings.items()}
    return found


def views() -> dict[str, tuple[bytes, str]]:
    """Opcodes of tensors that do not fit their storage."""
    return {
        "storage_short.pt": (tensor(count=7), "declares 7 float32 elements"),
        "storage_terabyte.pt": (tensor(count=1 << 40, shape=(1 << 40,), strides=(1,)), "declares"),
        "storage_missing.pt": (tensor(key="1"), "no entry 'a/data/1'"),
        "storage_traversal.pt": (tensor(key="../../../etc/passwd"), "no entry"),
        "storage_complex.pt": (tensor(kind="ComplexFloatStorage"), "no tensors: 'w' is 'torch.ComplexFloatStorage'"),
        "view_past_end.pt": (tensor(shape=(3, 3)), "past the end of its storage"),
        "offset_past_end.pt": (tensor(offset=1), "past the end of its storage"),
        "offset_negative.pt": (tensor(offset=-1), "pickle that is damaged"),
        "stride_negative.pt": (tensor(offset=5, strides=(-3, -1)), "not a list of counts"),
        "shape_negative.pt": (tensor(shape=(-2, 3)), "not a list of counts"),
        "shape_text.pt": (tensor(shape="23"), "not a list of counts"),
        "shape_long.pt": (tensor(shape=(1,) * 100_000, strides=(1,) * 100_000), "not a list of counts"),
        "strides_missing.pt": (tensor(strides=(1,)), "pickle that is damaged"),
        "expanded.pt": (tensor(shape=(10**6, 10**6), strides=(0, 0)), "expanded from a storage of 24 bytes"),
        "zero_of_many.pt": (tensor(shape=(0, 1 << 40, 1 << 40), strides=(1, 1, 1)), "too large"),
    }


def headers() -> dict[str, tuple[bytes, str]]:
    """Safetensors files whose header is hostile or broken."""
    good = {"w": place()}
    text = json.dumps(good).encode()
    megabytes = b'{"a":[' + b"[]," * 690_000 + b"[]]}"
    shapes = {"shape_wrong": (2, 4), "shape_negative": (-2, -3), "shape_huge": (1 << 40, 1 << 40)}
    shapes |= {"shape_bool": (True, 6), "shape_zero_huge": (0, 1 << 47, 1 << 47), "shape_long": (1,) * 999}
    header = {
        "not_json": (b"{'w': 1}", "not JSON"),
        "not_utf8": (b'{"\xff": 1}', "not JSON"),
        "no_header": (b"", "not JSON"),
        "nested": (b"[" * 2_000_000, "not JSON"),
        "digits": (b'{"w": ' + b"9" * 1_000_000 + b"}", "not JSON"),
        "lists": (megabytes, "invalid type: sequence"),
        "dicts": (b"[" + b"{}," * 690_000 + b"{}]", "invalid type: sequence"),
        "not_a_dict": ([1], "invalid type: sequence"),
        "name_twice": (text[:-1] + b"," + text[1:], "'w' occurs twice"),
        "field_twice": (text.replace(b'"dtype"', b'"shape": [6], "dtype"'), "'shape' occurs twice"),
        "not_an_entry": ({"w": 5}, "invalid type: integer"),
        "metadata": ({**good, "__metadata__": {"a": 1}}, "expected a string"),
        "dtype": ({"w": place(0, 24, (3,), "C64")}, "of dtype 'C64'"),
        "dtype_list": ({"w": {**place(), "dtype": [1]}}, "invalid type: sequence"),
        "offsets_past_end": ({"w": place(0, 48, (3, 4))}, "file not fully covered"),
        "offsets_reversed": ({"w": place(24, 0)}, "invalid offset"),
        "offsets_negative": ({"w": place(-24, 0)}, "invalid value: integer"),
        "offsets_float": ({"w": place(0.0, 24.0)}, "invalid type: floating point"),
        "offsets_one": ({"w": {**place(), "data_offsets": [24]}}, "invalid length"),
        "overlap": ({"w": place(0, 24), "v": place(0, 24)}, "invalid offset"),
        "hole": ({"w": place(4, 24, (5,))}, "invalid offset"),
        "bytes_left": ({"w": place(0, 20, (5,))}, "file not fully covered"),
        "name_newline": ({"a\nb": place()}, "named 'a.nb'"),
        "name_surrogate": ({"\ud800": place()}, "invalid JSON"),
    }
    header |= {
        name: ({"w": place(shape=shape)}, "invalid shape|invalid value|invalid type|overflow")
        for name, shape in shapes.items()
    }
    found = {f"{name}.safetensors": (safetensors(h), message) for name, (h, message) in header.items()}
    terabyte = struct.pack("<Q", 1 << 40)
    return found | {
        "terabyte.safetensors": (terabyte + text + DATA, "declares a header of 1099511627776 bytes"),
        "header_past_end.safetensors": (struct.pack("<Q", 999) + text + DATA, "cut short"),
        "cut.safetensors": (safetensors(good)[:-1], "cut short"),
        "five_bytes.safetensors": (b"\x01\0\0\0\0", "cut short"),
        "empty.safetensors": (b"", "cut short"),
    }


def build(folder: Path, canary: Path) -> dict[str, str]:
    """Write the corpus into `folder`; return the regular expression that each error must match, by file name."""
    messages = {}
    for name, (data, message) in {**executing(str(canary)), **zips(), **pickles(), **headers()}.items():
        (folder / name).write_bytes(data)
        messages[name] = message
    return messages


# Prints {file name: [what opening it raised, CPU seconds]}. CPU seconds, because what else a busy machine runs
# in between is no cost of the file: the same one has taken 1.3 s by the clock that takes 0.01 s of work.
MEASURE = """
import json, resource, sys, time
from pathlib import Path
from ig_jax.weightfiles.files import open_weights
from ig_jax.weightfiles.sets import choose

def outcome(path):
    began = time.process_time()
    try:
        with open_weights(path) as weights:
            for tensor in choose(weights, "model").tensors.values():
                tensor.read()
        text = "read"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, time.process_time() - began

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
print(json.dumps({path.name: outcome(path) for path in sorted(Path(sys.argv[1]).iterdir())}))
"""
