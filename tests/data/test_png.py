"""PNG files, read back by another program."""

import io

import numpy as np
import pytest

from fastgen.data import png

from ..backends import import_peer


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 3)])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_png_is_read_back_by_another_program(size, channels):
    image = import_peer("matplotlib.image")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, *channels), dtype=np.uint8)
    read = (image.imread(io.BytesIO(png(pixels))) * 255).round().astype(np.uint8)
    assert read.ndim == (3 if channels == (3,) else 2)  # grey stays grey
    assert np.array_equal(read, pixels.reshape(read.shape))


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[H, W\], \[H, W, 1\] or \[H, W, 3\], got"):
        png(pixels)
