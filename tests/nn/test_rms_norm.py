"""`RMSNorm` and `ChannelRMSNorm`: against their peers, with what they fuse, and as modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn import ChannelRMSNorm, RMSNorm

from ..modules import max_difference, randomize


class Peer(nn.Module):
    """What denoising-diffusion-pytorch computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


def images() -> Tensor:
    return torch.randn(3, 12, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("normalized", [6, (5, 6)])
def test_without_extras_is_torch(options, normalized):
    ours, theirs = randomize(RMSNorm(normalized, **options)), nn.RMSNorm(normalized, **options)
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    assert max_difference(ours(images()), theirs(images())) <= 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
def test_over_channels_is_the_peer(channels_last):
    ours, theirs = randomize(ChannelRMSNorm(12)), Peer(12)
    theirs.load_state_dict(ours.state_dict())
    x = images().contiguous(memory_format=torch.channels_last) if channels_last else images()
    y = ours(x)
    assert max_difference(y, theirs(x)) <= 1e-5 and y.stride() == x.stride()
    scale, shift = (torch.randn(3, 12, generator=torch.Generator().manual_seed(i)) for i in range(2))
    block = copy.deepcopy(ours)
    block.activation = "silu"
    expected = F.silu(theirs(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    assert max_difference(block(x, scale=scale, shift=shift), expected) <= 1e-5


@pytest.mark.parametrize("make", [lambda **o: RMSNorm(6, **o), lambda **o: ChannelRMSNorm(12, **o)])
def test_print_pickle_deepcopy_meta_errors(make):
    module, x = randomize(make(activation="silu")), images()
    expected = module(x)
    assert "activation='silu'" in repr(module)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), expected)
    meta = make(activation="silu", device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(meta(x), expected)
    with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.* got 'relu'"):
        make(activation="relu")
