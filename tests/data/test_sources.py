"""Sources: the built-in digits, any TFDS image data set by name, IDX files, and what is refused."""

import gzip
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from ig_jax.data import sources
from ig_jax.errors import UserError


def _all(source):
    """Every image and label of a source."""
    batch = source.gather(np.arange(len(source)))
    return batch["image"], batch["label"]


def _refused(*needles):
    """Expect a UserError of one line in which every needle stands."""
    return pytest.raises(UserError, match="^" + "".join(f"(?=.*{needle})" for needle in needles) + "[^\n]*$")


# the built-in digits


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits(digits_dir):
    return {split: sources.open_tfds("ig_digits", split, digits_dir) for split in ("train", "test")}


def test_import_of_the_package_is_light():
    code = "import sys, ig_jax.data; print({'tensorflow', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_digits_have_the_published_counts(digits):
    train, test = digits["train"], digits["test"]
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (8, 8, 1) and train.num_classes == 10
    assert train.class_names == tuple("0123456789")
    assert repr(train) == train.identity == "tfds:ig_digits:1.0.0:train[1437]"
    assert repr(test) == "tfds:ig_digits:1.0.0:test[360]"
    np.testing.assert_array_equal(np.bincount(_all(test)[1]), [36] * 10)
    # UCI's counts of its test part, less the 36 held out
    uci = np.asarray([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    np.testing.assert_array_equal(np.bincount(_all(train)[1]), uci - 36)


def test_digits_are_the_shipped_numbers_in_two_disjoint_splits(digits):
    from ig_jax.data.digits import split_indices

    with np.load(os.path.join(os.path.dirname(sources.__file__), "digits.npz")) as archive:
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


def test_item_is_the_row_of_a_gather_and_the_ends_are_guarded(digits):
    source = digits["test"]
    item, batch = source[7], source.gather(np.asarray([3, 7, 7, 0]))
    assert item["image"].shape == (8, 8, 1) and item["label"].dtype == np.int32 and item["label"].shape == ()
    for position in (1, 2):
        np.testing.assert_array_equal(item["image"], batch["image"][position])
        assert item["label"] == batch["label"][position]
    for row in (-1, 360):
        with pytest.raises(IndexError, match="outside 0..359"):
            source[row]


def test_in_memory_is_the_same_data_and_reads_no_file(digits, digits_dir, tmp_path):
    part = sources.open_tfds("ig_digits", "train[:70%]", digits_dir)
    copy = sources.in_memory(part)
    assert (repr(copy), len(copy), copy.image_shape) == (repr(part), 1006, (8, 8, 1))
    for want, got in zip(_all(part), _all(copy), strict=True):
        np.testing.assert_array_equal(want, got)
    batch = copy.gather(np.asarray([5]))
    batch["image"][:] = 99  # a caller that writes into its batch must not change the data
    np.testing.assert_array_equal(copy[5]["image"], part[5]["image"])


def test_pad_adds_zeros_on_each_side(digits):
    padded = sources.pad(digits["test"], 2)
    assert padded.image_shape == (12, 12, 1) and repr(padded) == repr(digits["test"]) + ":pad2"
    images, labels = _all(padded)
    np.testing.assert_array_equal(images[:, 2:10, 2:10], _all(digits["test"])[0])
    assert images[:, [0, 1, 10, 11]].max() == images[:, :, [0, 1, 10, 11]].max() == 0
    np.testing.assert_array_equal(labels, _all(digits["test"])[1])
    assert sources.pad(digits["test"], 0) is digits["test"]
    with _refused("pad=-1"):
        sources.pad(digits["test"], -1)


_OPEN = """
import sys, zlib, numpy as np
from ig_jax.data import sources
source = sources.open_tfds("ig_digits", "train", sys.argv[1])
print(source, zlib.crc32(source.gather(np.arange(len(source)))["image"].tobytes()))
"""
_DIE = """
import os, signal, sys
from ig_jax.data import digits, sources
generate = digits.IgDigits._generate_examples
def dying(self, *arrays):
    for count, example in enumerate(generate(self, *arrays)):
        if count == 700:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
digits.IgDigits._generate_examples = dying
sources.open_tfds("ig_digits", "train", sys.argv[1])
"""


def test_two_processes_prepare_once_after_a_third_was_killed(digits, tmp_path):
    killed = subprocess.run([sys.executable, "-c", _DIE, tmp_path], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "ig_digits").glob("incomplete*"))
    pair = [subprocess.Popen([sys.executable, "-c", _OPEN, tmp_path], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    first, second = (out.splitlines() for out, _ in answers)
    assert first[-1] == second[-1]
    assert sorted(len(lines) for lines in (first, second)) == [1, 2]  # one of them said "preparing"


def _prepared(tmp_path, name="ig_digits"):
    sources.open_tfds(name, "train", str(tmp_path))
    return next((tmp_path / name).glob("*.*.*"))


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = _prepared(tmp_path)
    shard = next(folder.glob("*train*"))
    whole = shard.read_bytes()
    content = bytearray(whole)
    content[len(content) // 3] ^= 4  # one bit in the middle of the compressed records
    shard.write_bytes(content)
    with _refused(str(folder), "delete"):
        source = sources.open_tfds("ig_digits", "train", str(tmp_path))
        _all(source)
    shard.write_bytes(whole[:2000])
    with _refused(str(folder), "delete"):
        sources.open_tfds("ig_digits", "train", str(tmp_path))
    shard.unlink()
    with _refused(shard.name, "delete"):
        sources.open_tfds("ig_digits", "train", str(tmp_path))
    (folder / "dataset_info.json").unlink()
    with _refused("half written", "delete"):
        sources.open_tfds("ig_digits", "test", str(tmp_path))


def test_names_splits_and_folders_that_cannot_work(digits, digits_dir, tmp_path):
    with _refused("'ig_digit'", "did you mean ig_digits"):
        sources.open_tfds("ig_digit", "train", digits_dir)
    with _refused("'ig_digits:7.0.0'", "version"):
        sources.open_tfds("ig_digits:7.0.0", "train", digits_dir)
    for split in ("trian", "train[", "train[:0]", ""):
        with _refused("split=", "'test', 'train'"):
            sources.open_tfds("ig_digits", split, digits_dir)
    (tmp_path / "file").write_text("")
    with _refused("ig_digits", "writable"):
        sources.open_tfds("ig_digits", "train", str(tmp_path / "file"))


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

    return type(name, (tfds.core.GeneratorBasedBuilder,), {
        "VERSION": tfds.core.Version("2.1.0"), "_info": info, "_generate_examples": generate,
        "_split_generators": lambda self, dl_manager: {"train": self._generate_examples()}})


def test_a_colour_data_set_of_png_images_is_read_by_name(tmp_path):
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), np.uint8)
    _define("IgTestColours", tfds.features.Image(shape=(6, 5, 3)),
            tfds.features.ClassLabel(names=["cat", "dog"]),
            [(image, row % 2) for row, image in enumerate(pixels)])
    source = sources.open_tfds("ig_test_colours", "train", str(tmp_path))
    assert repr(source) == "tfds:ig_test_colours:2.1.0:train[24]"
    assert source.class_names == ("cat", "dog") and source.image_shape == (6, 5, 3)
    images, labels = _all(source)
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, np.arange(24) % 2)


def test_data_sets_of_another_kind_are_refused(tmp_path):
    import tensorflow_datasets as tfds

    tensor, label = tfds.features.Tensor, tfds.features.ClassLabel(num_classes=2)
    grey = np.zeros((4, 4, 1), np.uint8)
    kinds = [
        ("IgTestFloats", tensor(shape=(4, 4, 1), dtype=np.float32), label, np.float32(grey), 0, "uint8"),
        ("IgTestVarying", tfds.features.Image(shape=(None, None, 1)), label, grey, 0, "fixed shape"),
        ("IgTestFlat", tensor(shape=(16,), dtype=np.uint8), label, grey.ravel(), 0, r"\(H, W, C\)"),
        ("IgTestNumbers", tensor(shape=(4, 4, 1), dtype=np.uint8), tensor(shape=(), dtype=np.int64), grey, 1,
         "ClassLabel"),
        ("IgTestUnlabelled", tensor(shape=(4, 4, 1), dtype=np.uint8), label, grey, -1, "label=-1"),
    ]
    for name, image, kind, pixels, value, needle in kinds:
        builder = _define(name, image, kind, [(pixels, value)] * 2)
        with _refused(builder.name, needle):
            sources.open_tfds(builder.name, "train", str(tmp_path))


def test_a_data_set_stored_as_tfrecord_says_what_to_do(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)
    label = tfds.features.ClassLabel(num_classes=2)
    builder = _define("IgTestStored", image, label, [(np.zeros((4, 4, 1), np.uint8), 0)] * 2)
    builder(data_dir=tmp_path).download_and_prepare(file_format="tfrecord")
    with _refused("ig_test_stored", "tfrecord", "data_dir"):
        sources.open_tfds("ig_test_stored", "train", str(tmp_path))


def test_a_failed_download_is_one_line_that_names_the_data_set(tmp_path, monkeypatch):
    def offline(builder):
        raise ConnectionError("Max retries exceeded\n(Failed to resolve 'example.org')")

    monkeypatch.setattr(sources, "_prepare", offline)
    with _refused("'mnist'", "Failed to resolve", "network", "data_dir"):
        sources.open_tfds("mnist", "train", str(tmp_path))


# IDX files


def _idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx(tmp_path):
    """A folder of four IDX files: 30 train and 10 test images of 7x5 pixels, labels 0..3."""
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 30), ("test", 10)):
        pair = rng.integers(0, 256, (count, 7, 5), np.uint8), np.arange(count, dtype=np.uint8) % 4
        for name, array in zip(sources.IDX_FILES[split], pair, strict=True):
            (tmp_path / name).write_bytes(gzip.compress(_idx(array), mtime=0))
        arrays[split] = pair
    return tmp_path, arrays


