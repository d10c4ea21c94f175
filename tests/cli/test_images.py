"""Images as pictures: levels and the grid."""

import numpy as np
import pytest
import torch

from fastgen.cli._images import GAP, LEGIBLE, grid, to_pixels


def test_pixels():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(5, 1, 2, 2)
    pixels = to_pixels(images)
    assert pixels.shape == (5, 2, 2, 3) and pixels[0, :, :, 0].tolist() == [[0, 0], [128, 255]]
    assert to_pixels(images, ink=True)[0, :, :, 2].tolist() == [[255, 255], [128, 0]]
    assert to_pixels(images.expand(5, 2, 2, 2))[0, 1, 1].tolist() == [255, 255, 0]
    assert to_pixels(images.expand(5, 3, 2, 2), ink=True)[0, 1, 1].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="1, 2 or 3 channels to be drawn, got 4"):
        to_pixels(images.expand(5, 4, 2, 2))


def test_grid_shows_every_image_large_enough_to_see():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 10, 3), 40, dtype=np.uint8)
    picture = grid(pixels)
    gap, height, width = 2, LEGIBLE, 80
    assert picture.shape == (2 * (height + gap) + gap, 3 * (width + gap) + gap, 3)
    for k in range(6):
        top, left = gap + k // 3 * (height + gap), gap + k % 3 * (width + gap)
        assert (picture[top : top + height, left : left + width] == (40 * k if k < 5 else GAP)).all()
    assert (picture[:gap] == GAP).all() and (picture[:, -gap:] == GAP).all()
    assert grid(np.zeros((1, 300, 200, 3), dtype=np.uint8)).shape == (302, 202, 3)  # large ones stay as they are
