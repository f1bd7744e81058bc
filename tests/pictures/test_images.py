"""Grids laid out pixel for pixel, and files that have their final names only when they are complete."""

import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from ig_jax.pictures import images


def noise(count, height=8, width=8, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_enlarged_images_row_by_row(channels):
    batch = noise(5, 4, 6, channels)
    picture = images.grid(batch, columns=3, zoom=2, gap=1)
    assert picture.shape == (2 * 8 + 1, 3 * 12 + 2, 3) and picture.dtype == np.uint8
    for i, image in enumerate(batch):
        row, column = divmod(i, 3)
        cell = picture[row * 9 : row * 9 + 8, column * 13 : column * 13 + 12]
        enlarged = np.kron(np.broadcast_to(image, (4, 6, 3)), np.ones((2, 2, 1), np.uint8))
        np.testing.assert_array_equal(cell, enlarged)
    assert (picture[8] == 255).all() and (picture[:, 12] == 255).all()  # separators
    assert (picture[9:, 26:] == 255).all()  # the place left over


def test_grid_without_gap_is_only_the_images():
    batch = noise(2, 2, 2, 3)
    np.testing.assert_array_equal(images.grid(batch, columns=8, gap=0), np.concatenate(batch, axis=1))


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(images=np.zeros((1, 8, 8, 1), np.float32), columns=1), "images.dtype"),
        (dict(images=np.zeros((8, 8, 1), np.uint8), columns=1), "images.shape"),
        (dict(images=np.zeros((1, 8, 8, 5), np.uint8), columns=1), "images.shape"),
        (dict(images=np.zeros((0, 8, 8, 1), np.uint8), columns=1), "images.shape"),
        (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=0), "columns"),
        (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=1, zoom=0), "zoom"),
        (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=1, gap=-1), "gap"),
    ],
)
def test_grid_names_what_is_wrong(bad, name):
    with refused(name):
        images.grid(bad.pop("images"), **bad)


def test_grid_shows_transparent_images_on_white():
    grey, alpha = np.full((1, 2, 2, 1), 100, np.uint8), np.array([255, 0], np.uint8)
    batch = np.concatenate([np.concatenate([grey, np.full_like(grey, a)], -1) for a in alpha])
    np.testing.assert_array_equal(images.grid(batch, columns=2, gap=0)[0, :, 0], [100, 100, 255, 255])
    colour = np.concatenate([np.full((1, 1, 1, 3), 0, np.uint8), np.full((1, 1, 1, 1), 51, np.uint8)], -1)
    np.testing.assert_array_equal(images.grid(colour, columns=1)[0, 0], [204] * 3)  # black at a fifth


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_reads_back_bitwise_identical(tmp_path, channels, mode):
    shape = (4, 6, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images.write_png(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as stored:
        assert stored.mode == mode
        np.testing.assert_array_equal(np.asarray(stored), image[..., 0] if channels == 1 else image)
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_png_refuses_what_is_not_an_image(tmp_path):
    with refused("image.dtype", "float32", expected="uint8"):
        images.write_png(tmp_path / "a.png", np.zeros((4, 4, 1), np.float32))
    for shape in ((4, 4, 5), (4, 4)):
        with refused("image.shape", shape):
            images.write_png(tmp_path / "a.png", np.zeros(shape, np.uint8))
    assert not os.listdir(tmp_path)


def test_npz_has_the_layout_of_fid_tools(tmp_path):
    batch, labels = noise(7, channels=3), np.arange(7, dtype=np.int32)
    images.write_npz(tmp_path / "samples.npz", batch, labels)
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(stored["arr_0"], batch)
        np.testing.assert_array_equal(stored["arr_1"], labels)
        assert stored["arr_0"].dtype == np.uint8 and stored["arr_1"].dtype == np.int64


def test_npz_takes_images_one_by_one_and_refuses_another_shape(tmp_path):
    batch, labels = noise(5), np.arange(5)
    images.write_npz(tmp_path / "all.npz", batch, labels)
    images.write_npz(tmp_path / "each.npz", (image for image in batch), labels)
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "each.npz").read_bytes()
    np.testing.assert_array_equal(list(images.read_npz(tmp_path / "all.npz")), batch.repeat(3, -1))
    for name, bad in (("image.shape", noise(1, 4)[0]), ("image.dtype", batch[0] / 255)):
        with refused(name):
            images.write_npz(tmp_path / "bad.npz", [*batch[1:], bad], labels)
    assert sorted(os.listdir(tmp_path)) == ["all.npz", "each.npz"]


def test_npz_takes_no_second_copy_of_the_images(tmp_path):
    batch = np.zeros((1500, 128, 128, 3), np.uint8)  # 74 MB
    tracemalloc.start()
    try:
        images.write_npz(tmp_path / "samples.npz", batch, np.zeros(1500, np.int32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < batch.nbytes / 1.5, peak


@pytest.mark.parametrize(
    "shape, dtype", [(2, np.int32), (4, np.int32), (0, np.int32), (3, np.float32), ((3, 1), np.int32)]
)
def test_npz_refuses_labels_that_do_not_match(tmp_path, shape, dtype):
    with refused("labels"):
        images.write_npz(tmp_path / "samples.npz", noise(3), np.zeros(shape, dtype))
    assert not os.listdir(tmp_path)


def test_an_unwritable_path_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"not a folder")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with refused("path", str(path), fix="name a folder", says="cannot write"):
            images.write_png(path, np.zeros((2, 2, 1), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
