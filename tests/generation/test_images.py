"""Pictures are laid out pixel for pixel, and a file has its final name only when it is whole."""

import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ig_jax.errors import UserError
from ig_jax.generation import images


def noise(count, height=8, width=8, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_enlarged_images_row_by_row(channels):
    batch = noise(5, 4, 6, channels)
    picture = images.grid(batch, columns=3, zoom=2, gap=1)
    assert picture.shape == (2 * 8 + 1, 3 * 12 + 2, 3) and picture.dtype == np.uint8
    for i, image in enumerate(batch):
        row, column = divmod(i, 3)
        cell = picture[row * 9:row * 9 + 8, column * 13:column * 13 + 12]
        enlarged = np.kron(np.broadcast_to(image, (4, 6, 3)), np.ones((2, 2, 1), np.uint8))
        np.testing.assert_array_equal(cell, enlarged)
    assert (picture[8] == 255).all() and (picture[:, 12] == 255).all()  # separators
    assert (picture[9:, 26:] == 255).all()  # the place left over


def test_grid_without_gap_is_only_the_images():
    batch = noise(2, 2, 2, 3)
    np.testing.assert_array_equal(images.grid(batch, columns=8, gap=0), np.concatenate(batch, axis=1))


@pytest.mark.parametrize("bad, name", [
    (dict(images=np.zeros((1, 8, 8, 1), np.float32), columns=1), "images.dtype"),
    (dict(images=np.zeros((8, 8, 1), np.uint8), columns=1), "images.shape"),
    (dict(images=np.zeros((1, 8, 8, 4), np.uint8), columns=1), "images.shape"),
    (dict(images=np.zeros((0, 8, 8, 1), np.uint8), columns=1), "images.shape"),
    (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=0), "columns"),
    (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=1, zoom=0), "zoom"),
    (dict(images=np.zeros((1, 8, 8, 1), np.uint8), columns=1, gap=-1), "gap"),
])
def test_grid_names_what_is_wrong(bad, name):
    with pytest.raises(UserError, match=name):
        images.grid(bad.pop("images"), **bad)


def find(picture, block):
    """Places (top, left) where the block occurs in the picture."""
    height, width = block.shape[:2]
    corners = (picture == block[0, 0]).all(-1) & (np.roll(picture, 1 - width, 1) == block[0, -1]).all(-1)
    return [[top, left] for top, left in np.argwhere(corners).tolist()
            if np.array_equal(picture[top:top + height, left:left + width], block)]


def test_comparison_puts_the_same_index_in_the_same_place_of_every_panel():
    panels = {"none": noise(4, seed=1), "IG + CFG\nw = 2, s = 1.25": noise(4, seed=2)}
    picture = images.comparison(panels, row_labels=["0", "1"], zoom=5, caption="Heun, 25 intervals")
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    places = {title: [find(picture, images.grid(image[None], columns=1, zoom=5)) for image in batch]
              for title, batch in panels.items()}
    assert all(len(found) == 1 for batch in places.values() for found in batch)
    first, second = (np.array(places[title])[:, 0] for title in panels)
    assert len(set((second - first)[:, 0])) == 1 and (second - first)[0, 0] == 0  # same heights
    assert len(set((second - first)[:, 1])) == 1 and (second - first)[0, 1] > 2 * 40  # one step to the right
    (top, left), right, below = first[0], first[1], first[2]
    assert right[0] == top and right[1] > left and below[1] == left and below[0] > top  # row-major
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()


def test_comparison_draws_titles_labels_and_caption():
    panels = {"A": noise(2), "B": noise(2)}
    drawn = images.comparison(panels, row_labels=["0", "1"], zoom=6, caption="seed 0")
    top, left = find(drawn, images.grid(panels["A"][:1], columns=1, zoom=6))[0]
    assert (drawn[:top, left:] < 128).any()  # a title above the images
    for row in range(2):
        beside = drawn[top + row * 54:top + row * 54 + 48, :left]
        assert (beside < 160).any()  # a label left of each row
    assert (drawn[top + 110:, left:] < 160).any()  # the caption below
    panels = {"A": panels["A"], "C": panels["B"]}
    other = images.comparison(panels, row_labels=["0", "1"], zoom=6, caption="seed 0")
    assert other.shape == drawn.shape and (other != drawn).any()


def test_comparison_chooses_a_comfortable_zoom():
    for pixels, zoom in ((8, 6), (16, 3), (32, 2), (256, 1)):
        batch = noise(1, pixels, pixels)
        picture = images.comparison({"none": batch}, row_labels=["0"])
        assert len(find(picture, images.grid(batch, columns=1, zoom=zoom))) == 1


def test_comparison_gives_a_long_title_room():
    narrow = images.comparison({"A": noise(1), "B": noise(1)}, row_labels=["0"])
    wide = images.comparison({"A": noise(1), "B" * 40: noise(1)}, row_labels=["0"])
    assert wide.shape[1] > narrow.shape[1] + 300
    assert (wide[:, -10:] == 255).all()


def test_comparison_refuses_panels_that_do_not_match():
    with pytest.raises(UserError, match="panels"):
        images.comparison({}, row_labels=["0"])
    with pytest.raises(UserError, match=r"panels\['IG'\].shape"):
        images.comparison({"none": noise(2), "IG": noise(3)}, row_labels=["0"])
    with pytest.raises(UserError, match="row_labels"):
        images.comparison({"none": noise(3)}, row_labels=["0", "1"])


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_png_reads_back_to_the_byte(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images.write_png(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), image[..., 0] if shape[-1] == 1 else image)
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_png_refuses_what_is_not_an_image(tmp_path):
    with pytest.raises(UserError, match="image.dtype"):
        images.write_png(tmp_path / "a.png", np.zeros((4, 4), np.float32))
    with pytest.raises(UserError, match="image.shape"):
        images.write_png(tmp_path / "a.png", np.zeros((4, 4, 2), np.uint8))
    assert not os.listdir(tmp_path)


def test_npz_has_the_layout_of_fid_tools(tmp_path):
    batch, labels = noise(7, channels=3), np.arange(7, dtype=np.int32)
    images.write_npz(tmp_path / "samples.npz", batch, labels)
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(stored["arr_0"], batch)
        np.testing.assert_array_equal(stored["arr_1"], labels)
        assert stored["arr_0"].dtype == np.uint8 and stored["arr_1"].dtype == np.int64


def test_npz_takes_no_second_copy_of_the_images(tmp_path):
    batch = np.zeros((1500, 128, 128, 3), np.uint8)  # 74 MB
    tracemalloc.start()
    try:
        images.write_npz(tmp_path / "samples.npz", batch, np.zeros(1500, np.int32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < batch.nbytes / 1.5, peak


@pytest.mark.parametrize("shape, dtype", [(2, np.int32), (3, np.float32), ((3, 1), np.int32)])
def test_npz_refuses_labels_that_do_not_match(tmp_path, shape, dtype):
    with pytest.raises(UserError, match="labels"):
        images.write_npz(tmp_path / "samples.npz", noise(3), np.zeros(shape, dtype))
    assert not os.listdir(tmp_path)


def test_unwritable_path_is_one_line_with_the_path_and_the_mend(tmp_path):
    (tmp_path / "file").write_bytes(b"not a folder")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(UserError) as caught:
            images.write_png(path, np.zeros((2, 2), np.uint8))
        assert str(path) in str(caught.value) and "name a folder" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
