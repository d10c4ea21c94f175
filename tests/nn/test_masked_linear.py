"""`MaskedLinear`: values, its mask wherever it is moved, copies, and nflows' layer of the same weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastgen.nn import MaskedLinear

from ..backends import import_peer
from ..modules import randomize

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_values_and_gradients(strict, bias):
    layer = randomize(MaskedLinear([3, 1, 2, 1, 4, 2], [1, 2, 3, 4, 2], strict=strict, bias=bias))
    expected = F.linear(X, layer.weight * layer.mask, layer.bias)
    torch.testing.assert_close(layer(X), expected)
    layer(X).square().sum().backward()
    assert (layer.weight.grad[~layer.mask] == 0).all() and (layer.weight.grad[layer.mask] != 0).any()
    with torch.no_grad():
        torch.testing.assert_close(layer(X), expected)
    assert [list(row) for row in layer.mask[:2].tolist()] == [
        [(o > i if strict else o >= i) for i in (3, 1, 2, 1, 4, 2)] for o in (1, 2)
    ]


def test_the_mask_is_made_once_and_follows_the_weight():
    layer = MaskedLinear(range(1, 7), range(1, 7))
    assert layer.mask is layer.mask and set(layer.state_dict()) == {"weight", "bias"}
    on_meta = MaskedLinear(range(1, 7), range(1, 7), device="meta")
    assert on_meta.mask.device.type == "meta"
    on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(on_meta.mask, layer.mask)
    torch.testing.assert_close(on_meta(X), layer(X))


def test_print_and_copies():
    layer = MaskedLinear(range(1, 7), range(1, 7), strict=True)
    assert str(layer) == "MaskedLinear(in_features=6, out_features=6, bias=True, strict=True)"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(X), layer(X)) and other.weight is not layer.weight


def test_nflows():
    theirs = import_peer("nflows.transforms.made").MaskedLinear(torch.arange(1, 7), 10, 6, False, False)
    ours = MaskedLinear(range(1, 7), theirs.degrees.tolist())
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ("weight", "bias")})
    torch.testing.assert_close(ours(X), theirs(X))