def test_idx_files_come_back_as_they_were_written(idx):
    folder, arrays = idx
    for split, (images, labels) in arrays.items():
        source = sources.open_idx(str(folder), split)
        found, kinds = _all(source)
        np.testing.assert_array_equal(found[..., 0], images)
        np.testing.assert_array_equal(kinds, labels)
        assert found.dtype == np.uint8 and kinds.dtype == np.int32
        assert source.image_shape == (7, 5, 1) and source.num_classes == 4
        assert source[3]["image"].shape == (7, 5, 1)
    assert repr(sources.open_idx(str(folder), "test")) != repr(sources.open_idx(str(folder), "train"))


def test_idx_identity_follows_the_content_not_the_folder(idx, tmp_path_factory):
    folder, arrays = idx
    identity = repr(sources.open_idx(str(folder), "train"))
    moved = tmp_path_factory.mktemp("elsewhere")
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert repr(sources.open_idx(str(moved), "train")) == identity
    images = arrays["train"][0].copy()
    images[4, 2, 1] ^= 1
    (moved / sources.IDX_FILES["train"][0]).write_bytes(gzip.compress(_idx(images)))
    assert repr(sources.open_idx(str(moved), "train")) != identity


def _size(count, content=b""):
    """An uncompressed images file that announces `count` images of 7x5."""
    return bytes([0, 0, 8, 3]) + struct.pack(">3I", count, 7, 5) + content


