"""Weight files: those of torch.save, round trips of those written here, refusal of hostile ones."""

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.weightfiles.files import LazyTensor, open_weights, write_safetensors, write_torch
from ig_jax.weightfiles.sets import choose

sys.path.insert(0, str(Path(__file__).parent))
import hostile_files as hostile

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "weights_expected.json").read_text())


def assert_described(state: dict[str, LazyTensor], described: dict) -> None:
    assert list(state) == list(described)
    for name, want in described.items():
        array = state[name].read()
        assert str(array.dtype) == str(state[name].dtype) == want["dtype"], name
        assert list(array.shape) == list(state[name].shape) == want["shape"], name
        assert array.flags.c_contiguous and array.astype(np.float64).tolist() == (
            np.array(want["values"], np.float64).reshape(want["shape"]).tolist()
        ), name


@pytest.mark.parametrize(
    "name, which, described",
    [
        ("weights_sit.pt", "ema", "average"),
        ("weights_sit.pt", "model", "raw"),
        ("weights_lightningdit.pt", "ema", "average"),
        ("weights_lightningdit.pt", "model", "raw"),
        ("weights_bare.pt", "ema", "raw"),
        ("weights_bare.pt", "model", "raw"),
    ],
)
def test_reads_what_torch_save_wrote(name, which, described):
    with open_weights(GOLDEN / name) as weights:
        assert_described(choose(weights, which).tensors, EXPECTED[described])


def test_metadata_comes_with_the_tensors():
    with open_weights(GOLDEN / "weights_sit.pt") as weights:
        metadata = json.loads(json.dumps(weights.metadata))  # tuples as lists
        assert metadata == {"args": EXPECTED["args"], "epoch": 3, "steps": 1000}
    with open_weights(GOLDEN / "weights_lightningdit.pt") as weights:
        assert weights.metadata == {"config": EXPECTED["config"]}
    with open_weights(GOLDEN / "weights_bare.pt") as weights:
        assert weights.metadata == {}


def test_the_form_before_torch_1_6_is_refused_with_the_fix():
    path = GOLDEN / "weights_old.pt"
    with refused(str(path), says="before torch 1.6", fix="another file"), open_weights(path):
        pass


