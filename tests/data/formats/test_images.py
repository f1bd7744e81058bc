"""Images as data of pixel models: the published crop at the size of the network's input."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import toy
from latent_folders import config, every
from refusal import refused

from ig_jax.data import dataset
from ig_jax.data.pipeline import batches
from ig_jax.models.latents import identity

PHOTOGRAPHS = toy.ROOT / "tests" / "golden" / "photographs"
FILES = json.loads((PHOTOGRAPHS / "crops.json").read_text())["files"]


def opened(folder, source="auto", *, size=64, channels=3, classes=3, split="train", **changes):
    data = config(folder, source, **changes)
    promise = data.spec((size, size, channels), identity("pixels", channels, "half"), classes)
    return dataset.open_split(data, split, promise)


@pytest.mark.parametrize("size", [64, 128])
def test_class_folders_give_the_published_crops(size):
    source = opened(PHOTOGRAPHS / "train", size=size)
    batch = every(source)
    assert batch["image"].shape == (12, size, size, 3) and batch["label"].dtype == np.int32
    sums = [hashlib.sha256(image.tobytes()).hexdigest() for image in batch["image"]]
    assert sums == [FILES[name]["crop_sha256"][str(size)] for name in sorted(FILES)]
    assert batch["label"].tolist() == [FILES[name]["label"] for name in sorted(FILES)]
    assert (source.spec.holds, source.spec.dtype, source.spec.mirrored) == ("pixels", "uint8", False)


def test_parquet_gives_the_same_crops():
    source = opened(PHOTOGRAPHS / "archives" / "hf")
    rows = json.loads((PHOTOGRAPHS / "archives.json").read_text())["hf/data"]
    sums = [hashlib.sha256(image.tobytes()).hexdigest() for image in every(source)["image"]]
    assert sums == [FILES[row["source"]]["crop_sha256"]["64"] for row in rows]
    assert source.spec.class_names[0] == "tench, Tinca tinca"


def test_grey_input_and_padding():
    grey = every(opened(PHOTOGRAPHS / "train", channels=1, pad=4))["image"]
    assert grey.shape == (12, 64, 64, 1) and not grey[:, :4].any() and grey[:, 4:60, 4:60].any()


def test_batches_are_the_same_for_any_number_of_processes():
    source = opened(PHOTOGRAPHS / "train")
    read = lambda process, count: next(
        batches(
            source, seed=0, global_batch=4, start_step=2, rows=range(process * 4 // count, (process + 1) * 4 // count)
        )
    )
    whole, halves = read(0, 1), [read(process, 2) for process in (0, 1)]
    np.testing.assert_array_equal(whole["image"], np.concatenate([half["image"] for half in halves]))


def test_an_image_that_cannot_be_decoded_is_named_when_read(tmp_path):
    name = f"{PHOTOGRAPHS / 'broken'}/n01440764/n01440764_2.JPEG"
    source = opened(PHOTOGRAPHS / "broken", classes=2)
    with refused(name, says="row 1"):
        source.gather(np.asarray([3, 1]))


def test_what_a_network_cannot_take_is_refused(tmp_path):
    with refused("model.channels", 4, fix="ig_jax.encode"):
        opened(PHOTOGRAPHS / "train", source="images", channels=4)
    with refused("model.num_classes", 1000):
        opened(PHOTOGRAPHS / "train", classes=1000)
    shutil.copytree(PHOTOGRAPHS / "untidy", tmp_path / "train")
    (tmp_path / "train" / "n02999999").mkdir()
    source = opened(tmp_path, classes=3)
    assert source.empty_classes() == ["n02999999"]
    with refused(str(tmp_path), says="val or validation"):
        opened(tmp_path, classes=3, split="validation")
    with refused(str(tmp_path), says="no folder test"):
        opened(tmp_path, classes=3, split="test")
