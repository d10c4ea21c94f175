"""A Gated PixelCNN in plain torch, written as its paper has it: what the demonstration of autoregressive models compares with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import GatedPixelCNN
from .._errors import UsageError


class PlainGatedPixelCNN(nn.Module):
    """The logits of a :class:`fastgen.models.GatedPixelCNN` that is not factorized, from its own weights, by torch's padding,
    convolutions, tanh and sigmoid alone.

    Raises:
        UsageError: the model is of the other form.
    """

    def __init__(self, model: GatedPixelCNN) -> None:
        super().__init__()
        if model.first is not None:
            raise UsageError("--weights: the model must be a GatedPixelCNN that is not factorized")
        self.model = model
        self.distribution, self.levels = model.distribution, model.levels

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] and labels [N] -> [N, K, C, H, W]."""
        m = self.model
        vertical, horizontal = causal(m.vertical_in, x), causal(m.horizontal_in, x)
        layer: Any
        for layer in m.layers:
            above = causal(layer.vertical, vertical) + layer.condition(labels)
            beside = causal(layer.horizontal, horizontal) + layer.link(above)
            vertical, horizontal = gate(above), horizontal + layer.residual(gate(beside))
        return m.out(F.elu(horizontal)).unflatten(1, (self.levels, x.shape[1]))


def causal(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution of the model by padding: zeros above and to the left, and to the right where it is centred."""
    (rows, columns), (dilation, _) = conv.kernel_size, conv.dilation
    above, before = int(conv.above), int(conv.before)
    wide = dilation * (columns - 1)
    right = wide // 2 if conv.mask_type == "down" else 0
    x = x[:, :, : x.shape[2] - above, : x.shape[3] - before]
    x = F.pad(x, (wide - right + before, right, dilation * (rows - 1) + above, 0))
    return F.conv2d(x, conv.weight, conv.bias, dilation=dilation)


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)
