"""The study on Fashion-MNIST: its small images, its recipes, and the page that holds its numbers."""

import json
import runpy

import numpy as np
import pytest
import toy

from ig_jax.data.formats.idx import IDX_FILES
from ig_jax.diffusion.recipe import Recipe

PATH = toy.ROOT / "launch" / "fashion.py"
RESULTS = toy.ROOT / "configs" / "results"
STUDY = runpy.run_path(str(PATH))


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def test_small_images_are_means_of_four_pixels(tmp_path, monkeypatch):
    rng, images = np.random.default_rng(0), {}
    for split, names in IDX_FILES.items():
        images[split] = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        for name, array in zip(names, (images[split], np.arange(20, dtype=np.uint8) % 10)):
            write_idx(tmp_path / name, array)
    monkeypatch.setitem(STUDY["shrink"].__globals__, "COUNTS", {"train": 20, "test": 20})
    STUDY["shrink"](str(tmp_path), str(tmp_path / "data"))
    for split in images:
        small = STUDY["opened"](tmp_path / "data", split).gather(np.arange(20))
        padded = np.pad(images[split], ((0, 0), (2, 2), (2, 2))).astype(float)
        expected = sum(padded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        assert small["image"].shape == (20, 16, 16, 1) and np.abs(small["image"][..., 0] - expected).max() <= 0.5
        np.testing.assert_array_equal(small["label"], np.arange(20) % 10)


def test_every_setting_is_a_recipe_and_is_asked_for_once():
    recipe = Recipe.of(dict(toy.load_config("fashion_mnist", "small").sample))
    for _, settings in STUDY["RUNS"].values():
        recipes = [recipe.replace(**STUDY["NONE"] | asked) for asked in [STUDY["NONE"], *settings]]
        assert all(found not in recipes[:i] for i, found in enumerate(recipes))


def test_the_page_holds_the_numbers_of_the_study():
    lines = json.loads((RESULTS / "fashion_mnist.json").read_text())
    assert STUDY["table"](lines) in (toy.ROOT / "configs" / "RESULTS.md").read_text()
    assert {line["run"] for line in lines} == {"real", *STUDY["RUNS"]}
    for line in lines:
        assert all(len(line[key]) == len(STUDY["SEEDS"]) for key in STUDY["METRICS"])
        assert line["run"] == "real" or line["made"]["recipe"]["steps"] == 20


@pytest.mark.parametrize("picture", ["fashion_mnist.png", "fashion_mnist_samples.png"])
def test_the_pictures_are_small(picture):
    assert 5_000 < (RESULTS / picture).stat().st_size < 300_000
