"""The evaluate command on a checkpoint whose own data are not here, as a converted one's are not."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny_checkpoint as tiny

from ig_jax import cli, evaluate
from ig_jax.data.dataset import open_split
from ig_jax.evaluation import features


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.FLAGS.unparse_flags()
    for name in evaluate.FLAGS:
        evaluate.FLAGS[name].unparse()
    cli.run(evaluate.main, evaluate.FLAGS, evaluate.__doc__)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    e = tiny.experiment()
    there = dataclasses.replace(e.data, name="nowhere")
    return tiny.write(tmp_path_factory.mktemp("run"), dataclasses.replace(e, data=there)), e


def keep_classifier(out, e) -> None:
    """One that `evaluate` takes for its own; the real one takes 1,500 steps."""
    sources = [open_split(e.data, split, (8, 8, 1), 10) for split in (e.data.split, e.data.test_split)]
    sets = [source.gather(np.arange(len(source))) for source in sources]
    arrays = [found[name] for found in sets for name in ("image", "label")]
    out.mkdir()
    features.save(features.train_classifier(*arrays, num_classes=10, steps=5),
                  out / f"classifier_{evaluate.name_of(sources)}.npz")


def test_a_network_without_a_head_is_measured_without_internal_guidance(tmp_path, monkeypatch, capsys):
    e = tiny.experiment(inter_depth=())
    directory = tiny.write(tmp_path / "run", e)
    keep_classifier(tmp_path / "out", e)
    flags = [f"--checkpoint={directory}", f"--out={tmp_path / 'out'}", "--num=20", "--batch_size=20", "--cfg_scales=1.25"]
    run(monkeypatch, *flags)
    assert [row["kind"] for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]] == ["none", "CFG"]
    said = capsys.readouterr()
    assert "2 recipes x 20 images" in said.out and "internal guidance" not in said.out and "40/40 images" in said.err
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--ig_scales=2")
    assert "ig_scale=2.0 must be 1 for a model without an intermediate head" in capsys.readouterr().err


@pytest.mark.parametrize("flag,words", [
    ("--ig_scales=-1,2", "ig_scale=-1.0"), ("--cfg_scales=nan", "cfg_scale"),
    ("--out=/proc/nowhere", "cannot write '/proc/nowhere'"),
])
def test_what_cannot_be_is_said_before_the_classifier_is_trained(converted, tmp_path, monkeypatch, capsys, flag, words):
    monkeypatch.setattr(features, "train_classifier", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, f"--checkpoint={converted[0]}", f"--out={tmp_path / 'out'}", "--num=20", "--data=ig_digits", flag)
    assert leaves.value.code == 2 and words in capsys.readouterr().err


def test_a_classifier_is_named_after_its_images():
    data = tiny.experiment().data
    names = {evaluate.name_of([open_split(dataclasses.replace(data, pad=pad), split, (8 + 2 * pad, 8 + 2 * pad, 1), 10)])
             for pad in (0, 1) for split in ("train", "test")}
    assert len(names) == 4


def test_a_converted_checkpoint_is_measured_against_images_that_are_named(converted, tmp_path, monkeypatch, capsys):
    directory, e = converted
    keep_classifier(tmp_path / "out", e)
    flags = [f"--checkpoint={directory}", f"--out={tmp_path / 'out'}", "--num=20", "--batch_size=20",
             "--ig_scales=2", "--cfg_scales=1.25"]
    run(monkeypatch, *flags, "--data=ig_digits")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["what"]["data"]["name"] == "ig_digits" and len(table["rows"]) == 4
    assert "FD-CNN" in capsys.readouterr().out


def test_data_that_are_not_here_are_one_line(converted, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, f"--checkpoint={converted[0]}", f"--out={tmp_path / 'out'}", "--num=20")
    assert leaves.value.code == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()
