"""`WaveNet`: dilated causal convolutions over a sequence, gated, with residual and skip connections.

Van den Oord et al. 2016 (WaveNet: a generative model for raw audio).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gated_activation
from ._configured import check_positive, count
from ._shifted_conv2d import ShiftedConv2d
from .autoregressive import (
    AutoregressiveModel,
    Condition,
    Conditioning,
    conditioning_config,
    outputs_config,
    split_condition,
)

TWICE_TEN = 2 * (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class WaveNet(AutoregressiveModel):
    """WaveNet, for a sequence or, what is the same, an image of height 1.

    Args:
        in_channels: of the sequence; logits of a sample see samples, not channels, before it.
        channels: of the residual connections and of the gates.
        skip_channels: of the skip connections.
        dilations: of the kernels, one a layer: 1, 2, 4, ..., 512 and again, say.
        kernel_size: of all causal convolutions.
        distribution: ``"categorical"`` or ``"bernoulli"``.
        levels: K, values that a channel can take, as by the mu-law; 2 for ``"bernoulli"``.
        num_classes: None, or the number of classes (speakers): the global condition, a table a layer, added inside its gate.
        condition_channels: None, or channels of a map: the local condition, at the rate of the samples, a 1x1 convolution a layer,
            added inside its gate.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 32,
        *,
        skip_channels: int = 128,
        dilations: Sequence[int] = TWICE_TEN,
        kernel_size: int = 2,
        distribution: str = "categorical",
        levels: int = 256,
        num_classes: int | None = None,
        condition_channels: int | None = None,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "channels": channels,
            "skip_channels": skip_channels,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "distribution": distribution,
            "levels": levels,
            "num_classes": num_classes,
            "condition_channels": condition_channels,
        }
        _check_config(config)
        super().__init__(config, distribution)
        self.first = ShiftedConv2d(in_channels, channels, (1, kernel_size), before=True)
        self.layers = nn.ModuleList(
            WaveNetLayer(channels, skip_channels, kernel_size, dilation, num_classes, condition_channels)
            for dilation in dilations
        )
        self.head = nn.Conv2d(skip_channels, skip_channels, 1)
        self.out = nn.Conv2d(skip_channels, self._outputs, 1)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[N, C, T] or [N, C, 1, T] -> logits [N, K, C, T] or [N, K, C, 1, T], of ``"bernoulli"`` without K.

        A map in ``condition`` has as many dimensions as ``x``; see :class:`AutoregressiveModel`.

        Raises:
            ValueError: a shape does not fit, or ``condition`` is missing or superfluous; the message names the argument.
        """
        if x.dim() == 3:
            return self(x.unsqueeze(2), _as_row(condition)).squeeze(-2)
        self._check_input(x, condition)
        if x.shape[2] != 1:
            raise ValueError(
                f"WaveNet: x must be of height 1, [N, {self.in_channels}, 1, T], got shape {tuple(x.shape)}"
            )
        h = self.first(x)
        skips: Tensor | None = None
        for layer in self.layers:
            h, skip = layer(h, condition)
            skips = skip if skips is None else skips + skip
        assert skips is not None  # there is a layer
        return self._logits(self.out(F.relu(self.head(F.relu(skips)))))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first = state["first.weight"]
        return {
            "in_channels": first.shape[1],
            "channels": first.shape[0],
            "skip_channels": state["head.weight"].shape[0],
            "dilations": [1] * count(state, r"layers\.(\d+)\."),
            "kernel_size": first.shape[3],
            **outputs_config(state, "out", first.shape[1]),
            **conditioning_config(state, "layers.0.condition"),
        }


class WaveNetLayer(nn.Module):
    """x [N, C, 1, T] -> (x + residual(z), skip(z)), z = tanh(a) sigmoid(b), (a, b) = conv(x) + condition."""

    def __init__(
        self,
        channels: int,
        skip_channels: int,
        kernel_size: int,
        dilation: int,
        num_classes: int | None,
        condition_channels: int | None,
    ) -> None:
        super().__init__()
        self.conv = ShiftedConv2d(channels, 2 * channels, (1, kernel_size), dilation=dilation)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, skip_channels, 1)
        self.condition = Conditioning(2 * channels, num_classes, condition_channels)

    def forward(self, x: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        gated = gated_activation(self.conv(x), self.condition(condition))
        return x + self.residual(gated), self.skip(gated)


def _as_row(condition: Condition | None) -> Condition | None:
    """A map [N, D, T] in ``condition`` as [N, D, 1, T]."""
    labels, area = split_condition(condition)
    if area is None:
        return condition
    area = area.unsqueeze(2)
    return area if labels is None else (labels, area)


def _check_config(config: Mapping[str, Any]) -> None:
    name = "WaveNet"
    check_positive(name, config, "channels", "skip_channels", "kernel_size")
    dilations = config["dilations"]
    if not dilations or not all(isinstance(d, int) and d >= 1 for d in dilations):
        raise ValueError(f"{name}: dilations must be positive integers, one a layer, got {dilations}")
    if config["distribution"] == "logistic_mixture":
        raise ValueError(f"{name}: distribution must be 'categorical' or 'bernoulli', got 'logistic_mixture'")
