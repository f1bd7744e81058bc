"""The evaluate command on a checkpoint whose data are not on this machine, as those of a converted one."""

import dataclasses
import json
import sys

import jax
import pytest
import tiny_checkpoint as tiny
import toy
from refusal import refused

from ig_jax import evaluate
from ig_jax.base import cli
from ig_jax.evaluation import classifier, report
from ig_jax.generation import pretrained


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    cli.run(evaluate.main, toy.fresh(evaluate.FLAGS), evaluate.__doc__)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    e = tiny.experiment()
    there = dataclasses.replace(e.data, name="nowhere")
    return tiny.write(tmp_path_factory.mktemp("run"), dataclasses.replace(e, data=there))


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """The real classifier takes 1,500 steps."""
    monkeypatch.setattr(classifier, "STEPS", 5)


def test_a_network_without_a_head_is_measured_without_internal_guidance(tmp_path, monkeypatch, capsys):
    e = tiny.experiment(inter_depth=())
    directory = tiny.write(tmp_path / "run", e)
    flags = [
        f"--checkpoint={directory}",
        f"--out={tmp_path / 'out'}",
        "--num=20",
        "--batch_size=20",
        "--cfg_scales=1.25",
    ]
    run(monkeypatch, *flags)
    assert [row["kind"] for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]] == ["none", "CFG"]
    printed = capsys.readouterr()
    assert "2 recipes x 20 images" in printed.out and "internal guidance" not in printed.out
    assert "40/40 images" in printed.err
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--ig_scales=2")
    assert "ig_scale=2.0 must be 1 for a model without an intermediate head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag,words",
    [
        ("--ig_scales=-1,2", "ig_scale=-1.0"),
        ("--cfg_scales=nan", "cfg_scale"),
        ("--out=/proc/nowhere", "cannot write '/proc/nowhere'"),
    ],
)
def test_bad_input_is_refused_before_the_classifier_is_trained(converted, tmp_path, monkeypatch, capsys, flag, words):
    monkeypatch.setattr(classifier, "train_classifier", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, f"--checkpoint={converted}", f"--out={tmp_path / 'out'}", "--num=20", "--data=ig_digits", flag)
    assert leaves.value.code == 2 and words in capsys.readouterr().err


def test_a_converted_checkpoint_is_measured_against_images_that_are_named(converted, tmp_path, monkeypatch, capsys):
    directory = converted
    flags = [
        f"--checkpoint={directory}",
        f"--out={tmp_path / 'out'}",
        "--num=20",
        "--batch_size=20",
        "--ig_scales=2",
        "--cfg_scales=1.25",
    ]
    run(monkeypatch, *flags, "--data=ig_digits")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["what"]["data"]["name"] == "ig_digits" and len(table["rows"]) == 4
    assert table["versions"]["jax"] == jax.__version__
    assert "FD-CNN" in capsys.readouterr().out


def test_the_classifier_is_trained_as_the_config_says_of_mirrored_images(tmp_path, monkeypatch):
    """The data of such a run are opened as mirrored; images named by --data are of the same kind."""
    e = tiny.experiment(inter_depth=())
    mirrored = dataclasses.replace(e, data=dataclasses.replace(e.data, mirrored=True))
    directory, seen = tiny.write(tmp_path / "run", mirrored), []
    train_classifier = classifier.train_classifier

    def trained(train, test, **options):
        seen.append((train.spec.mirrored, test.spec.mirrored))
        return train_classifier(train, test, **options)

    monkeypatch.setattr(classifier, "train_classifier", trained)
    flags = [f"--checkpoint={directory}", "--num=20", "--batch_size=20", "--cfg_scales="]
    run(monkeypatch, *flags, f"--out={tmp_path / 'a'}")
    run(monkeypatch, *flags, f"--out={tmp_path / 'b'}", "--data=ig_digits")
    assert seen == [(True, True)] * 2


def test_data_that_are_not_on_this_machine_are_refused(converted, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, f"--checkpoint={converted}", f"--out={tmp_path / 'out'}", "--num=20")
    assert leaves.value.code == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_table_grows_by_a_checkpoint_and_is_never_overwritten(converted, tmp_path, monkeypatch, capsys):
    """Rows without guidance; one classifier for all evaluations."""
    for step in (5, 12):
        model = dataclasses.replace(pretrained.load(converted), step=step)
        params = {name: value * step for name, value in model.params.items()}
        dataclasses.replace(model, params=params).save(tmp_path / "run")
    flags = ["--data=ig_digits", "--num=20", "--batch_size=20", "--ig_scales=", f"--classifier={tmp_path / 'shared'}"]
    out = tmp_path / "out"
    run(monkeypatch, *flags, f"--checkpoint={converted}", f"--out={tmp_path / 'a'}", "--cfg_scales=1.5")
    monkeypatch.setattr(classifier, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
    run(monkeypatch, *flags, f"--checkpoint={converted}", f"--out={out}", "--cfg_scales=1")
    steps = f"--checkpoint={tmp_path / 'run' / 'checkpoints' / '*'}"
    run(monkeypatch, *flags, steps, f"--out={out}", "--cfg_scales=1")
    first, rows = (json.loads((path / "table.json").read_text())["rows"] for path in (tmp_path / "a", out))
    assert [row["kind"] for row in first] == ["none", "CFG"] and rows[0] == first[0]
    assert [(row["kind"], row["step"]) for row in rows] == [("none", 0), ("none", 5), ("none", 12)]
    assert "step 12: no guidance" in (out / "table.txt").read_text()
    assert len(list((tmp_path / "shared").iterdir())) == 1
    capsys.readouterr()
    monkeypatch.setattr(classifier, "trained_once", lambda *a, **k: pytest.fail("measured again"))
    run(monkeypatch, *flags, steps, f"--out={out}", "--cfg_scales=1")
    assert capsys.readouterr().out == (out / "table.txt").read_text()
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, steps, f"--out={out}", "--cfg_scales=1", "--num=30")
    assert "num=30 must be 20, as of the rows that are in" in capsys.readouterr().err
    with refused("step 0", fix="another --out"):
        report.holds({"rows": rows}, rows[0] | {"checkpoint": "f" * 64}, out)
