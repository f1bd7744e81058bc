"""Figures: images pixel for pixel, room for every word, and no setting of the machine that matters."""

import matplotlib
import numpy as np
import pytest
from search import find

from ig_jax.pictures import images, plots


def noise(count, height=8, width=8, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def picture_of(*args, **kwargs):
    return plots.table(*args, **kwargs).page.pixels()


def white_border(picture):
    return (np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]) == 255).all()


def test_the_same_index_has_the_same_place_in_every_cell():
    panels = [noise(4, seed=1), noise(4, seed=2)]
    cells = [[panel[:2] for panel in panels], [panel[2:] for panel in panels]]
    picture = picture_of(
        cells, columns=["no guidance", "IG + CFG\nw = 2, s = 1.25"], rows=["0", "1"], across=2, caption="heun, 25 steps"
    )
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3 and white_border(picture)
    places = [[find(picture, images.grid(image[None], columns=1, zoom=6)) for image in panel] for panel in panels]
    assert all(len(found) == 1 for panel in places for found in panel)
    first, second = (np.array(panel)[:, 0] for panel in places)
    assert len(set((second - first)[:, 0])) == 1 and (second - first)[0, 0] == 0  # same heights
    assert len(set((second - first)[:, 1])) == 1 and (second - first)[0, 1] > 2 * 48  # one step to the right
    (top, left), right, below = first[0], first[1], first[2]
    assert right[0] == top and right[1] > left and below[1] == left and below[0] > top  # row-major


def test_titles_labels_and_captions_are_drawn():
    cells = [[noise(1), noise(1)], [noise(1), noise(1)]]
    drawn = plots.table(cells, columns=["A", "B"], rows=["0", "1"], caption="seed 0")
    picture = drawn.page.pixels()
    left = find(picture, images.grid(cells[0][0], columns=1, zoom=6))[0][1]
    assert (picture[: drawn.top, left:] < 128).any()  # a title above the images
    for top, _ in sorted(find(picture, images.grid(cells[0][0], columns=1, zoom=6))):
        assert (picture[top : top + 48, :left] < 160).any()  # a label left of each row
    assert (picture[drawn.bottom :, left:] < 160).any()  # the caption below
    other = picture_of(cells, columns=["A", "C"], rows=["0", "1"], caption="seed 0")
    assert other.shape == picture.shape and (other != picture).any()


@pytest.mark.parametrize("pixels, zoom", [(8, 6), (16, 3), (32, 2), (256, 1)])
def test_small_images_are_enlarged(pixels, zoom):
    batch = noise(1, pixels, pixels)
    picture = picture_of([[batch]], columns=["A"], rows=["0"])
    assert len(find(picture, images.grid(batch, columns=1, zoom=zoom))) == 1


def test_long_titles_and_captions_have_room():
    cells = [[noise(1), noise(1)]]
    narrow = picture_of(cells, columns=["A", "B"], rows=["0"], caption="seed 0")
    wide = picture_of(cells, columns=["A", "B" * 40], rows=["0"], caption="seed 0")
    assert wide.shape[1] > narrow.shape[1] + 300
    long = picture_of(cells, columns=["A", "B"], rows=["0"], caption="heun, 25 steps, seed 0 " * 5)
    # Broken into lines, at the width of the table or at the least that is easy to read.
    assert long.shape[1] <= max(narrow.shape[1], plots.NARROWEST + 90) and long.shape[0] > narrow.shape[0] + 40
    assert all(white_border(picture) for picture in (narrow, wide, long))


def test_a_name_is_text_and_not_a_formula():
    picture = picture_of([[noise(1)]], columns=["A"], rows=["$1 and $2"])
    assert picture.shape[1] > 48 + plots.text_width("$1 and $2", 18)


