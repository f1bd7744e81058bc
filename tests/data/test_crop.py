"""The centre crop against the bytes that five published copies of it gave."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ig_jax.data import crop

PHOTOGRAPHS = Path(__file__).parents[1] / "golden" / "photographs"
EXPECTED = json.loads((PHOTOGRAPHS / "crops.json").read_text())
WRONG = json.loads((PHOTOGRAPHS / "wrong_crops_256.json").read_text())


@pytest.mark.parametrize("name", EXPECTED["files"])
def test_crops_are_the_published_bytes(name):
    """Photographs of many sizes; among them grey, CMYK, a PNG under a .JPEG name and an EXIF orientation."""
    data = (PHOTOGRAPHS / "train" / name).read_bytes()
    for size, expected in EXPECTED["files"][name]["crop_sha256"].items():
        pixels = crop.decode(data, int(size))
        assert pixels.shape == (int(size), int(size), 3) and pixels.dtype == np.uint8
        found = hashlib.sha256(pixels.tobytes()).hexdigest()
        assert found == expected, {mistake for mistake, value in WRONG[name].items() if value == found}


def test_grey_and_transparent_images():
    image = Image.new("RGBA", (40, 30), (200, 100, 50, 0))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    np.testing.assert_array_equal(crop.decode(encoded.getvalue(), 8)[0, 0], [200, 100, 50])  # alpha is dropped
    grey = crop.decode(encoded.getvalue(), 8, 1)
    assert grey.shape == (8, 8, 1) and (grey == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("n01440764/n01440764_1.JPEG", "truncated"),
        ("n01440764/n01440764_2.JPEG", "empty"),
        ("n02447366/n02447366_3.JPEG", "not an image"),
    ],
)
def test_what_cannot_be_decoded_is_said(name, reason):
    with pytest.raises(ValueError, match=reason):
        crop.decode((PHOTOGRAPHS / "broken" / name).read_bytes(), 64)
