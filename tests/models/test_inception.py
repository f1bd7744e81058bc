"""The FID network against features of hashed weights that PyTorch and ADM's evaluator agree on."""

import inception_files as files
import jax
import numpy as np
import pytest
from refusal import refused

from ig_jax.models import inception

GOLDEN = np.load(files.GOLDEN / "inception.npz")


@pytest.fixture(scope="module")
def features():
    return jax.jit(inception.forward)(files.params(), GOLDEN["32x32/images"])


@pytest.mark.parametrize("name, stored", [("pool", "pool"), ("spatial", "spatial"), ("logits", "logits_nobias")])
def test_features_are_those_of_the_published_network(features, name, stored):
    """A right float32 network is within 3e-5; half a pixel, Mixed_6e, a bias or another pool are 0.1 away and more."""
    np.testing.assert_allclose(getattr(features, name), GOLDEN[f"32x32/{stored}"], atol=3e-5, rtol=0)


def test_the_resize_is_tensorflows_to_the_bit():
    rows = [0, 1, 150, 297, 298]
    resized = np.asarray(inception.resize(GOLDEN["64x64/images"]))[0]
    np.testing.assert_array_equal(resized[rows], GOLDEN["64x64/resized_tf1_rows"])
    np.testing.assert_array_equal(resized[:, rows], GOLDEN["64x64/resized_tf1_cols"])


def test_grey_images_are_three_equal_channels():
    grey = GOLDEN["64x64/images"][..., :1]
    np.testing.assert_array_equal(inception.resize(grey), inception.resize(np.repeat(grey, 3, -1)))
    with refused("images.shape", (2, 64, 64, 4), expected="(B, H, W, 3)"):
        inception.resize(np.zeros((2, 64, 64, 4)))


def test_averages_divide_by_the_pixels_inside_the_image():
    ones = np.ones((1, 5, 4, 2), np.float32)
    np.testing.assert_allclose(inception._average(ones), ones, rtol=1e-6)
