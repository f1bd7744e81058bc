"""Four published files of one network give the same parameters, and nothing else is taken for one."""

import inception_files as files
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax import convert
from ig_jax.base import cli
from ig_jax.checkpoints import inception
from ig_jax.weightfiles.files import LazyTensor, open_weights, write_torch

NAMES = {"pytorch": "a.pth", "graph": "a.pb", "nvidia": "a.pt", "jax_fid": "a.pickle"}


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr("sys.argv", ["convert", *flags])
    cli.run(convert.main, toy.fresh(convert.FLAGS), convert.__doc__)


@pytest.mark.parametrize("naming", NAMES)
def test_every_file_gives_the_same_parameters(naming, tmp_path, monkeypatch):
    file, wanted = files.write(tmp_path / NAMES[naming], naming, files.without_gamma()), files.without_gamma()
    run(monkeypatch, f"--from={file}", f"--out={tmp_path / 'out'}")
    found, digest = inception.load(tmp_path / "out")
    assert found.keys() == wanted.keys() and digest == inception.digest(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_gamma_is_read_where_a_file_has_one(tmp_path, monkeypatch):
    file = files.write(tmp_path / "a.pth", "pytorch", files.params())
    run(monkeypatch, f"--from={file}", f"--out={tmp_path / 'out'}")
    assert inception.load(tmp_path / "out")[1] == inception.digest(files.params())
    weights = tmp_path / "out" / inception.FILE
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with refused("inception", str(tmp_path / "out"), fix="damaged"):
        inception.load(tmp_path / "out")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"AuxLogits.conv0.conv.weight": np.zeros((1, 1, 1, 1), np.float32)}, "torchvision's InceptionV3"),
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, "tensor fc.weight shape=(1000, 2048) must be (1008, 2048)"),
        ({"Mixed_7c.branch_pool.bn.running_var": np.full(192, -1, np.float32)}, "negative variance"),
        ({"fc.bias": np.full(1008, np.nan, np.float32)}, "NaN"),
        ({"Mixed_5b.branch1x1.conv.weight": None}, "Mixed_5b.branch1x1.conv.weight shape='missing'"),
    ],
)
def test_another_network_or_a_damaged_one_is_one_line(change, says, tmp_path, monkeypatch, capsys):
    state = {name: a for name, a in (files.torch_state() | change).items() if a is not None}
    write_torch(tmp_path / "a.pth", {name: LazyTensor.of(array) for name, array in state.items()})
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, f"--from={tmp_path / 'a.pth'}", f"--out={tmp_path / 'out'}")
    error = capsys.readouterr().err
    assert leaves.value.code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_graph_is_read_within_its_bounds(tmp_path):
    path = tmp_path / "a.pb"
    content = files.graph_def({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full(4, 2.5, np.float32)})
    path.write_bytes(content)
    with open_weights(path) as weights:
        found = {name: tensor.read() for name, tensor in weights.joined().items()}
    np.testing.assert_array_equal(found["w"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(found["b"], [2.5] * 4)
    for damaged in (content[:-3], content[:40], b"\n\xff\xff\xff\xff", b"\nhello"):
        path.write_bytes(damaged)
        with refused(str(path)), open_weights(path):
            pass
    path.write_bytes(content.replace(np.float32(5).tobytes(), b"", 1))
    with refused(str(path)), open_weights(path):
        pass