@pytest.mark.parametrize("count, lines", [(5, 1), (12, 2), (24, 4)])
def test_a_wide_table_breaks_the_rows_of_its_cells(count, lines):
    """Into lines of equal length, so that the picture is at most 1,600 pixels wide."""
    cells = [[noise(count, seed=seed) for seed in range(4)]]
    picture = picture_of(cells, columns=["A", "B", "C", "D"], rows=["0"], across=count)
    assert picture.shape[1] <= plots.WIDEST == 1600
    for cell in cells[0]:
        block = images.grid(cell, columns=count // lines, zoom=6, gap=6)
        assert block.shape[0] == lines * 54 - 6 and len(find(picture, block)) == 1


def test_a_number_stands_under_each_cell():
    cells = [[noise(2, seed=1), noise(2, seed=2)], [noise(2, seed=3), noise(2, seed=4)]]
    given = dict(columns=["A", "B"], rows=["0", "1"], across=2)
    plain, noted = picture_of(cells, **given), picture_of(cells, **given, notes=[["0 %", "1 %"], ["2 %", "3 %"]])
    for cell in (cell for row in cells for cell in row):
        block = images.grid(cell, columns=2, zoom=6, gap=6)
        (top, left), height, width = find(noted, block)[0], *block.shape[:2]
        under = slice(top + height + 2, top + height + 24), slice(left, left + width)
        assert (noted[under] < 200).any() and len(find(plain, block)) == 1


@pytest.mark.parametrize("count", [1, 40])
def test_a_sheet_has_a_margin_and_a_caption(count):
    batch = noise(count)
    picture = plots.sheet(batch, columns=8, caption="digits, step 1, EMA 0.99; heun, 25 steps, seed 0; IG 2")
    block = images.grid(batch, columns=8, zoom=6)
    ((top, left),) = find(picture, block)
    height, width = block.shape[:2]
    assert top == left == 18 and picture.shape[1] >= width + 36
    assert (picture[:18] == 255).all() and (picture[:, :18] == 255).all() and (picture[:, -18:] == 255).all()
    assert (picture[top + height + 4 :] < 160).any()
    assert white_border(picture)


def test_pictures_one_above_the_other_keep_their_pixels():
    upper, lower = images.grid(noise(2), columns=2), images.grid(noise(1, seed=1), columns=1)
    both = plots.stacked([upper, lower])
    np.testing.assert_array_equal(both[: len(upper)], upper)
    np.testing.assert_array_equal(both[len(upper) :, : lower.shape[1]], lower)
    assert (both[len(upper) :, lower.shape[1] :] == 255).all()


@pytest.mark.parametrize("decoded", [True, False])
def test_a_gap_has_its_images_heat_maps_colour_bar_and_curve(decoded):
    rng = np.random.default_rng(0)
    final = np.stack([noise(2, 16, 16, 3, seed) for seed in range(3)])
    difference = rng.random((3, 2, 8, 8))
    picture = plots.gap(
        final if decoded else None,
        difference,
        difference.mean((2, 3)),
        np.array([1.0, 0.5, 0.1]),
        names=["cat", "dog"],
        caption="seed 0",
    )
    assert white_border(picture)
    for image in final.reshape(-1, 16, 16, 3):
        assert len(find(picture, images.grid(image[None], columns=1, zoom=3))) == decoded
    side, factor = 48, 6
    heat = plots.HEAT(difference / difference.max(), bytes=True)[..., :3].reshape(-1, 8, 8, 3)
    places = [find(picture, images.grid(one[None], columns=1, zoom=factor)) for one in heat]
    assert all(len(found) == 1 for found in places)
    below = picture[max(found[0][0] for found in places) + side :]
    assert (np.abs(below.astype(int) - (31, 95, 191)).max(-1) < 10).any()  # the blue curve
    bar = picture[:, max(found[0][1] for found in places) + side + 2 :]
    assert (np.abs(bar.astype(int) - plots.HEAT(1.0, bytes=True)[:3]).max(-1) < 30).any()


def test_heads_that_agree_have_a_picture():
    zero = np.zeros((2, 1, 8, 8))
    assert white_border(plots.gap(None, zero, zero.mean((2, 3)), np.array([1.0, 0.5]), names=["0"]))


def test_a_figure_depends_on_no_setting_and_leaves_none_behind():
    before = dict(matplotlib.rcParams)
    first = picture_of([[noise(1)]], columns=["A"], rows=["0"])
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.family": "serif", "font.size": 40, "figure.dpi": 30, "savefig.dpi": 30}):
        np.testing.assert_array_equal(first, picture_of([[noise(1)]], columns=["A"], rows=["0"]))
