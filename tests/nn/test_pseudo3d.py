"""Video layers against what make-a-video-pytorch computes, written out; no tensor is copied to another order on the way."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.nn import FrameAttention, PseudoConv3d, SpatioTemporalAttention, TemporalAttention, TemporalConv

from ..modules import max_difference, randomize

COPIES = ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack", "index")


def video(dtype=torch.float64, frames=5, batch=2, channels=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, frames, 6, 4, generator=generator, dtype=torch.float64).to(dtype)


def convolved(module, x, time=True):
    """The 2D convolution frame by frame, then the 1D one pixel by pixel."""
    y = torch.stack([F.conv2d(frame, *parameters(module.spatial_conv), padding="same") for frame in x.unbind(2)], 2)
    return y if not time or module.temporal_conv is None else convolved_in_time(module.temporal_conv, y)


def convolved_in_time(module, x):
    pixels = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
    pixels = F.conv1d(pixels, *parameters(module), padding="same")
    return pixels.unflatten(0, (x.shape[0], *x.shape[3:])).permute(0, 3, 4, 1, 2)


def parameters(conv):
    return conv.weight, conv.bias


def attended(module, tokens, causal=False):
    """tokens + attention of [B, L, C], by its formula."""
    normed = F.normalize(tokens, dim=-1) * math.sqrt(tokens.shape[-1]) * module.norm.gamma
    q, k, v = (
        t.unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for t in (module.to_q(normed), *module.to_kv(normed).chunk(2, dim=-1))
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return tokens + module.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def in_frames(module, x):
    y = attended(module, x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2))
    return y.reshape(x.shape[0], *x.shape[2:], -1).permute(0, 4, 1, 2, 3)


def in_time(module, x, causal=False):
    y = attended(module, x.permute(0, 3, 4, 2, 1).flatten(0, 2), causal)
    return y.unflatten(0, (x.shape[0], *x.shape[3:])).permute(0, 4, 3, 1, 2)


CASES = {
    "conv": (lambda: PseudoConv3d(8, 6), convolved),
    "conv, other kernel over time": (lambda: PseudoConv3d(8, 6, 3, temporal_kernel_size=5), convolved),
    "conv 1x1": (lambda: PseudoConv3d(8, 6, 1), convolved),
    "conv over time": (lambda: TemporalConv(8, 5), convolved_in_time),
    "frames": (lambda: FrameAttention(8, dim_head=4, heads=3), in_frames),
    "time": (lambda: TemporalAttention(8, dim_head=4, heads=3), in_time),
    "causal": (lambda: TemporalAttention(8, dim_head=4, heads=3, causal=True), lambda m, x: in_time(m, x, True)),
    "both": (
        lambda: SpatioTemporalAttention(8, dim_head=4, heads=3),
        lambda m, x: in_time(m.temporal_attn, in_frames(m.spatial_attn, x)),
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, layout):
    make, formula = CASES[name]
    module = randomize(make().double())
    x = video().contiguous(memory_format=layout).requires_grad_()
    expected = formula(module, x)
    y = module(x)
    assert max_difference(y, expected) <= 1e-12
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    leaves = [x, *module.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((t * weights).sum(), leaves) for t in (y, expected)), strict=True):
        assert max_difference(ours, theirs) <= 1e-11


@pytest.mark.parametrize("name", CASES)
def test_images_and_frames_apart(name):
    """An image goes through what is of space alone, and so does each frame where time is not enabled."""
    module, x = randomize(CASES[name][0]().double()), video()
    image = module(x[:, :, 3])
    assert image.dim() == 4
    if name in ("time", "causal", "conv over time"):
        assert torch.equal(image, x[:, :, 3])
    elif name == "frames":
        assert max_difference(image, module(x)[:, :, 3]) <= 1e-12
    else:
        apart = module(x, enable_time=False)
        assert max_difference(image, apart[:, :, 3]) <= 1e-12
        if name != "conv 1x1":
            assert max_difference(apart, module(x)) > 1e-3


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def copies(self):
        return [name for name in self.names if name.split(".")[1] in COPIES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_copies(name, dtype):
    """None where the channels are innermost, one where they are not; not one of what is between the two halves either."""
    module = randomize(CASES[name][0]()).to(dtype)
    for x, expected in ((video(dtype).contiguous(memory_format=torch.channels_last_3d), 0), (video(dtype), 1)):
        with torch.no_grad(), Calls() as calls:
            module(x)
        assert len(calls.copies) == expected, calls.copies


def test_starts_as_the_image_layers():
    x = video(torch.float32)
    conv, attention = PseudoConv3d(8, 6), SpatioTemporalAttention(8, dim_head=4, heads=2)
    assert max_difference(conv(x), conv(x, enable_time=False)) <= 1e-6
    assert torch.equal(attention(x), x)


@pytest.mark.parametrize("cls", [FrameAttention, TemporalAttention])
def test_plain_attention(cls):
    fused = randomize(cls(8, dim_head=4, heads=3).double())
    plain = cls(8, dim_head=4, heads=3, plain=True).double()
    plain.load_state_dict(fused.state_dict())
    assert max_difference(plain(video()), fused(video())) <= 1e-12
    for module, ours in ((fused, True), (plain, False)):
        with torch.no_grad(), Calls() as calls:
            module(video())
        assert any(name.startswith("fastgen") for name in calls.names) == ours


def test_names_of_parameters_are_those_of_make_a_video_pytorch():
    assert list(PseudoConv3d(4, 6).state_dict()) == [
        "spatial_conv.weight", "spatial_conv.bias", "temporal_conv.weight", "temporal_conv.bias",
    ]  # fmt: skip
    assert PseudoConv3d(4, 6).temporal_conv.weight.shape == (6, 6, 3)
    names = ["norm.gamma", "to_q.weight", "to_kv.weight", "to_out.weight"]
    assert list(SpatioTemporalAttention(8).state_dict()) == [
        f"{part}.{name}" for part in ("spatial_attn", "temporal_attn") for name in names
    ]


def test_pickles_copies_prints():
    x = video(torch.float32)
    for name, (make, _) in CASES.items():
        module = randomize(make())
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(twin(x), module(x)), name
    assert "8, dim_head=4, heads=3, causal=True" in repr(CASES["causal"][0]())


def test_bad_arguments():
    with pytest.raises(ValueError, match="PseudoConv3d: kernel_size must be odd, got 4"):
        PseudoConv3d(8, kernel_size=4)
    with pytest.raises(ValueError, match="TemporalConv: kernel_size must be odd, got 2"):
        TemporalConv(8, 2)
    with pytest.raises(ValueError, match="PseudoConv3d: temporal_kernel_size must be odd, got 2"):
        PseudoConv3d(8, temporal_kernel_size=2)
    for name, (make, _) in CASES.items():
        with pytest.raises(ValueError, match=r"x must be \[N, C, F, H, W\] or \[N, C, H, W\], got shape \(8, 6, 4\)"):
            make()(torch.zeros(8, 6, 4))
        assert name
