"""`MaskedConv2d`: against dense convolutions of masked weights, foreign state dicts, as a module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn import MaskedConv2d
from fastgen.ops import MASK_TYPES

from ..modules import max_difference, randomize


class Peer(nn.Conv2d):
    """As PixelCNNs are published: the mask a buffer, the weight multiplied in place."""

    def __init__(self, mask_centre: bool, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        mask = torch.zeros_like(self.weight)
        height, width = self.kernel_size
        mask[:, :, : height // 2] = 1
        mask[:, :, height // 2, : width // 2 + int(not mask_centre)] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def images(channels: int = 6) -> Tensor:
    return torch.randn(2, channels, 7, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["A", "B"])
def test_against_a_peer_and_its_state_dict(name):
    """The peer trained as long: after a step of an optimiser both are still the same where the mask is."""
    theirs = randomize(Peer(name == "A", 6, 12, 5, padding=2))
    network = nn.Sequential(MaskedConv2d(6, 12, 5, name))
    state = {f"0.{key}": value for key, value in theirs.state_dict().items()}
    assert network.load_state_dict(state).missing_keys == [] and "0.mask" in state
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.other"):
        network.load_state_dict({**state, "0.other": torch.zeros(1)})
    for module in (theirs, network):
        module(images()).square().mean().backward()
        torch.optim.SGD(module.parameters(), 0.1).step()
    assert max_difference(network(images()), theirs(images())) <= 1e-5
    own = network[0]
    assert torch.equal(own.mask, theirs.mask.bool())
    assert max_difference(own.weight[own.mask], theirs.weight[own.mask]) <= 1e-6


def test_the_shifted_convolutions_of_pixelcnn_plus_plus():
    down, down_right = MaskedConv2d(6, 8, (2, 3), "down"), MaskedConv2d(6, 8, (2, 2), "down_right")
    for module, pad in ((down, (1, 1, 1, 0)), (down_right, (1, 0, 1, 0))):
        expected = F.conv2d(F.pad(images(), pad), module.weight, module.bias)
        assert max_difference(module(images()), expected) <= 1e-5 and module.mask.all()


@pytest.mark.parametrize("name", MASK_TYPES)
def test_print_pickle_deepcopy_meta(name):
    ordered = name.split("_")[0] in ("A", "B", "horizontal")
    options = {"dilation": 2, "groups": 2, "color_channels": 3 if ordered else 1, "bias": False}
    module = randomize(MaskedConv2d(12, 24, 3, name, **options))
    expected = module(images(12))
    text = repr(module)
    assert f"mask_type='{name}'" in text and "dilation=(2, 2)" in text and "groups=2" in text and "bias=False" in text
    assert ("color_channels=3" in text) == ordered
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(images(12)), expected)
    meta = MaskedConv2d(12, 24, 3, name, **options, device="meta")
    assert meta(images(12).to("meta")).shape == expected.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(meta(images(12)), expected)
    assert isinstance(module, nn.Conv2d)


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("mask_type must be one of", (4, 4, 3, "a"), {}),
        ("an odd height and width for mask_type='B', got 2x2", (4, 4, 2, "B"), {}),
        ("color_channels must divide the channels", (4, 6, 3, "B"), {"color_channels": 3}),
        ("color_channels must be 1 for mask_type='down'", (4, 4, 3, "down"), {"color_channels": 2}),
    ],
)
def test_errors(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        MaskedConv2d(*arguments, **options)
