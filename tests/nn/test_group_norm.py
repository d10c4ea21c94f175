"""`GroupNorm` and `PlainGroupNorm`: against torch, against each other, and as modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.nn import GroupNorm, PlainGroupNorm

from ..modules import max_difference, randomize

FUSED = {
    "none": (),
    "channel_bias": ("channel_bias",),
    "scale_shift": ("scale", "shift"),
    "all": ("channel_bias", "scale", "shift"),
}


def _inputs(names, shape=(3, 12, 5, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x, {name: torch.randn(shape[:2], generator=generator, dtype=dtype) for name in names}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("names", FUSED.values(), ids=FUSED)
def test_fused_is_plain(names, activation, channels_last):
    fused = randomize(GroupNorm(4, 12, activation=activation))
    plain = PlainGroupNorm(4, 12, activation=activation)
    plain.load_state_dict(fused.state_dict())
    x, extra = _inputs(names)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    result = fused(x, **extra)
    assert max_difference(result, plain(x, **extra)) <= 1e-5
    assert result.stride() == x.stride()


@pytest.mark.parametrize("cls", [GroupNorm, PlainGroupNorm])
@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 7), (2, 12, 3, 4, 5)])
def test_without_extras_is_torch(cls, shape):
    ours, theirs = cls(4, 12, eps=1e-3), nn.GroupNorm(4, 12, eps=1e-3)
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    x, _ = _inputs((), shape)
    assert max_difference(ours(x), theirs(x)) <= 1e-5


def test_gradients_of_all_tensors():
    fused = randomize(GroupNorm(4, 12, activation="silu", dtype=torch.float64))
    plain = PlainGroupNorm(4, 12, activation="silu", dtype=torch.float64)
    plain.load_state_dict(fused.state_dict())
    grads = []
    for module in (fused, plain):
        x, extra = _inputs(("channel_bias", "scale", "shift"), dtype=torch.float64)
        leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in extra.values())]
        output = module(x, **extra)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        grads.append(torch.autograd.grad((output * weights).sum(), [*leaves, *module.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10


@pytest.mark.parametrize("cls", [GroupNorm, PlainGroupNorm])
@pytest.mark.parametrize(("options", "names"), [({"affine": False}, []), ({"bias": False}, ["weight"])])
def test_no_affine_and_no_bias(cls, options, names):
    """Beside the function, not the module: torch 2.11's has no ``bias``."""
    x, _ = _inputs(())
    module = cls(4, 12, **options)
    module.reset_parameters()
    assert list(module.state_dict()) == names
    randomize(module)
    assert max_difference(module(x), F.group_norm(x, 4, module.weight)) <= 1e-5
    twin = cls(4, 12, **options)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("cls", [GroupNorm, PlainGroupNorm])
def test_two_inputs_are_those_in_one(cls):
    x, extra = _inputs(("channel_bias", "scale", "shift"))
    module = randomize(cls(4, 12, activation="silu"))
    first, second = x.split([5, 7], 1)
    assert torch.equal(module(first, skip=second, **extra), module(x, **extra))
    parts = zip(module.affine_map(first, skip=second, **extra), module.affine_map(x, **extra), strict=True)
    assert all(torch.equal(a, b) for a, b in parts)


def test_print_names_the_activation():
    assert repr(GroupNorm(4, 12)) == repr(nn.GroupNorm(4, 12))
    assert "activation='silu'" in repr(GroupNorm(4, 12, activation="silu"))


@pytest.mark.parametrize("cls", [GroupNorm, PlainGroupNorm])
def test_pickle_deepcopy_meta(cls):
    module = randomize(cls(4, 12, activation="silu"))
    x, _ = _inputs(())
    expected = module(x)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), expected)
    meta = cls(4, 12, activation="silu", device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(meta(x), expected)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.* got 'relu'"):
        GroupNorm(4, 12, activation="relu")
    with pytest.raises(ValueError, match=r"num_groups must divide num_channels, got num_groups=5 and num_channels=12"):
        GroupNorm(5, 12)
    with pytest.raises(ValueError, match=r"num_groups must divide num_channels, got num_groups=0"):
        GroupNorm(0, 12)
    with pytest.raises(ValueError, match=r"scale must"):
        GroupNorm(4, 12)(torch.randn(2, 12, 3), scale=torch.randn(3, 12))
