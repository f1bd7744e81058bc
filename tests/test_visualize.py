"""The visualize command: pictures that say what made them, and refusals in one line."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoint as tiny
import toy
from PIL import Image
from refusal import refused
from search import find

from ig_jax import visualize
from ig_jax.base import cli
from ig_jax.generation import pretrained
from ig_jax.generation.pretrained import Pretrained
from ig_jax.pictures import images, plots


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("run"), tiny.experiment())


def run(word, **given):
    """One command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["visualize", word, *(f"--{name}={value}" for name, value in given.items())])
        visualize.main(*cli.parse(toy.fresh(visualize.FLAGS), visualize.WORDS))


@pytest.mark.parametrize(
    "word, given, progress",
    [
        ("compare", {"num": 10}, "40/40 images"),
        ("gap", {"num": 2}, ""),
        ("map", {"scales": "ig:1,2;cfg:1,1.5"}, "160/160 images"),
    ],
)
def test_a_picture_and_its_metadata(checkpoint, tmp_path, word, given, progress, capsys):
    run(word, checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, **given)
    picture = np.asarray(Image.open(tmp_path / f"{word}.png"))
    assert picture.shape[-1] == 3 and picture.shape[0] > 150 and 5 < picture.std() < 120
    assert progress in capsys.readouterr().err
    metadata = json.loads((tmp_path / "recipe.json").read_text())
    assert metadata["kind"] == word and metadata["recipe"]["ig_scale"] == 2
    assert metadata["scales"] == given.get("scales")


@pytest.fixture
def written(monkeypatch):
    """The lines of text in the pictures of a test."""
    lines, text = [], plots.Page.text

    def noted(self, x, y, line, *args, **kwargs):
        lines.append(line)
        text(self, x, y, line, *args, **kwargs)

    monkeypatch.setattr(plots.Page, "text", noted)
    return lines


@pytest.mark.parametrize(
    "word, given, guided",
    [
        ("compare", {"num": 10}, ["no guidance", "CFG", "IG", "IG + CFG", "w = 2", "s = 1.5 on (0, 0.7]"]),
        ("map", {"num": 10}, ["IG 1", "IG 1.5", "IG 2", "CFG 1", "CFG 1.25 on (0, 0.7]"]),
        ("gap", {"num": 2}, ["IG 2 + CFG 1.5 on (0, 0.7]"]),
    ],
)
def test_every_picture_says_what_made_it(checkpoint, tmp_path, written, word, given, guided):
    run(word, checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, cfg_interval="0,0.7", seed=3, **given)
    metadata = json.loads((tmp_path / "recipe.json").read_text())["checkpoint"]
    text = " ".join(written)
    assert f"digits, step 0, EMA 0.999, sha256 {metadata['digest'][:8]}; euler, 4 steps, seed 3" in text
    assert all(words in (text if word == "gap" else written) for words in guided)


def test_compare_is_at_most_1600_pixels_wide(checkpoint, tmp_path):
    run("compare", checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, num=12, labels=3)
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width <= 1600


def test_compare_of_large_images_has_two_rows_of_panels(checkpoint, tmp_path, monkeypatch):
    sample = Pretrained.sample
    monkeypatch.setattr(Pretrained, "sample", lambda *a, **k: sample(*a, **k).repeat(64, 1).repeat(64, 2))
    run("compare", checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, num=2, labels=3)
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width <= 1600 and picture.height > 2 * 2 * 512  # two images below each other in a panel


def test_a_map_has_a_class_in_each_row_and_how_far_each_cell_is_from_the_first(checkpoint, tmp_path, written):
    given = dict(scales="ig:1,2;cfg:1,1.5", num=20, labels="3,1")
    run("map", checkpoint=checkpoint, out=tmp_path, **given)
    model = pretrained.load(checkpoint)
    labels = np.tile([3, 1], 10)
    order = np.argsort(labels, kind="stable")
    recipes = [model.recipe.replace(ig_scale=w, cfg_scale=s) for s in (1.0, 1.5) for w in (1.0, 2.0)]
    cells = [model.sample(labels, recipe)[order] for recipe in recipes]
    changes = [np.abs(cell / 255 - cells[0] / 255).mean() for cell in cells]
    assert [line for line in written if line.endswith("%")] == [f"{change:.2%}" for change in changes]
    assert changes[0] == 0 < min(changes[1:])
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert len(find(picture, images.grid(cells[3], columns=10, zoom=6, gap=6))) == 1
    assert "Rows of a cell: class 1, 3." in " ".join(written)


@pytest.mark.parametrize(
    "word, side, classes, expected",
    [
        ("compare", 8, 10, (80, "balanced")),
        ("map", 32, 10, (40, "balanced")),
        ("map", 8, 3, (12, "balanced")),
        ("map", 8, 1000, (40, "0,111,222,333,444,555,666,777,888,999")),
        ("compare", 256, 1000, (8, "0,333,666,999")),
        ("gap", 8, 10, (4, "0,3,6,9")),
    ],
)
def test_by_default_a_few_images_of_each_of_a_few_classes(word, side, classes, expected):
    experiment = SimpleNamespace(model=SimpleNamespace(num_classes=classes))
    assert visualize.shown(word, SimpleNamespace(image_shape=(side, side, 3), experiment=experiment)) == expected


def test_the_null_label_is_named(checkpoint, tmp_path, written):
    run("gap", checkpoint=checkpoint, out=tmp_path, ig_scale=2, labels="4,10", num=2)
    assert "4" in written and "no class" in written


def test_compare_keeps_the_images_of_each_variant(checkpoint, tmp_path):
    run("compare", checkpoint=checkpoint, out=tmp_path, ig_scale=2, cfg_scale=1.5, num=20)
    names = ["cfg.npz", "compare.png", "ig.npz", "ig_cfg.npz", "no_guidance.npz", "recipe.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    archives = [np.load(tmp_path / name) for name in names if name.endswith("npz")]
    for archive in archives:
        np.testing.assert_array_equal(archive["arr_1"], np.repeat(np.arange(10), 2))
    assert len({archive["arr_0"].tobytes() for archive in archives}) == 4


@pytest.mark.parametrize(
    "word, given, name, words",
    [
        ("map", dict(scales="ig:1,2"), "--scales", dict(expected="two of ig, cfg")),
        ("map", dict(scales="ig:1,2;ig:1"), "--scales", dict(expected="two of ig, cfg")),
        ("map", dict(scales="ig:1,-2;cfg:1"), "ig_scale", {}),
        ("compare", dict(ig_scale=1), "(ig_scale, cfg_scale)", dict(fix="--ig_scale")),
        ("compare", dict(num=11), "num", dict(fix="--labels=balanced")),
        ("gap", dict(solver="ab2"), "solver", dict(fix="use euler, heun, trapezoid or sde")),
        ("gap", dict(num=0), "--num", dict(value=0)),
        ("both", {}, "command", dict(expected="compare, map, gap")),
    ],
)
def test_bad_input_is_refused_before_compilation(checkpoint, tmp_path, monkeypatch, word, given, name, words):
    monkeypatch.setattr("ig_jax.generation.sampler.make_sampler", lambda *a: pytest.fail("compiled"))
    value = {"value": words.pop("value")} if "value" in words else {}
    with refused(name, **value, **words):
        run(word, **dict(checkpoint=checkpoint, out=tmp_path / "out", ig_scale=2, cfg_scale=1.5) | given)
    assert not (tmp_path / "out").exists()
