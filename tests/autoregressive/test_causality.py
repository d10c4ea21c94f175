"""What may be computed when: the table of availabilities, orders of colors, and refusals of networks that look ahead."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.autoregressive.capture import NotPlannable, capture
from fastgen.autoregressive.causality import (
    Availability,
    Distance,
    availability,
    check,
    color_order,
    resolutions,
    seen_from,
    taps_by_availability,
)
from fastgen.autoregressive.network import Convolution, Input, Network, Operand, Tap

from . import models
from .models import prepared
from .test_capture import CASES, Function

CONSTANT, ROW, PIXEL, INPUT, COMPLETE = Availability


@pytest.mark.parametrize(
    ("kind", "distance", "expected"),
    [
        (CONSTANT, (3, 3), CONSTANT),
        (INPUT, (-1, 5), ROW),
        (PIXEL, (-1, 5), ROW),
        (ROW, (-2, 0), ROW),
        (ROW, (0, 7), ROW),
        (ROW, (1, 0), COMPLETE),
        (ROW, (2, 0), None),
        (PIXEL, (0, -1), PIXEL),
        (PIXEL, (0, 0), PIXEL),
        (PIXEL, (0, 1), COMPLETE),
        (PIXEL, (1, -9), None),
        (INPUT, (0, -1), PIXEL),
        (INPUT, (0, 0), INPUT),
        (INPUT, (0, 1), COMPLETE),
        (INPUT, (1, 0), None),
        (COMPLETE, (-1, 4), ROW),
        (COMPLETE, (0, -4), COMPLETE),
        (COMPLETE, (1, 0), None),
    ],
)
def test_what_a_value_is_at_a_distance(kind, distance, expected):
    assert seen_from(kind, Distance(*distance)) == expected


@pytest.mark.parametrize("name", CASES)
def test_every_value_depends_on_no_more_than_it_is_said_to(name):
    """By changing one pixel: rows that may not see it, and pixels that may not, keep their values."""
    model, shape = CASES[name]
    network = capture(prepared(model), shape).network
    kinds, pixels = availability(network), resolutions(network)
    height, width = (1, *shape[2:])[-2:]
    image = torch.randint(0, 3, (1, shape[1], height, width)).double()
    before = network.values(image)
    for y, x in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        other = image.clone()
        other[:, :, y, x] += 1
        for kind, f, old, new in zip(kinds, pixels, before, network.values(other), strict=True):
            changed = (old != new).any(1)[0].nonzero() * f  # the pixels at which the values are computed
            if kind == CONSTANT:
                assert len(changed) == 0
            for row, column in changed.tolist():
                if kind in (ROW, COMPLETE):
                    assert row >= y + (kind == ROW)
                else:
                    assert (row, column) >= (y, x + (kind == PIXEL))


def test_the_stacks_of_a_gated_network():
    network = capture(models.Gated(), (1, 1, 6, 6)).network
    kinds = availability(network)
    assert kinds[network.output.node] == PIXEL and kinds[0] == INPUT
    for node, kind in zip(network.nodes, kinds, strict=True):
        stack = node.layer.rpartition(".")[2]
        if isinstance(node, Convolution) and node.layer.startswith("layers.1"):
            assert kind == (ROW if stack in ("across", "down", "beside", "link") else PIXEL), node.layer
    assert [kind for node, kind in zip(network.nodes, kinds, strict=True) if node.layer == "layers.0.across"] == [
        COMPLETE
    ]


def test_taps_of_rows_and_of_pixels():
    network = capture(models.PixelCNN(), (1, 1, 6, 6)).network
    kinds = availability(network)
    found = []
    for i, node in enumerate(network.nodes):
        if isinstance(node, Convolution) and len(node.taps) > 1:
            rows, rest = taps_by_availability(network, i, kinds)
            assert sorted(rows + rest) == list(range(len(node.taps)))
            assert all(node.taps[t].dy < 0 for t in rows) and all(node.taps[t].dy == 0 for t in rest)
            found.append((len(rows), len(rest)))
    assert found == [(10, 2), (3, 2), (3, 2)]


def test_resolutions():
    network = capture(models.Down(), (1, 3, 8, 8)).network
    pixels = resolutions(network)
    assert set(pixels) == {0, 1, 2} and pixels[0] == pixels[network.output.node] == 1
    fine = Convolution(1, 4, 4, Operand(0, 1), (Tap(0, 0),), torch.ones(1, 1, 1), upscale=2, layer="up")
    with pytest.raises(NotPlannable, match=r"up \(Convolution\) makes more than one position of a pixel"):
        resolutions(Network((Input(1, 2, 2), fine), Operand(1, 1)))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1)), "0 (Convolution) reads 1 rows below a pixel's position"),
        (nn.Sequential(models.Masked("b", 1, 2, 3, padding=1)), "0 (Convolution) reads the pixel itself"),
        (
            nn.Sequential(models.Masked("a", 1, 2, 3, padding=1), nn.Conv2d(2, 2, (1, 3), padding=(0, 1))),
            "1 (Convolution) reads 1 columns to the right of a pixel's position a value that depends on pixels before it",
        ),
        (
            nn.Sequential(Function(lambda x: F.pad(x, (1, 1, 2, -1))), nn.Conv2d(1, 2, (2, 3)), nn.Conv2d(2, 2, 3, padding=1)),
            "2 (Convolution) reads 1 rows below a pixel's position a value that depends on rows above it",
        ),
        (nn.Conv2d(1, 2, 1), "a Convolution reads the pixel itself, and its logits depend on it"),
    ],
)  # fmt: skip
def test_a_network_that_looks_ahead_is_refused_by_name(model, sentence):
    with pytest.raises(NotPlannable) as refusal:
        color_order(capture(model, (1, 1, 6, 6)))
    assert str(refusal.value).startswith(sentence)


class ByColor(nn.Module):
    """Logits of each color see those before it in an order, at the pixel itself."""

    def __init__(self, order, levels=2, levels_first=True):
        super().__init__()
        colors = len(order)
        self.above = models.Masked("a", colors, levels * colors, 3, padding=1)
        self.own = nn.Conv2d(colors, levels * colors, 1)
        place = [order.index(c) for c in range(colors)]
        seen = torch.tensor([[place[d] < place[c] for d in range(colors)] for c in range(colors)]).double()
        mask = seen.repeat(levels, 1) if levels_first else seen.repeat_interleave(levels, 0)
        self.register_buffer("mask", mask[:, :, None, None])
        self.levels, self.colors, self.levels_first = levels, colors, levels_first

    def forward(self, x):
        y = self.above(x) + F.conv2d(x, self.own.weight * self.mask.to(x), self.own.bias)
        sizes = (self.levels, self.colors) if self.levels_first else (self.colors, self.levels)
        return y.unflatten(1, sizes)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("levels_first", [True, False])
def test_the_order_of_colors(order, levels_first):
    captured = capture(ByColor(order, levels_first=levels_first).double(), (1, 3, 5, 5))
    assert captured.levels_first == levels_first
    assert color_order(captured) == order


def test_colors_at_once():
    assert color_order(capture(models.Gated(colors=3), (1, 3, 5, 5))) is None


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() & {"masked", "gated in colors", "wavenet", "one-hot", "pixelcnn++"})
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_passes(name, dtype):
    model, shape = CASES[name]
    model = prepared(model).to(dtype)
    check(capture(model, shape), model, shape)


def test_a_check_of_another_model_fails():
    model = prepared(models.PixelCNN())
    captured, other = capture(model, (2, 1, 5, 5)), copy.deepcopy(model)
    check(captured, other, (2, 1, 5, 5))
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-6
    with pytest.raises(NotPlannable, match=r"the captured network differs from the model by .* of logits up to"):
        check(captured, other, (2, 1, 5, 5))


def test_a_check_sees_what_tracing_does_not():
    """Numbers that leave torch: a network of another image than the example is another."""

    class Leaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = models.Masked("a", 1, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x) + float(torch.as_tensor(x.detach().numpy()).sum())

    model = Leaking().double()
    with pytest.raises(NotPlannable, match="differs from the model"):
        check(capture(model, (1, 1, 4, 4)), model, (1, 1, 4, 4))
