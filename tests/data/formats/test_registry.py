"""The registry of formats: built-in ones by module name, others by registration."""

import subprocess
import sys

import numpy as np
import toy
from refusal import refused

from ig_jax.data import dataset
from ig_jax.data.formats import registry
from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels


def test_built_in_formats_are_the_modules_of_the_package():
    assert {"idx", "tfds"} <= set(registry.names()) and "registry" not in registry.names()
    for name in registry.names():
        assert callable(registry.opener(name))


def test_an_unknown_format_is_refused_by_the_config():
    with refused("source", "folder", expected="one of auto, "):
        toy.data_config("folder")
    with refused("data.source", "folder", expected="one of "):
        registry.opener("folder")


def test_a_config_loads_no_format():
    code = """
import sys, ig_jax.config.experiment
print([name for name in sys.modules if name.startswith(("ig_jax.data.formats.", "tensorflow"))])
"""
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=toy.ROOT)
    assert found == "['ig_jax.data.formats.registry']\n"


def test_a_format_registered_elsewhere_is_opened_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_openers", dict(registry._openers))

    @registry.data_format("toy_rows")
    def opened(config, split):
        def read(rows):
            return {"image": np.full((len(rows), 8, 8, 1), 7, np.uint8), "label": rows.astype(np.int32) % 10}

        return Source(pixels((8, 8, 1), tuple("0123456789"), config.mirrored, f"toy:{split}"), 30, read)

    config = toy.data_config("toy_rows", mirrored=True)
    promise = pixels((8, 8, 1), tuple("abcdefghij"), mirrored=True)
    source = dataset.open_split(config, "train", promise)
    assert repr(source) == "toy:train" and source.gather(np.asarray([13]))["label"] == 3
    with refused("data.mirrored", False, expected="True, as in toy:train"):
        dataset.open_split(config, "train", pixels((8, 8, 1), tuple("abcdefghij")))


def test_a_folder_is_opened_by_the_one_format_that_recognises_it(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_openers", dict(registry._openers))
    monkeypatch.setattr(registry, "_recognise", dict(registry._recognise))

    def register(name, file):
        @registry.data_format(name, recognise=lambda folder: (folder / file).exists())
        def opened(config, split):
            read = lambda rows: {"image": np.zeros((len(rows), 8, 8, 1), np.uint8), "label": rows.astype(np.int32)}
            return Source(pixels((8, 8, 1), tuple("0123456789"), config.mirrored, f"{name}:{split}"), 10, read)

    register("toy_a", "a")
    register("toy_b", "b")
    opened = lambda folder: dataset.open_split(
        toy.data_config("auto", folder=str(folder)), "train", pixels((8, 8, 1), tuple("0123456789"))
    )
    with refused("data.folder", "", fix="set --config.data.folder=DIR"):
        opened("")
    with refused("data.folder", str(tmp_path / "none"), expected="exists"):
        opened(tmp_path / "none")
    with refused("data.folder", str(tmp_path), expected="toy_a, toy_b", fix="set data.source"):
        opened(tmp_path)
    (tmp_path / "b").write_text("")
    assert repr(opened(tmp_path)) == "toy_b:train"
    (tmp_path / "a").write_text("")
    with refused("data.folder", str(tmp_path), fix="set data.source", says="may be toy_a or toy_b"):
        opened(tmp_path)
