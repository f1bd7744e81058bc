"""IDX files as they were written, under each spelling, and damaged ones."""

import gzip
import struct

import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.data.formats import idx as format_idx


def _all(source):
    """Every image and label of a source."""
    batch = source.gather(np.arange(len(source)))
    return batch["image"], batch["label"]


def open_idx(folder, split):
    """The source of the files in `folder`."""
    return format_idx.open_idx(toy.data_config("idx", folder=folder), split)


def _idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx(tmp_path):
    """A folder of four IDX files: 30 train and 10 test images of 7x5 pixels, labels 0..3."""
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 30), ("test", 10)):
        pair = rng.integers(0, 256, (count, 7, 5), np.uint8), np.arange(count, dtype=np.uint8) % 4
        for name, array in zip(format_idx.IDX_FILES[split], pair, strict=True):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(_idx(array), mtime=0))
        arrays[split] = pair
    return tmp_path, arrays


def test_idx_files_come_back_as_they_were_written(idx):
    folder, arrays = idx
    for split, (images, labels) in arrays.items():
        source = open_idx(str(folder), split)
        found, kinds = _all(source)
        np.testing.assert_array_equal(found[..., 0], images)
        np.testing.assert_array_equal(kinds, labels)
        assert found.dtype == np.uint8 and kinds.dtype == np.int32
        assert source.spec.latent_shape == (7, 5, 1) and source.spec.num_classes == 4
    assert repr(open_idx(str(folder), "test")) != repr(open_idx(str(folder), "train"))


def test_idx_identity_follows_the_content_not_the_folder(idx, tmp_path_factory):
    folder, arrays = idx
    identity = repr(open_idx(str(folder), "train"))
    moved = tmp_path_factory.mktemp("elsewhere")
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert repr(open_idx(str(moved), "train")) == identity
    images = arrays["train"][0].copy()
    images[4, 2, 1] ^= 1
    (moved / f"{format_idx.IDX_FILES['train'][0]}.gz").write_bytes(gzip.compress(_idx(images)))
    assert repr(open_idx(str(moved), "train")) != identity


def _size(count, content=b""):
    """An uncompressed images file that announces `count` images of 7x5."""
    return bytes([0, 0, 8, 3]) + struct.pack(">3I", count, 7, 5) + content


@pytest.mark.parametrize(
    "damage, needle",
    [
        (lambda good: good[: len(good) // 2], "cannot be read"),
        (lambda good: good[:-6], "cannot be read"),
        (lambda good: good[:-8] + bytes(8), "cannot be read"),  # wrong gzip checksum
        (lambda good: b"", "starts with ''"),
        (lambda good: b"not gzip at all", "starts with '6e6f7420'"),
        (lambda good: gzip.compress(b"\0\0\x08"), "starts with"),
        (lambda good: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(good)[4:]), "starts with"),
        (lambda good: gzip.compress(b"\0\0\x08\x01" + gzip.decompress(good)[4:]), "starts with"),
        (lambda good: gzip.compress(_size(30, bytes(1049))), "announces 1050 bytes of data and holds only 1049"),
        (lambda good: gzip.compress(_size(30, bytes(1051))), "announces 1050 bytes of data and holds more"),
        (
            lambda good: gzip.compress(_size(30, bytes(5_000_000))),
            "holds more",
        ),  # a small file that unpacks to a large one
        (lambda good: gzip.compress(_size(2**32 - 1, bytes(35))), "announces sizes"),
        (lambda good: gzip.compress(_size(0)), "announces sizes"),
        (lambda good: gzip.compress(_size(29, bytes(29 * 35))), "29 images"),
    ],
)
def test_idx_damage_is_refused_naming_the_file(idx, damage, needle):
    folder, _ = idx
    file = folder / f"{format_idx.IDX_FILES['train'][0]}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with refused(str(file), says=needle):
        open_idx(str(folder), "train")
    open_idx(str(folder), "test")  # the other split is whole


def test_idx_missing_files_and_other_splits_are_refused(idx):
    folder, _ = idx
    with refused("split", "valid", expected="'test', 'train'"):
        open_idx(str(folder), "valid")
    for names in format_idx.IDX_FILES.values():
        file = folder / f"{names[1]}.gz"
        file.rename(folder / "away")
        with refused(str(file), fix="with .gz or without", says="missing"):
            open_idx(str(folder), "train")
        (folder / "away").rename(file)


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("packed, suffix", [(True, ".gz"), (True, ""), (False, ""), (False, ".gz")])
def test_idx_files_are_found_under_each_spelling_compressed_or_not(idx, dot, packed, suffix):
    """The first bytes say whether a file is compressed: a browser may unpack it and keep its name."""
    folder, arrays = idx
    identity = repr(open_idx(str(folder), "train"))
    for file in sorted(folder.glob("*.gz")):
        content = file.read_bytes()
        file.unlink()
        name = file.name.removesuffix(".gz").replace("-idx", ".idx" if dot else "-idx") + suffix
        (folder / name).write_bytes(content if packed else gzip.decompress(content))
    source = open_idx(str(folder), "train")
    assert repr(source) == identity
    np.testing.assert_array_equal(_all(source)[0][..., 0], arrays["train"][0])
