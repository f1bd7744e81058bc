"""Search for images in pictures."""

import numpy as np


def find(picture, block):
    """Places (top, left) where the block occurs in the picture."""
    height, width = block.shape[:2]
    corners = (picture == block[0, 0]).all(-1) & (np.roll(picture, 1 - width, 1) == block[0, -1]).all(-1)
    return [
        [top, left]
        for top, left in np.argwhere(corners).tolist()
        if np.array_equal(picture[top : top + height, left : left + width], block)
    ]
