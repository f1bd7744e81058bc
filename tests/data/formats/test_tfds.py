"""TFDS data sets: the built-in digits, others by name, and those that are refused."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.data import dataset, spec
from ig_jax.data.formats import tfds as format_tfds


def _all(source):
    """Every image and label of a source."""
    batch = source.gather(np.arange(len(source)))
    return batch["image"], batch["label"]


def open_tfds(name, split, folder):
    """The source of a data set in `folder`."""
    return format_tfds.open_tfds(toy.data_config(name=name, folder=folder), split)


# the built-in digits


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits(digits_dir):
    return {split: open_tfds("ig_digits", split, digits_dir) for split in ("train", "test")}


def test_digits_have_the_published_counts(digits):
    train, test = digits["train"], digits["test"]
    assert (len(train), len(test)) == (1437, 360)
    assert train.spec.latent_shape == (8, 8, 1) and train.spec.num_classes == 10
    assert train.spec.class_names == tuple("0123456789")
    assert repr(train) == train.spec.identity == "tfds:ig_digits:1.0.0:train[1437]"
    assert repr(test) == "tfds:ig_digits:1.0.0:test[360]"
    np.testing.assert_array_equal(np.bincount(_all(test)[1]), [36] * 10)
    # UCI's counts of its test part, less the 36 held out
    uci = np.asarray([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    np.testing.assert_array_equal(np.bincount(_all(train)[1]), uci - 36)


def test_digits_are_the_shipped_numbers_in_two_disjoint_splits(digits):
    from ig_jax.data.digits import split_indices

    with np.load(toy.ROOT / "ig_jax" / "data" / "digits.npz") as archive:
        counts, labels = archive["images"], archive["labels"]
    assert counts.shape == (1797, 8, 8) and counts.dtype == np.uint8 and counts.max() == 16
    assert int(counts.sum()) == 561718  # the checksum of the published numbers
    rows = split_indices(labels)
    assert sorted([*rows["train"], *rows["test"]]) == list(range(1797))
    for split, source in digits.items():
        images, found = _all(source)
        assert images.dtype == np.uint8 and found.dtype == np.int32
        np.testing.assert_array_equal(found, labels[rows[split]])
        want = np.floor(counts[rows[split]].astype(float) * 255 / 16 + 0.5)
        np.testing.assert_array_equal(images[..., 0], want)
    assert _all(digits["train"])[0].max() == 255


_HELPER = f"""
import sys
sys.path.insert(0, {str(toy.ROOT / "tests")!r})
import toy
from refusal import refused
from ig_jax.data.formats import tfds
def open_tfds(name, split, folder):
    return tfds.open_tfds(toy.data_config(name=name, folder=folder), split)
"""
_OPEN = """
import zlib, numpy as np
source = open_tfds("ig_digits", "train", sys.argv[1])
print(source, zlib.crc32(source.gather(np.arange(len(source)))["image"].tobytes()))
"""
_DIE = """
import os, signal
from ig_jax.data import digits
generate = digits.IgDigits._generate_examples
def dying(self, *arrays):
    for count, example in enumerate(generate(self, *arrays)):
        if count == 700:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
