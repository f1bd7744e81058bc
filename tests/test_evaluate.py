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


@pytest.fixture
def converted(tmp_path):
    e = tiny.experiment()
    there = dataclasses.replace(e.data, name="nowhere")
    return tiny.write(tmp_path / "run", dataclasses.replace(e, data=there)), e


def test_a_converted_checkpoint_is_measured_against_images_that_are_named(converted, tmp_path, monkeypatch, capsys):
    directory, e = converted
    sets = []
    for split in (e.data.split, e.data.test_split):
        source = open_split(e.data, split, (8, 8, 1), 10)
        everything = source.gather(np.arange(len(source)))
        sets += [everything["image"], everything["label"]]
    classifier = features.train_classifier(*sets, num_classes=10, steps=5)
    (tmp_path / "out").mkdir()
    features.save(classifier, tmp_path / "out" / "classifier_ig_digits.npz")  # the real one takes 1,500 steps
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
    assert "nowhere" in capsys.readouterr().err