@pytest.mark.parametrize("damage, needle", [
    (lambda good: good[: len(good) // 2], "cannot be read"),
    (lambda good: good[:-6], "cannot be read"),
    (lambda good: good[:-8] + bytes(8), "cannot be read"),  # wrong gzip checksum
    (lambda good: b"", "starts with ''"),
    (lambda good: b"not gzip at all", "cannot be read"),
    (lambda good: gzip.compress(b"\0\0\x08"), "starts with"),
    (lambda good: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(good)[4:]), "starts with"),
    (lambda good: gzip.compress(b"\0\0\x08\x01" + gzip.decompress(good)[4:]), "starts with"),
    (lambda good: gzip.compress(_size(30, bytes(1049))), "announces 1050 bytes of data and holds only 1049"),
    (lambda good: gzip.compress(_size(30, bytes(1051))), "announces 1050 bytes of data and holds more"),
    (lambda good: gzip.compress(_size(30, bytes(5_000_000))), "holds more"),  # a small file that swells
    (lambda good: gzip.compress(_size(2**32 - 1, bytes(35))), "announces sizes"),
    (lambda good: gzip.compress(_size(0)), "announces sizes"),
    (lambda good: gzip.compress(_size(29, bytes(29 * 35))), "29 images"),
])
def test_idx_damage_is_refused_naming_the_file(idx, damage, needle):
    folder, _ = idx
    file = folder / sources.IDX_FILES["train"][0]
    file.write_bytes(damage(file.read_bytes()))
    with _refused(str(file), needle):
        sources.open_idx(str(folder), "train")
    sources.open_idx(str(folder), "test")  # the other split is whole


def test_idx_missing_files_and_other_splits_are_refused(idx):
    folder, _ = idx
    with _refused("split='valid'", "'test', 'train'"):
        sources.open_idx(str(folder), "valid")
    for names in sources.IDX_FILES.values():
        (folder / names[1]).rename(folder / "away")
        with _refused(names[1], "missing"):
            sources.open_idx(str(folder), "train")
        (folder / "away").rename(folder / names[1])