digits.IgDigits._generate_examples = dying
open_tfds("ig_digits", "train", sys.argv[1])
"""


def test_two_processes_prepare_once_after_a_third_was_killed(digits, tmp_path):
    killed = subprocess.run([sys.executable, "-c", _HELPER + _DIE, tmp_path], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "ig_digits").glob("incomplete*"))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", _HELPER + _OPEN, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    first, second = (out.splitlines() for out, _ in answers)
    assert first[-1] == second[-1]
    assert sorted(len(lines) for lines in (first, second)) == [1, 2]  # one of them said "preparing"


def _prepared(tmp_path, name="ig_digits"):
    open_tfds(name, "train", str(tmp_path))
    return next((tmp_path / name).glob("*.*.*"))


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = _prepared(tmp_path)
    shard = next(folder.glob("*train*"))
    whole = shard.read_bytes()
    content = bytearray(whole)
    content[len(content) // 3] ^= 4  # one bit in the middle of the compressed records
    shard.write_bytes(content)
    with refused("data set", fix="another folder", says=str(folder)):
        source = open_tfds("ig_digits", "train", str(tmp_path))
        _all(source)
    shard.write_bytes(whole[:2000])
    with refused("data set", fix="another folder", says=str(folder)):
        open_tfds("ig_digits", "train", str(tmp_path))
    shard.unlink()
    with refused("data set", "ig_digits", fix="another folder", says=shard.name):
        open_tfds("ig_digits", "train", str(tmp_path))
    (folder / "dataset_info.json").unlink()
    with refused("data set", "ig_digits", fix="another folder", says="half written"):
        open_tfds("ig_digits", "test", str(tmp_path))


def test_names_splits_and_folders_that_cannot_work(digits, digits_dir, tmp_path):
    with refused("data set", "ig_digit", fix="did you mean ig_digits"):
        open_tfds("ig_digit", "train", digits_dir)
    with refused("data set", "ig_digits:7.0.0", fix="version"):
        open_tfds("ig_digits:7.0.0", "train", digits_dir)
    for split in ("trian", "train[", "train[:0]", ""):
        with refused("split", split, fix="'test', 'train'"):
            open_tfds("ig_digits", split, digits_dir)
    (tmp_path / "file").write_text("")
    with refused("data set", "ig_digits", fix="can be written"):
        open_tfds("ig_digits", "train", str(tmp_path / "file"))


# other TFDS data sets


def _define(name, image, label, examples):
    """Register a TFDS data set called `name` with these features and a list of example dicts."""
    import tensorflow_datasets as tfds

    def info(self):
        features = tfds.features.FeaturesDict({"image": image, "label": label, "id": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=features)

    def generate(self):
        for number, (pixels, kind) in enumerate(examples):
            yield number, {"image": pixels, "label": kind, "id": f"number {number}"}

    return type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "VERSION": tfds.core.Version("2.1.0"),
            "_info": info,
            "_generate_examples": generate,
            "_split_generators": lambda self, dl_manager: {"train": self._generate_examples()},
        },
    )


def test_a_colour_data_set_of_png_images_is_read_by_name(tmp_path):
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), np.uint8)
    _define(
        "IgTestColours",
        tfds.features.Image(shape=(6, 5, 3)),
        tfds.features.ClassLabel(names=["cat", "dog"]),
        [(image, row % 2) for row, image in enumerate(pixels)],
    )
    source = open_tfds("ig_test_colours", "train", str(tmp_path))
    assert repr(source) == "tfds:ig_test_colours:2.1.0:train[24]"
    assert source.spec.class_names == ("cat", "dog") and source.spec.latent_shape == (6, 5, 3)
    images, labels = _all(source)
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, np.arange(24) % 2)


def test_labels_may_be_numbers_or_text(tmp_path):
    import tensorflow_datasets as tfds

    grey = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    image = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)
    texts = ["owl", "cat", "dog", "cat", "owl"]
    _define("IgTestTexts", image, tfds.features.Text(), [(grey, text) for text in texts])
    source = open_tfds("ig_test_texts", "train", str(tmp_path))
    assert source.spec.class_names == ("cat", "dog", "owl") and _all(source)[1].tolist() == [2, 0, 1, 0, 2]
    # Part of the data has the classes of all of them.
    assert open_tfds("ig_test_texts", "train[:1]", str(tmp_path)).spec.class_names == ("cat", "dog", "owl")
    _define("IgTestNumbers", image, tfds.features.Scalar(np.int64), [(grey, number) for number in (3, 0, 9)])
    config = toy.data_config(name="ig_test_numbers", folder=str(tmp_path), test_split="train")
    source = dataset.open_split(config, "train", spec.pixels((4, 4, 1), tuple(map(str, range(10)))))
    assert source.spec.num_classes == 10 and _all(source)[1].tolist() == [3, 0, 9]
    with refused("label", 9, expected="in 0..8", says="row 2 of"):
        _all(dataset.open_split(config, "train", spec.pixels((4, 4, 1), tuple(map(str, range(9))))))


def test_data_sets_of_another_kind_are_refused(tmp_path):
    import tensorflow_datasets as tfds

    tensor, label = tfds.features.Tensor, tfds.features.ClassLabel(num_classes=2)
    grey = np.zeros((4, 4, 1), np.uint8)
    kinds = [
        ("IgTestFloats", tensor(shape=(4, 4, 1), dtype=np.float32), label, np.float32(grey), 0, "uint8"),
        ("IgTestVarying", tfds.features.Image(shape=(None, None, 1)), label, grey, 0, "fixed shape"),
        ("IgTestFlat", tensor(shape=(16,), dtype=np.uint8), label, grey.ravel(), 0, "(H, W, C)"),
        (
            "IgTestVectors",
            tensor(shape=(4, 4, 1), dtype=np.uint8),
            tensor(shape=(2,), dtype=np.int64),
            grey,
            [1, 0],
            "text",
        ),
        ("IgTestReal", tensor(shape=(4, 4, 1), dtype=np.uint8), tensor(shape=(), dtype=np.float32), grey, 1.0, "text"),
        ("IgTestUnlabelled", tensor(shape=(4, 4, 1), dtype=np.uint8), label, grey, -1, "label=-1"),
    ]
    for name, image, kind, pixels, value, needle in kinds:
        builder = _define(name, image, kind, [(pixels, value)] * 2)
        with refused("label" if "label=" in needle else "data set", says=needle) as error:
            open_tfds(builder.name, "train", str(tmp_path))
        assert builder.name in str(error.value)


def test_a_data_set_stored_as_tfrecord_says_what_to_do(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)
    label = tfds.features.ClassLabel(num_classes=2)
    builder = _define("IgTestStored", image, label, [(np.zeros((4, 4, 1), np.uint8), 0)] * 2)
    builder(data_dir=tmp_path).download_and_prepare(file_format="tfrecord")
    with refused("data set", "ig_test_stored", fix="data.folder", says="tfrecord"):
        open_tfds("ig_test_stored", "train", str(tmp_path))


def test_a_failed_download_is_one_line_that_names_the_data_set(tmp_path, monkeypatch):
    def offline(builder):
        raise ConnectionError("Max retries exceeded\n(Failed to resolve 'example.org')")

    monkeypatch.setattr(format_tfds, "_prepare", offline)
    with refused("data set", "mnist", fix="check the network, or set data.folder", says="Failed to resolve"):
        open_tfds("mnist", "train", str(tmp_path))
