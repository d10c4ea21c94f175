"""Modules of fastgen's own ops are captured as those of plain torch are."""

import pytest
import torch
from torch import nn

from fastgen import ops
from fastgen.autoregressive.capture import NotPlannable, capture
from fastgen.autoregressive.causality import color_order

from .models import prepared
from .test_capture import close


class Net(nn.Module):
    """Masked convolutions of fastgen, gated, with concat_elu and attention; ``colors`` in order at the pixel itself."""

    def __init__(self, colors, condition=None):
        super().__init__()
        self.colors = colors
        self.first = nn.Parameter(torch.randn(12, colors, 3, 3))
        self.second = nn.Parameter(torch.randn(24, 4, 3, 3))  # three groups
        self.above = nn.Parameter(torch.randn(12, 12, 2, 3))
        self.head = nn.Parameter(torch.randn(2 * colors, 24, 3, 3))
        self.bias = nn.Parameter(torch.randn(24))
        self.condition = None if condition is None else nn.Parameter(torch.randn(condition))

    def forward(self, x):
        h = ops.masked_conv2d(x, self.first, mask_type="A", color_channels=self.colors)
        gates = ops.masked_conv2d(
            h, self.second, self.bias, mask_type="B", dilation=2, groups=3, color_channels=self.colors
        )
        if self.colors == 1:
            h = h + ops.gated_activation(gates, self.condition)
            above = ops.masked_conv2d(h, self.above, mask_type="down")[:, :, :-1]
            h = h + nn.functional.pad(above, (0, 0, 1, 0))
            t = h.flatten(2).mT.unflatten(2, (3, 4)).transpose(1, 2)  # [N, heads, H W, E]
            h = h + ops.attention(t, t, t, is_causal=True).mT.reshape(h.shape)
            h = ops.concat_elu(h)
        else:
            h = torch.stack([h, h.relu()], 2).flatten(1, 2) + gates  # those of a color stay together
        h = ops.masked_conv2d(h, self.head, mask_type="B", color_channels=self.colors)
        return h.unflatten(1, (self.colors, 2))


@pytest.mark.parametrize("condition", [None, (2, 24), (2, 24, 1, 5)])
def test_own_ops_are_captured(condition):
    model = prepared(Net(1, condition))
    captured = capture(model, (2, 1, 4, 5))
    close(captured, model, torch.rand(2, 1, 4, 5).double())
    kinds = [type(node).__name__ for node in captured.network.nodes]
    assert kinds.count("Product") == kinds.count("Attention") == 1 and color_order(captured) is None


def test_colors_of_own_convolutions():
    model = prepared(Net(3))
    captured = capture(model, (2, 3, 4, 5))
    close(captured, model, torch.rand(2, 3, 4, 5).double())
    assert (captured.levels, captured.levels_first) == (2, False)
    assert color_order(captured) == (0, 1, 2)


class Accelerated(nn.Module):
    """What `accelerate` puts in the place of torch's convolutions, and a gate whose condition depends on the image."""

    def __init__(self, output_scale=1.0):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 1, 2, 3))
        self.second, self.third = (nn.Parameter(torch.randn(8, 4, 1, 1)) for _ in range(2))
        self.bias, self.output_scale = nn.Parameter(torch.randn(8)), output_scale

    def forward(self, x):
        h = self.conv(nn.functional.pad(x, (1, 1, 2, 0))[:, :, :-1], self.first, None, 1)
        a, b = (self.conv(h, weight, self.bias, 2) for weight in (self.second, self.third))
        return ops.gated_activation(a, b, activation="identity")

    def conv(self, x, weight, bias, groups):
        """The raw op, which `ops.conv2d` calls where that is fastest."""
        fused = (None, None, 0, None, None, self.output_scale, None)
        return torch.ops.fastgen.conv2d_fwd.default(x, weight, (1, 1), (0, 0), (1, 1), groups, bias, *fused)


def test_convolutions_and_a_gate_of_the_image():
    model = prepared(Accelerated())
    close(capture(model, (2, 1, 4, 5)), model, torch.rand(2, 1, 4, 5).double())


def test_a_convolution_with_other_layers_in_it_is_refused():
    with pytest.raises(NotPlannable, match="a convolution with other layers in it"):
        capture(prepared(Accelerated(0.5)), (2, 1, 4, 5))
