"""`Upsample` and `Downsample` against diffusers."""

import pytest
import torch

from fastgen.nn import Downsample, Upsample

from ..backends import import_peer
from ..modules import copy_parameters, max_difference, randomize


@pytest.mark.parametrize(("use_conv", "out_channels"), [(False, None), (True, None), (True, 12)])
@pytest.mark.parametrize(("cls", "shape"), [(Upsample, (12, 16)), (Downsample, (3, 4))])
def test_is_diffusers(cls, shape, use_conv, out_channels):
    resnet = import_peer("diffusers.models.resnet")
    ours = randomize(cls(8, out_channels, use_conv=use_conv))
    theirs = getattr(resnet, f"{cls.__name__}2D")(8, use_conv=use_conv, out_channels=out_channels)
    if use_conv:
        copy_parameters(ours.conv, theirs.conv)
    x = torch.randn(2, 8, 6, 8, generator=torch.Generator().manual_seed(1))
    assert ours(x).shape == (2, out_channels or 8, *shape)
    assert max_difference(ours(x), theirs(x)) <= 1e-6
    assert f"use_conv={use_conv}" in repr(ours)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_downsampling_without_padding_before(size):
    resnet = import_peer("diffusers.models.resnet")
    ours = randomize(Downsample(8, 12, padding=0))
    theirs = resnet.Downsample2D(8, use_conv=True, out_channels=12, padding=0)
    copy_parameters(ours.conv, theirs.conv)
    x = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(1))
    assert ours(x).shape == (2, 12, size[0] // 2, size[1] // 2)
    assert max_difference(ours(x), theirs(x)) <= 1e-6
    assert "padding=0" in repr(ours)
    with pytest.raises(ValueError, match=r"Downsample: padding must be 0 or 1, got 2"):
        Downsample(8, padding=2)


@pytest.mark.parametrize("cls", [Upsample, Downsample])
def test_other_channels_need_a_convolution(cls):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: without use_conv out_channels must equal channels, got"):
        cls(8, 12, use_conv=False)
