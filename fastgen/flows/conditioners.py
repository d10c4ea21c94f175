"""Networks that give a coupling layer its parameters. Each ends with zeros, so that a new flow begins as (nearly) the identity.

A conditioner is any module of (kept) or (kept, context).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _conv_network
from .transform import Context

Conditioner = nn.Module


def conditioned(conditioner: Conditioner, kept: Tensor, context: Context) -> Tensor:
    """The parameters; a conditioner without a context is called without one."""
    return conditioner(kept) if context is None else conditioner(kept, context)


class ResidualMLP(nn.Module):
    """[N, in_features] -> [N, out_features]: the residual network of nflows, whose weights it loads.

    A linear layer, blocks of x + linear(relu(linear(relu(x)))), a linear layer; a context stands beside the input.

    Args:
        in_features, out_features: without the context.
        hidden_features: width.
        num_blocks: how many.
        context_features: of a context [N, context_features]; None for none.
        zero_init: whether the last layer begins at 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 128,
        num_blocks: int = 2,
        context_features: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_features, self.context_features = hidden_features, context_features
        self.initial_layer = nn.Linear(in_features + (context_features or 0), hidden_features)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden_features) for _ in range(num_blocks))
        self.final_layer = nn.Linear(hidden_features, out_features)
        if zero_init:
            zero(self.final_layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Raises ValueError where ``context`` does not fit."""
        h = self.initial_layer(_beside(type(self).__name__, x, context, self.context_features))
        for block in self.blocks:
            h = block(h)
        return self.final_layer(h)


class _ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear_layers = nn.ModuleList(nn.Linear(features, features) for _ in range(2))
        nn.init.uniform_(self.linear_layers[1].weight, -1e-3, 1e-3)  # type: ignore[arg-type]
        nn.init.uniform_(self.linear_layers[1].bias, -1e-3, 1e-3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear_layers
        return x + second(F.relu_(first(F.relu(x))))


class MLP(nn.Sequential):
    """[N, in_features] -> [N, out_features]: ``num_layers`` linear layers with ReLU, and a last one at 0; NICE's.

    Args:
        in_features, out_features: without the context.
        hidden_features, num_layers: of the layers before the last.
        context_features: of a context [N, context_features]; None for none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 1000,
        num_layers: int = 5,
        context_features: int | None = None,
    ) -> None:
        widths = [in_features + (context_features or 0), *[hidden_features] * num_layers]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU(inplace=True)]
        super().__init__(*layers, zero(nn.Linear(widths[-1], out_features)))
        self.context_features = context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(_beside(type(self).__name__, x, context, self.context_features))


class ConvNet(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H, W]: 3x3, ReLU, 1x1, ReLU, 3x3 from 0; Kingma & Dhariwal 2018 (Glow).

    Args:
        in_channels, out_channels: without the context.
        hidden_channels: of the two layers in between; 512 in the paper.
        context_channels: of a map [N, context_channels, H, W] beside the input; None for none.
        num_classes: of labels [N], which a table adds after the first layer; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 512,
        context_channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.first = nn.Conv2d(in_channels + (context_channels or 0), hidden_channels, 3, padding=1)
        self.middle = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.last = zero(nn.Conv2d(hidden_channels, out_channels, 3, padding=1))
        self.labels = None if num_classes is None else zero(nn.Embedding(num_classes, hidden_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        convs = (self.first, self.middle, self.last)
        if _conv_network.applies(convs, x):
            return _conv_network.network(*_beside_and_labels(self, x, context), convs)
        h = _first(self, x, context)
        return self.last(_conv1x1(self.middle, F.relu_(h), relu=True))


class ConvResNet(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H, W]: the residual network of Dinh et al. 2016 (RealNVP), without batch norm.

    A 3x3 convolution, blocks of x + conv(relu(conv(relu(x)))), 3x3 and 3x3, and a 1x1 convolution from 0. The second of a block
    begins at 0.

    Args:
        in_channels, out_channels: without the context.
        hidden_channels: width.
        num_blocks: how many.
        context_channels, num_classes: as in :class:`ConvNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        num_blocks: int = 4,
        context_channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.first = nn.Conv2d(in_channels + (context_channels or 0), hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(_ConvBlock(hidden_channels) for _ in range(num_blocks))
        self.last = zero(nn.Conv2d(hidden_channels, out_channels, 1))
        self.labels = None if num_classes is None else zero(nn.Embedding(num_classes, hidden_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = _first(self, x, context)
        for block in self.blocks:
            h = block(h)
        return _conv1x1(self.last, F.relu(h))


class _ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu_(self.first(F.relu(x))))


def _first(network: ConvNet | ConvResNet, x: Tensor, context: Tensor | None) -> Tensor:
    """The first convolution, of the input and its context; channels-last on a CPU, whose convolutions are faster so."""
    beside, added = _beside_and_labels(network, x, context)
    h = network.first(beside.contiguous(memory_format=torch.channels_last) if x.is_cpu else beside)
    return h if added is None else h + added[:, :, None, None]


def _beside_and_labels(
    network: ConvNet | ConvResNet, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the first convolution sees, and what labels add to what it gives, [N, hidden]."""
    name = type(network).__name__
    if network.labels is None:
        return _beside(name, x, context, network.context_channels), None
    return x, network.labels(_labels(name, context, len(x)))


def _conv1x1(conv: nn.Conv2d, h: Tensor, *, relu: bool = False) -> Tensor:
    """``conv`` of a kernel of one pixel, and perhaps ReLU: where pixels are rows, one product of matrices."""
    if not h.is_contiguous(memory_format=torch.channels_last):
        y = conv(h)
        return F.relu_(y) if relu else y
    n, _, height, width = h.shape
    rows = F.linear(h.movedim(1, 3).flatten(0, 2), conv.weight.flatten(1), conv.bias)
    rows = F.relu_(rows) if relu else rows  # of rows, not of their view as an image, whose gradient would be copied
    return rows.view(n, height, width, conv.out_channels).movedim(3, 1)


def zero(layer: Any) -> Any:
    """``layer`` with all its parameters at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _beside(name: str, x: Tensor, context: Tensor | None, size: int | None) -> Tensor:
    """``x`` with the context in further channels."""
    if size is None:
        if context is not None:
            raise ValueError(f"{name}: context must be None, got shape {tuple(context.shape)}")
        return x
    expected = (len(x), size, *x.shape[2:])
    if context is None or tuple(context.shape) != expected:
        got = "None" if context is None else f"shape {tuple(context.shape)}"
        raise ValueError(f"{name}: context must be {list(expected)}, got {got}")
    return torch.cat([x, context], 1)


def _labels(name: str, context: Tensor | None, n: int) -> Tensor:
    if context is None or context.shape != (n,) or context.is_floating_point():
        got = "None" if context is None else f"{context.dtype} of shape {tuple(context.shape)}"
        raise ValueError(f"{name}: context must be labels, integers [N] = [{n}], got {got}")
    return context
