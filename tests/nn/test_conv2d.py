"""`Conv2d` as a module, and norms that go into the convolution after them: in inference, and only there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.nn import Conv2d, GroupNorm, PlainGroupNorm, ResBlock, Upsample, UpsampleConv2d
from fastgen.nn.conv2d import normed_conv
from fastgen.ops._packed_weights import WEIGHTS

from ..backends import requires_cpu
from ..modules import max_difference, randomize

SHAPE = (2, 64, 16, 12)


def image(seed=1, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1}, {"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "bias": False}, {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": 3, "padding": 2, "dilation": 2},
    ],
)  # fmt: skip
def test_is_torchs(options, channels_last):
    ours, theirs = randomize(Conv2d(64, 48, **options)), nn.Conv2d(64, 48, **options)
    theirs.load_state_dict(ours.state_dict())
    x = image().contiguous(memory_format=torch.channels_last) if channels_last else image()
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= 2e-5
    grads = [torch.autograd.grad(module(x).square().sum(), list(module.parameters())) for module in (ours, theirs)]
    for ours_grad, theirs_grad in zip(*grads, strict=True):
        assert torch.equal(ours_grad, theirs_grad)  # training is the library's, number for number


def test_print_pickle_deepcopy_meta():
    module = randomize(Conv2d(64, 48, 3, padding=1))
    assert repr(module) == repr(nn.Conv2d(64, 48, 3, padding=1))
    with torch.no_grad():
        expected = module(image())
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(twin(image()), expected)
    meta = Conv2d(64, 48, 3, padding=1, device="meta")
    assert meta(image().to("meta")).shape == expected.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(meta(image()), expected)


@pytest.mark.parametrize("size", [(16, 12), (6, 5)])
def test_upsampling_and_convolution_are_torchs(size):
    ours, theirs = randomize(UpsampleConv2d(64, 48)), nn.Conv2d(64, 48, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x, residual = image(shape=(2, 64, *size)), image(2, (2, 48, 2 * size[0], 2 * size[1]))
    expected = residual + theirs(F.interpolate(x, scale_factor=2, mode="nearest"))
    with torch.no_grad():
        assert relative(ours(x, residual=residual), expected) <= 2e-5
    actual = ours(x, residual=residual)
    grads = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((ours, actual), (theirs, expected))
    ]
    for ours_grad, theirs_grad in zip(*grads, strict=True):
        assert relative(ours_grad, theirs_grad) <= 1e-6
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert torch.equal(twin(x, residual=residual), actual) and repr(twin) == "UpsampleConv2d(64, 48, bias=True)"


@requires_cpu
@pytest.mark.parametrize("make", [lambda: Upsample(64), lambda: ResBlock(64, 64, resample="up")])
def test_the_way_up_makes_no_large_image(make, monkeypatch):
    """But that of a block's skip, which has no convolution."""
    module, large = randomize(make()), []
    plain = (
        Upsample(64, conv=nn.Conv2d)
        if isinstance(module, Upsample)
        else ResBlock(64, 64, resample="up", norm=PlainGroupNorm)
    )
    plain.load_state_dict(module.state_dict())
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **options: large.append(x) or interpolate(x, **options))
    with torch.no_grad():
        actual = module(image())
        assert len(large) == int(isinstance(module, ResBlock))
        assert relative(actual, plain(image())) <= 2e-5
    assert torch.equal(module(image()).detach(), module(image()).detach()) and module(image()).requires_grad


@requires_cpu
def test_packed_weights_go_with_the_module():
    WEIGHTS.clear()
    module = randomize(Conv2d(64, 48, 3, padding=1))
    with torch.no_grad():
        module(image())
        assert WEIGHTS.bytes == module.plan(image()).weight_bytes > 0
        half = copy.deepcopy(module).bfloat16()
        low = image(dtype=torch.bfloat16)
        half(low)
        assert WEIGHTS.bytes == module.plan(image()).weight_bytes + half.plan(low).weight_bytes
        assert set(module.state_dict()) == {"weight", "bias"}
    del module, half
    assert WEIGHTS.bytes == 0


@requires_cpu
def test_a_norm_goes_into_the_convolution_in_inference(monkeypatch):
    norm, conv = randomize(GroupNorm(4, 64, activation="silu")), randomize(Conv2d(64, 48, 3, padding=1))
    x, residual = image(), image(2, (2, 48, 16, 12))
    bias = image(3, (2, 64))
    calls = []
    monkeypatch.setattr(GroupNorm, "affine_map", spy(GroupNorm.affine_map, calls))
    normal = F.silu(F.group_norm(x + bias[..., None, None], 4, norm.weight, norm.bias))
    expected = residual + F.conv2d(normal, conv.weight, conv.bias, padding=1)
    with_gradients = normed_conv(norm, conv, x, residual=residual, channel_bias=bias)
    assert not calls and max_difference(with_gradients, expected) <= 1e-5
    with torch.no_grad():
        assert relative(normed_conv(norm, conv, x, residual=residual, channel_bias=bias), expected) <= 2e-5
    assert len(calls) == 1


def spy(function, calls):
    def call(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return function(self, *args, **kwargs)

    return call


class Noted(GroupNorm):
    """A norm of the user's own."""

    def forward(self, input, **around):
        return super().forward(input, **around) + 1


def test_a_norm_of_another_class_is_called():
    norm, conv = randomize(Noted(4, 64, activation="silu")), randomize(Conv2d(64, 48, 3, padding=1))
    with torch.no_grad():
        assert torch.equal(normed_conv(norm, conv, image()), conv(norm(image())))


@requires_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"embedding_channels": 24}, {"embedding_channels": 24, "use_scale_shift_norm": True}, {"resample": "up"},
        {"dropout": 0.5},
    ],
)  # fmt: skip
def test_a_residual_block_in_inference(options, channels_last, dtype):
    fused, plain = (
        ResBlock(64, 96, num_groups=8, **options),
        ResBlock(64, 96, num_groups=8, norm=PlainGroupNorm, **options),
    )
    randomize(fused)
    plain.load_state_dict(fused.state_dict())
    assert isinstance(fused.conv1, Conv2d) and type(plain.conv1) is nn.Conv2d
    x, embedding = image(), image(4, (2, 24)) if "embedding_channels" in options else None
    with torch.no_grad():
        exact = copy.deepcopy(plain).double().eval()(x.double(), None if embedding is None else embedding.double())
        fused, plain, x = (t.to(dtype) for t in (fused.eval(), plain.eval(), x))
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        embedding = None if embedding is None else embedding.to(dtype)
        actual, beside = fused(x, embedding), plain(x, embedding)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    bound = 2 * 2e-5 if dtype == torch.float32 else 1.1 * relative(beside, exact)
    assert relative(actual, exact) <= bound


def test_bad_arguments():
    with pytest.raises(ValueError, match="Conv2d: padding_mode must be 'zeros', got 'reflect'"):
        Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
