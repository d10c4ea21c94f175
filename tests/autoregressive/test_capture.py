"""A captured network computes what its module computes, whatever it is written with; what it cannot be is refused by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgen.autoregressive.capture import NotPlannable, capture

from . import models
from .models import prepared


def close(captured, model, image, condition=None):
    with torch.no_grad():
        expected = model(image) if condition is None else model(image, condition)
    result = captured.network.evaluate(image if image.dim() == 4 else image[:, :, None])
    expected = expected.reshape(result.shape)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


class Sharing(nn.Module):
    """Convolutions in groups, with dilation; other activations."""

    def __init__(self):
        super().__init__()
        self.first = models.Masked("a", 1, 4, 3, padding=1)
        self.grouped = models.Masked("b", 4, 8, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        h = F.mish(self.grouped(F.softplus(h))) + F.hardtanh(h, -0.3, 0.4).repeat(1, 2, 1, 1)
        return self.head(F.silu(h, inplace=True) ** 2 - 2 / torch.tensor(4.0).double() - F.leaky_relu(h))


CASES = {
    "masked": (models.PixelCNN(), (2, 1, 7, 5)),
    "colors": (models.PixelCNN(colors=3, outputs=6), (2, 3, 5, 6)),
    "batch norm": (models.PixelCNN(nn.BatchNorm2d), (2, 1, 5, 6)),
    "layer norm": (models.PixelCNN(models.ChannelNorm), (2, 1, 5, 6)),
    "dropout": (models.PixelCNN(lambda _: nn.Dropout(0.5), nn.ReLU(inplace=True)), (1, 1, 5, 6)),
    "gated": (models.Gated(), (2, 1, 7, 5)),
    "gated in colors": (models.Gated(colors=3), (2, 3, 4, 9)),
    "pixelcnn++": (models.Down(), (2, 3, 8, 6)),
    "pixelcnn++ of one image": (models.Down(), (1, 3, 6, 10)),
    "wavenet": (models.WaveNet(), (2, 1, 13)),
    "embedding": (models.Embedded(), (2, 2, 5, 6)),
    # torch 2.11's one_hot reads the numbers in Python, which no plan can follow
    **({"one-hot": (models.Embedded(one_hot=True), (2, 2, 5, 6))} if torch.__version__ >= (2, 13) else {}),
    "activations": (Sharing(), (2, 1, 7, 6)),
    **{f"attention, {how}": (models.Attending(how), (2, 1, 4, 5)) for how in ("explicit", "mask", "where", "first row")},
    **{
        f"attention to itself, {how}": (models.Attending(how, strict=False), (2, 1, 5, 3))
        for how in ("explicit", "mask", "causal", "added", "where")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_its_module_does(name):
    model, shape = CASES[name]
    model = prepared(model)
    close(capture(model, shape), model, torch.randint(0, 4, shape).double())


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 2), (11, 10)])
def test_sizes_at_the_edge(size):
    for model in (models.PixelCNN(), models.Gated()):
        model = prepared(model)
        close(capture(model, (2, 1, *size)), model, torch.rand(2, 1, *size).double())


def test_conditions():
    vector, maps = prepared(models.Conditional()), prepared(models.Conditional(maps=2))
    image = torch.rand(3, 1, 5, 4).double()
    for model, condition in ((vector, torch.tensor([2, 0, 1])), (maps, torch.rand(3, 2, 5, 4).double())):
        close(capture(model, image.shape, condition=condition), model, image, condition)


def test_attention_is_one_node():
    for how in ("explicit", "mask", "where"):
        network = capture(prepared(models.Attending(how)), (2, 1, 4, 5)).network
        (node,) = [node for node in network.nodes if type(node).__name__ == "Attention"]
        assert (node.heads, node.strict, node.layer) == (2, True, "")


def test_multihead_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = models.Masked("a", 1, 4, 3, padding=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.need_weights = False

        def forward(self, x):
            h = self.first(x)
            t = h.flatten(2).mT
            mask = torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1)
            out, _ = self.attention(t, t, t, attn_mask=mask, need_weights=self.need_weights)
            return h + out.mT.unflatten(2, x.shape[2:])

    model = prepared(Net())
    for model.need_weights in (False, True):
        close(capture(model, (2, 1, 3, 5)), model, torch.rand(2, 1, 3, 5).double())


@pytest.mark.parametrize(
    ("model", "shape", "layout"),
    [
        (models.Gated(colors=3, levels=5), (2, 3, 4, 4), (5, 3, True, 4)),
        (models.PixelCNN(outputs=6), (2, 1, 4, 4), (6, 1, True, 4)),
        (models.WaveNet(outputs=7), (2, 1, 9), (7, 1, True, 3)),
        (
            nn.Sequential(models.Masked("a", 2, 6, 3, padding=1), nn.Unflatten(1, (2, 3))),
            (1, 2, 4, 4),
            (3, 2, False, 4),
        ),
    ],
)
def test_what_the_channels_are(model, shape, layout):
    captured = capture(model, shape)
    assert (captured.levels, captured.color_channels, captured.levels_first, captured.rank) == layout
    assert captured.network.output.channels == captured.levels * captured.color_channels


def test_the_module_is_left_as_it_was():
    model = models.PixelCNN(nn.BatchNorm2d)
    model.norms[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight" not in name}
    capture(model, (2, 1, 5, 5))
    assert model.training and model.norms[1].training and not model.norms[0].training
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Written(nn.Module):
    """Tensors written to in place: through slices, through views of views, while other views are there."""

    def __init__(self):
        super().__init__()
        self.conv = models.Masked("a", 1, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv(x)
        low, high = h.chunk(2, 1)
        low += 1  # seen in h and in h's other views
        moved = torch.zeros_like(h)
        moved[:, :, 1:] = h[:, :, :-1]
        moved[:, 1].mul_(3)
        moved[:, :, :, 0] = 0.5
        flat = h.flatten(2)
        high.permute(0, 2, 3, 1).sub_(2)
        h[:, 2:3] = moved[:, 1:2]
        return torch.cat([h, flat.view_as(h), low, moved], 1)


def test_writing_in_place():
    model = prepared(Written())
    close(capture(model, (2, 1, 5, 6)), model, torch.rand(2, 1, 5, 6).double())


class Layer(nn.Module):
    """A causal convolution, then a function."""

    def __init__(self, function):
        super().__init__()
        self.conv = models.Masked("a", 1, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Identity(), Function(function))

    def forward(self, x):
        return self.inner(self.conv(x))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def half_and_back(x):
    coarse = F.conv2d(F.pad(x, (1, 0, 1, 0)), torch.ones(2, 4, 2, 2).to(x), stride=2)
    return F.interpolate(coarse, scale_factor=2)[:, :, :5, :5]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(-0.2, 0.3) + x.clamp(min=0.1) - x.clamp(max=0.1) + F.relu6(x) + x.abs(),
        lambda x: F.elu(x, 0.5) + F.selu(x) * F.celu(x, 2.0),
        lambda x: F.prelu(x, torch.linspace(-1, 1, 4).to(x)),
        lambda x: F.gelu(x, approximate="tanh") - F.gelu(x) + x.exp(),
        lambda x: F.glu(x, 1) * (1.5 - x[:, [2, 0]]) / 3,
        lambda x: F.pad(x, (1, 0, 1, 0), value=-1.0)[:, :, :-1, :-1],
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        lambda x: torch.where(torch.arange(5) > 2, x, x * 2) * (torch.arange(5)[:, None] > 1).to(x),
        lambda x: torch.einsum("nchw,oc->nohw", x, torch.arange(12.0).view(3, 4).to(x)),
        lambda x: F.linear(x.movedim(1, -1), torch.arange(12.0).view(3, 4).to(x)).movedim(-1, 1),
        lambda x: torch.matmul(torch.arange(12.0).view(3, 4).to(x), x.flatten(2)).unflatten(2, x.shape[2:]),
        lambda x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda x: torch.cat([t[:, None] for t in x.unbind(1)] + [torch.stack([x, 2 * x], 0).sum(0)], 1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: F.conv2d(x, torch.arange(16.0).view(4, 1, 2, 2).to(x), padding=1, groups=4)[:, :, :-1, :-1],
        lambda x: F.conv_transpose2d(x, torch.arange(32.0).view(4, 2, 2, 2).to(x), groups=2)[:, :, :5, :5],
        half_and_back,
    ],
)
def test_operations(function):
    model = prepared(Layer(function))
    close(capture(model, (2, 1, 5, 5)), model, torch.rand(2, 1, 5, 5).double())


def attended(x):
    t = x.flatten(2).mT
    return (torch.softmax(t @ t.mT, -1) @ t).mT.view_as(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.group_norm(x, 2), "inner.1: GroupNorm averages over the whole image, so a pixel's value"),
        (lambda x: F.instance_norm(x), "inner.1: its statistics are those of the whole image"),
        (lambda x: F.layer_norm(x, x.shape[2:]), "inner.1: LayerNorm averages over positions too"),
        (lambda x: F.max_pool2d(x, 2), "inner.1: pooling takes whole blocks of pixels"),
        (lambda x: x - x.mean((2, 3), keepdim=True), "inner.1: a matrix mixes positions"),
        (lambda x: torch.roll(x, 1, 2), "inner.1: torch.roll brings the last rows"),
        (lambda x: x + torch.rand_like(x), "inner.1: draws random numbers"),
        (lambda x: x * (2 if x.max() > 0 else 1), "inner.1: reads numbers of the image in Python"),
        (lambda x: torch.where(x > 0, x, -x), "inner.1: aten.gt is no operation that is known here"),
        (attended, "inner.1: attention without a causal mask"),
        (lambda x: x @ torch.ones(5, 5), "inner.1: a matrix mixes positions"),
        (lambda x: x.flatten(2)[:, :, :-1], "inner.1: takes a part of the positions in an order of their own"),
        (lambda x: x.softmax(1), "inner.1: a softmax of what are no scores"),
        (lambda x: x[:, :, ::2], "inner.1: every second row or column alone"),
        (lambda x: 1 / x, "inner.1: aten.reciprocal is no operation"),
        (lambda x: x[:1], "inner.1: takes a part of the batch"),
        (lambda x: x + x.mT, "inner.1: tensors .* meet across positions"),
        (lambda x: F.interpolate(x, scale_factor=2), r"the model returns .*, expected \[N, K, H, W\]"),
        (lambda x: x.mT, r"the model returns \[2, 4, 5, 5\] of an image \[2, 1, 5, 5\]"),
    ],
)
def test_what_is_no_network_of_pixels_is_refused_by_name(function, reason):
    with pytest.raises(NotPlannable, match=reason):
        capture(Layer(function), (2, 1, 5, 5))


def test_what_is_refused_and_not_used_does_not_matter():
    model = Layer(lambda x: (F.group_norm(x, 2), x)[1])
    assert capture(model, (2, 1, 5, 5)).network.output.channels == 4


def test_an_output_that_is_shifted_is_a_node_of_its_own():
    model = prepared(Layer(lambda x: F.pad(x, (1, 0, 2, 0))[:, :, :-2, :-1]))
    captured = capture(model, (2, 1, 5, 5))
    output = captured.network.output
    assert (output.dy, output.dx) == (0, 0) and captured.network.nodes[output.node].height == 5
    close(captured, model, torch.rand(2, 1, 5, 5).double())


def test_a_shape_that_is_none():
    with pytest.raises(ValueError, match=r"capture: shape must be \(N, C, H, W\) or \(N, C, T\), got \(1, 2\)"):
        capture(nn.Identity(), (1, 2))


class Chain(nn.Module):
    """Paddings, crops, convolutions, transposed ones and additions one after the other."""

    def __init__(self, steps, seed):
        super().__init__()
        self.steps = steps
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("numbers", torch.randn(60, generator=generator, dtype=torch.float64))

    def forward(self, x):
        def random(*shape):
            return self.numbers[: math.prod(shape)].reshape(shape)

        height, width = x.shape[2:]
        h = F.conv2d(x, random(3, 1, 1, 1))
        for kind, a, b in self.steps:
            if kind == "pad":
                h = F.pad(h, (a, b, b, a))
            elif kind == "crop" and min(h.shape[2:]) > a + b + 1:
                h = h[:, :, a : h.shape[2] - b, b:]
            elif kind == "conv" and min(h.shape[2:]) > a + 1:
                h = F.elu(F.conv2d(h, random(3, 3, 1 + a, 2), random(3), padding=b, dilation=(1, 1 + a)))
            elif kind == "stride" and min(h.shape[2:]) > 2:
                h = F.conv2d(h, random(3, 3, 2, 2), random(3), stride=2, padding=(a, b))
            elif kind == "up" and min(h.shape[2:]) > 1:
                h = F.conv_transpose2d(
                    h, random(3, 3, 2, 3), random(3), stride=2, padding=min(a, 1), output_padding=b % 2
                )
            elif kind == "add":
                h = h + torch.sigmoid(h) * torch.tanh(h + a)
            elif kind == "shift":
                h = torch.cat([torch.zeros_like(h[:, :, :1]), h[:, :, :-1]], 2) + h
        h = F.pad(h, (0, max(width - h.shape[3], 0), 0, max(height - h.shape[2], 0)))
        return h[:, :, h.shape[2] - height :, :width]


STEPS = st.tuples(
    st.sampled_from(["pad", "crop", "conv", "stride", "up", "add", "shift"]), st.integers(0, 2), st.integers(0, 2)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=6), st.integers(0, 99), st.integers(3, 6), st.integers(3, 6))
def test_paddings_and_crops_in_any_order(steps, seed, height, width):
    model = Chain(steps, seed)
    image = torch.rand(2, 1, height, width, dtype=torch.float64)
    result, expected = capture(model, image.shape).network.evaluate(image), model(image)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))