@pytest.fixture
def state() -> dict[str, LazyTensor]:
    """A small state dict, bfloat16 and empty tensors included."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(3, 4)).astype(np.float32),
        "flag": np.array([True, False, True]),
        "brain": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(-(2**40)),
        "empty": np.zeros((0, 3), np.float16),
        "nan": np.array([np.nan, -0.0, np.inf]),
        "strided": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    return {name: LazyTensor.of(array) for name, array in arrays.items()}


def bytes_by_name(state: dict[str, LazyTensor]) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in state.items()}


def test_a_missing_average_is_never_replaced_by_raw_weights(tmp_path, state):
    write_torch(tmp_path / "raw.pt", {"model": state, "epoch": 1})
    with open_weights(tmp_path / "raw.pt") as weights:
        assert choose(weights, "model").tensors.keys() == state.keys()
        with refused(str(tmp_path / "raw.pt"), says='holds no "ema" weights, only "model"', fix="--which=model"):
            choose(weights, "ema")
        with refused(str(tmp_path / "raw.pt"), says='holds no "raw" weights'):
            choose(weights, "raw")


def test_torch_files_round_trip_byte_for_byte(tmp_path, state):
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    write_torch(first, {"model": state, "ema": state, "config": {"lr": 1e-4, "depth": [8], "name": None}})
    with open_weights(first) as weights:
        assert weights.metadata == {"config": {"lr": 1e-4, "depth": [8], "name": None}}
        assert bytes_by_name(choose(weights, "ema").tensors) == bytes_by_name(state)
        copy = {"model": choose(weights, "model").tensors, "ema": choose(weights, "ema").tensors, **weights.metadata}
        write_torch(second, copy)
    assert first.read_bytes() == second.read_bytes()
    assert zipfile.ZipFile(first).testzip() is None


def test_torch_storages_are_aligned(tmp_path, state):
    write_torch(tmp_path / "a.pt", state)
    with open_weights(tmp_path / "a.pt") as weights:
        starts = [t.read.args[0].entry.start for t in choose(weights, "model").tensors.values()]
    assert [start % 64 for start in starts] == [0] * len(state)


def test_safetensors_round_trip_and_agree_with_the_safetensors_package(tmp_path, state):
    own, theirs = tmp_path / "own.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(own, state)
    loaded = safetensors.numpy.load_file(own)
    assert bytes_by_name({n: LazyTensor.of(a) for n, a in loaded.items()}) == bytes_by_name(state)
    arrays = {name: np.ascontiguousarray(t.read()).reshape(t.shape) for name, t in state.items()}
    safetensors.numpy.save_file(arrays, theirs, metadata={"source": "them"})
    for path, metadata in ((own, {"format": "pt"}), (theirs, {"source": "them"})):
        with open_weights(path) as weights:
            assert weights.metadata == metadata
            assert bytes_by_name(choose(weights, "ema").tensors) == bytes_by_name(state)


def test_settings_in_a_safetensors_file_are_json_where_they_are(tmp_path, state):
    text = {"args": '{"num_heads": 4}', "config": "[" * 100_000, "steps": "70", "note": "[1]"}
    write_safetensors(tmp_path / "a.safetensors", state, text)
    with open_weights(tmp_path / "a.safetensors") as weights:
        assert weights.metadata == {"format": "pt", **text, "args": {"num_heads": 4}, "steps": 70}


def test_zip64_places_are_read(tmp_path):
    program, body, directory = zipfile.ZipFile(io.BytesIO(hostile.GOOD)).read("a/data.pkl"), b"", b""
    for name, item in ((b"a/data.pkl", program), (b"a/data/0", hostile.DATA)):
        extra = struct.pack("<HHQQQ", 1, 24, len(item), len(item), len(body))
        fixed = struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, zlib.crc32(item), *[2**32 - 1] * 2,
                            len(name), len(extra), 0, 0, 0, 0, 2**32 - 1)  # fmt: skip
        directory += fixed + name + extra
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name + item
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), len(body))
    end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body + directory), 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", *[2**16 - 1] * 4, *[2**32 - 1] * 2, 0)
    (tmp_path / "large.pt").write_bytes(body + directory + end)
    with open_weights(tmp_path / "large.pt") as weights:
        assert choose(weights, "model").tensors["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_a_file_appears_whole_or_not_at_all(tmp_path, state, write):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the old file")

    def broken() -> np.ndarray:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write(path, state | {"last": LazyTensor((2,), np.dtype(np.int8), broken)})
    with pytest.raises(ValueError, match="read as float32"):
        write(path, {"w": LazyTensor((3,), np.dtype(np.float32), lambda: np.zeros(4, np.float32))})
    with refused("storage 0" if write is write_torch else "tensor w", "complex64", fix="cast it to"):
        write(path, {"w": LazyTensor.of(np.zeros(2, np.complex64))})
    with refused("path", str(path / "below a file.pt"), says="cannot write"):
        write(path / "below a file.pt", state)
    assert os.listdir(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"the old file"


@pytest.mark.parametrize("write, name", [(write_torch, "a.pt"), (write_safetensors, "a.safetensors")])
def test_memory_holds_a_tensor_or_two_at_a_time(tmp_path, write, name):
    megabytes, count = 2, 24
    big = LazyTensor((megabytes << 18,), np.dtype(np.float32), lambda: np.ones(megabytes << 18, np.float32))
    tracemalloc.start()
    write(tmp_path / name, {f"w{i}": big for i in range(count)})
    with open_weights(tmp_path / name) as weights:
        write(tmp_path / f"copy.{name}", choose(weights, "model").tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"copy.{name}").stat().st_size > count * megabytes << 20
    assert peak < 3 * megabytes << 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[dict[str, str], dict[str, tuple[str, float]], Path, Path]:
    """The hostile files opened in a process that may use 200 MB more than it has after its imports."""
    root = tmp_path_factory.mktemp("hostile")
    folder, canary = root / "files", root / "canary"
    folder.mkdir()
    messages = hostile.build(folder, canary)
    command = [sys.executable, "-W", "error", "-c", hostile.MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return messages, json.loads(done.stdout), folder, canary


def test_every_hostile_file_gives_one_line_within_a_second_of_work(corpus):
    messages, outcomes, _, _ = corpus
    assert len(messages) > 100 and outcomes.keys() == messages.keys()
    wrong = []
    for name, message in messages.items():
        text, seconds = outcomes[name]
        refusal = rf"UserError: [^\n]*{re.escape(name)}: [^\n]*({message})[^\n]*; [^\n]+"
        one_line = re.fullmatch(hostile.READ if message == hostile.READ else refusal, text)
        if not one_line or len(text) > 600 or seconds > 1:
            wrong.append((name, message, text[:600], seconds))
    assert not wrong


def test_hostile_files_execute_and_write_nothing(corpus):
    messages, _, folder, canary = corpus
    assert not canary.exists()
    assert {path.name for path in folder.iterdir()} == messages.keys()
    assert {path.name for path in folder.parent.iterdir()} == {"files"}


def test_the_canary_would_have_been_written(tmp_path):
    data = hostile.value(hostile.Executes(os.system, hostile.SCRIPT.format(canary=tmp_path / "canary")))
    pickle.loads(b"\x80\x02" + data + b".")
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("path", ["missing.pt", "missing", "missing.safetensors"])
def test_what_is_not_a_file_is_refused(tmp_path, path):
    with refused(str(tmp_path / path), says="is not a file", fix="check the path"), open_weights(tmp_path / path):
        pass


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with refused(str(tmp_path / "pipe.pt"), says="is not a file"), open_weights(tmp_path / "pipe.pt"):
        pass


def read_all(path: Path) -> dict[str, tuple] | None:
    """Return every tensor's bytes, or None if the file was refused; anything else is an error."""
    try:
        with open_weights(path) as weights:
            return bytes_by_name(choose(weights, "model").tensors)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and "; " in str(error)
        return None


