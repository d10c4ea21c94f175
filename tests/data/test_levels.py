"""Levels of images in [-1, 1] and in [0, 1)."""

import torch

from fastgen.data import from_unit_interval, load_digits, to_levels

from ..backends import import_peer


def test_every_level_there_and_back():
    for k in (2, 17, 256):
        images = torch.arange(k) * 2 / (k - 1) - 1
        levels = to_levels(images, k)
        assert levels.dtype == torch.int64 and levels.tolist() == list(range(k))
        for share in (0.0, 0.3, 0.999):
            assert torch.equal(to_levels(from_unit_interval((levels + share) / k, k), k), levels)


def test_beyond_the_ends():
    assert from_unit_interval(torch.tensor([-3.0, -1e-6, 1.0, 8.0]), 17).tolist() == [-1, -1, 1, 1]


def test_digits_have_seventeen():
    import_peer("sklearn")
    images = load_digits().images
    levels = to_levels(images, 17)
    assert levels.min() == 0 and levels.max() == 16 and torch.equal(levels / 8 - 1, images)
