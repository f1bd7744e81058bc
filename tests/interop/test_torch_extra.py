"""Both directions against torch itself, which is an optional extra: all else is tested without it."""

import argparse
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ig_jax.interop.weight_files import (
    LazyTensor,
    open_weights,
    write_safetensors,
    write_torch,
)

torch = pytest.importorskip(
    "torch", reason="torch is not installed; pip install torch==2.13.0 for these tests"
)

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


def assert_same(ours: LazyTensor, theirs) -> None:
    array = ours.read()
    assert str(array.dtype) == str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    assert array.shape == ours.shape == tuple(theirs.shape)
    assert array.tobytes() == theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, np.ndarray]:
    """Arrays of each dtype a torch file can hold, 0-d, empty and not contiguous ones included."""
    rng = np.random.default_rng(0)
    names = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
    arrays = {name: rng.normal(0, 9, (3, 1, 4)).astype(dtype) for name, dtype in names.items()}
    arrays |= {"scalar": np.array(3.5), "empty": np.zeros((2, 0, 3), np.int8)}
    return arrays | {"strided": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)}


@pytest.mark.parametrize(
    "name, which", [("sit", "ema"), ("sit", "model"), ("lightningdit", "model"), ("bare", "ema")]
)
def test_the_golden_files_read_as_torch_reads_them(name, which):
    path = GOLDEN / f"weights_{name}.pt"
    theirs = torch.load(path, weights_only=False)
    theirs = theirs if name == "bare" else theirs[which]
    with open_weights(path) as weights:
        ours = weights.state_dict(which)
        assert list(ours) == [key.removeprefix("module.") for key in theirs]
        for tensor, key in zip(ours.values(), theirs, strict=True):
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
        assert weights.metadata == {"args": {"dtype": "torch.bfloat16", "device": "cpu", "size": [1, 2]}}
        ours = weights.state_dict("ema")
        assert list(ours) == list(state)
        for name, tensor in ours.items():
            assert_same(tensor, state[name])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path, mmap):
    arrays = every_dtype()
    state = {name: LazyTensor.of(array) for name, array in arrays.items()}
    tree = {
        "model": state,
        "ema": state,
        "epoch": 7,
        "config": {"lr": 1e-4, "seed": 2**40, "names": ["a", None]},
    }
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
        write_torch(tmp_path / "b.pt", weights.state_dict("ema"))
    target.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_safetensors_agree_with_torch(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = every_dtype()
    write_safetensors(
        tmp_path / "a.safetensors", {name: LazyTensor.of(array) for name, array in arrays.items()}
    )
    loaded = safetensors_torch.load_file(tmp_path / "a.safetensors")
    safetensors_torch.save_file(loaded, tmp_path / "b.safetensors")
    with open_weights(tmp_path / "b.safetensors") as weights:
        ours = weights.state_dict("model")
        assert ours.keys() == loaded.keys() == arrays.keys()
        for name, tensor in ours.items():
            assert_same(tensor, loaded[name])