def without_crc(data: bytes) -> bytes:
    """A torch file as torch writes it with set_crc32_options(False), so that damage reaches the pickle."""
    out = bytearray(data)
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        out[at + 16 : at + 20] = bytes(4)
        at = data.find(b"PK\x01\x02", at + 4)
    return bytes(out)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_random_truncations_are_refused(tmp_path, state, name):
    path = tmp_path / name
    write_torch(path, {"model": state}) if name == "a.pt" else write_safetensors(path, state)
    data = path.read_bytes()
    rng = random.Random(0)
    for size in {0, 1, 7, 8, 21, 22, len(data) - 1, *(rng.randrange(len(data)) for _ in range(150))}:
        path.write_bytes(data[:size])
        assert read_all(path) is None, size


def test_flipped_bytes_of_a_torch_file_are_refused_or_harmless(tmp_path):
    data = (GOLDEN / "weights_sit.pt").read_bytes()
    path = tmp_path / "weights_sit.pt"
    path.write_bytes(data)
    intact, rng = read_all(path), random.Random(1)
    for _ in range(250):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        assert read_all(path) in (None, intact), at


def test_flipped_bytes_of_an_unchecked_pickle_never_escape(tmp_path):
    data = without_crc((GOLDEN / "weights_sit.pt").read_bytes())
    path = tmp_path / "unchecked.pt"
    path.write_bytes(data)
    assert read_all(path)
    start = data.index(b"\x80\x02}")
    rng, refused = random.Random(2), 0
    for _ in range(500):
        at = rng.randrange(start, data.index(b"PK\x03\x04", start))
        path.write_bytes(data[:at] + rng.randbytes(1) + data[at + 1 :])
        refused += read_all(path) is None
    assert refused > 100


def test_flipped_bytes_of_a_safetensors_header_never_escape(tmp_path, state):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state)
    data = path.read_bytes()
    rng = random.Random(3)
    for _ in range(500):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + rng.randbytes(1) + data[at + 1 :])
        read_all(path)
