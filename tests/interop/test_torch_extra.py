"""Reading and writing against torch itself, an optional extra; all other tests run without it."""

import argparse
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ig_jax.weightfiles.files import LazyTensor, open_weights, write_safetensors, write_torch
from ig_jax.weightfiles.sets import choose
from ig_jax.weightfiles.tensor_storage import shown

torch = pytest.importorskip("torch", reason="torch is not installed; pip install torch==2.13.0 for these tests")

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def assert_same(own: LazyTensor, theirs) -> None:
    array = own.read()
    assert str(array.dtype) == str(own.dtype) == str(theirs.dtype).removeprefix("torch.")
    assert array.shape == own.shape == tuple(theirs.shape)
    assert array.tobytes() == theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, np.ndarray]:
    """Arrays of each dtype a torch file can hold, 0-d, empty and not contiguous ones included."""
    rng = np.random.default_rng(0)
    names = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
    arrays = {name: rng.normal(0, 9, (3, 1, 4)).astype(dtype) for name, dtype in names.items()}
    arrays |= {"scalar": np.array(3.5), "empty": np.zeros((2, 0, 3), np.int8)}
    return arrays | {"strided": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)}


@pytest.mark.parametrize("name, which", [("sit", "ema"), ("sit", "model"), ("lightningdit", "model"), ("bare", "ema")])
def test_the_golden_files_read_as_torch_reads_them(name, which):
    path = GOLDEN / f"weights_{name}.pt"
    theirs = torch.load(path, weights_only=False)
    theirs = theirs if name == "bare" else theirs[which]
    with open_weights(path) as weights:
        own = choose(weights, which).tensors
        assert list(own) == [key.removeprefix("module.") for key in theirs]
        for tensor, key in zip(own.values(), theirs, strict=True):
            assert_same(tensor, theirs[key])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("checked", [True, False])
def test_every_way_torch_saves_is_read(tmp_path, protocol, checked):
    base = torch.arange(60.0).view(3, 4, 5)
    linear = torch.nn.Linear(3, 2)
    linear.weight.note = "kept"  # saved through _rebuild_parameter_with_state
    state = OrderedDict(
        view=base[1:, ::2, 1:4], permuted=base.permute(2, 0, 1), weight=linear.weight, bias=linear.bias,
        one=torch.ones(5, 1, 3).transpose(0, 1), strange=torch.as_strided(base, (2, 2), (7, 1), 3),
        brain=base.bfloat16().transpose(0, 2), wide=torch.ones(3, dtype=torch.uint64),
    )  # fmt: skip
    args = argparse.Namespace(dtype=torch.bfloat16, device=torch.device("cpu"), size=torch.Size([1, 2]))
    torch.serialization.set_crc32_options(checked)
    torch.save({"ema": state, "args": args}, tmp_path / "a.pt", pickle_protocol=protocol)
    torch.serialization.set_crc32_options(True)
    with open_weights(tmp_path / "a.pt") as weights:
        stored = weights.metadata["args"]
        assert (stored["size"], *map(shown, stored.values())) == (
            (1, 2),
            "'torch.bfloat16'",
            "'torch.device'",
            "a tuple",
        )
        own = choose(weights, "ema").tensors
        assert list(own) == list(state)
        for name, tensor in own.items():
            assert_same(tensor, state[name])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path, mmap):
    arrays = every_dtype()
    state = {name: LazyTensor.of(array) for name, array in arrays.items()}
    tree = {"model": state, "ema": state, "epoch": 7, "config": {"lr": 1e-4, "seed": 2**40, "names": ["a", None]}}
    write_torch(tmp_path / "a.pt", tree)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert (loaded["epoch"], loaded["config"]) == (tree["epoch"], tree["config"])
    for which in ("model", "ema"):
        assert list(loaded[which]) == list(arrays)
        for name, tensor in loaded[which].items():
            assert_same(LazyTensor.of(np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)), tensor)
            assert tensor.stride() == torch.empty(arrays[name].shape).stride()
            assert not mmap or tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_a_module_takes_our_state_dict(tmp_path):
    source, target = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with open_weights(tmp_path / "a.pt") as weights:
        write_torch(tmp_path / "b.pt", choose(weights, "ema").tensors)
    target.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_safetensors_agree_with_torch(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = every_dtype()
    write_safetensors(tmp_path / "a.safetensors", {name: LazyTensor.of(array) for name, array in arrays.items()})
    loaded = safetensors_torch.load_file(tmp_path / "a.safetensors")
    safetensors_torch.save_file(loaded, tmp_path / "b.safetensors")
    with open_weights(tmp_path / "b.safetensors") as weights:
        own = choose(weights, "model").tensors
        assert own.keys() == loaded.keys() == arrays.keys()
        for name, tensor in own.items():
            assert_same(tensor, loaded[name])


class Holder(torch.nn.Module):
    """A module that a TorchScript archive can hold."""

    def forward(self, x: int):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tensors_of_a_torchscript_archive_are_read_and_its_code_is_not(tmp_path):
    root, inner = Holder(), Holder()
    inner.register_buffer("weight", torch.arange(6.0).reshape(2, 3))
    root.add_module("layers", inner)
    torch.jit.script(root).save(tmp_path / "a.pt")
    with open_weights(tmp_path / "a.pt") as weights:
        assert_same(weights.joined()["layers.weight"], inner.weight)
