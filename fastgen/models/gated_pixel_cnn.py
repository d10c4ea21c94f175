"""`GatedPixelCNN`: a stack of convolutions over the rows above and one over the pixels to the left, gated, and no blind spot.

Van den Oord et al. 2016 (Conditional image generation with PixelCNN decoders).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gated_activation
from ._configured import check_positive, count
from ._shifted_conv2d import ShiftedConv2d
from .autoregressive import (
    AutoregressiveModel,
    Condition,
    Conditioning,
    added,
    channels_innermost,
    conditioning_config,
    outputs_config,
)

TUTORIAL_DILATIONS = (1, 2, 1, 4, 1, 2, 1)


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN, in one of two forms.

    The plain one is that of the UvA deep-learning course (tutorial on autoregressive image modeling): dilated layers, the logits
    from the horizontal stack. ``factorized`` is that of `pytorch-generative`: the kernel of the vertical stack is 1 x k, then
    (k // 2 + 1) x 1, with a 1x1 convolution around it, and the logits come from the sum of skip connections of all layers. State
    dicts of both load as they are.

    Args:
        in_channels: of the image; logits of a pixel see pixels, not channels, before it.
        channels: of both stacks.
        dilations: of the kernels, one a layer.
        kernel_size: of the layers, odd.
        input_kernel_size: of the first convolutions, odd.
        factorized: the second form.
        head_channels: of the layer before the logits; only, and needed, where ``factorized``.
        distribution: ``"categorical"`` or ``"bernoulli"``.
        levels: K, values that a channel can take; 2 for ``"bernoulli"``.
        num_classes: None, or the number of classes: a table a layer, added inside the gates.
        condition_channels: None, or channels of a map: a 1x1 convolution a layer, added inside the gates.
        unit_range: the network sees pixels in [0, 1], as pytorch-generative's do; the argument of ``forward`` is in [-1, 1] still.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (
        (r".*\.mask|_[chw]", ""),
        # the course's tutorial, and pytorch-lightning's checkpoints of it
        (r"conv_vstack\.conv\.(.*)", r"vertical_in.\1"),
        (r"conv_hstack\.conv\.(.*)", r"horizontal_in.\1"),
        (r"conv_layers\.(\d+)\.conv_vert\.conv\.(.*)", r"layers.\1.vertical.\2"),
        (r"conv_layers\.(\d+)\.conv_horiz\.conv\.(.*)", r"layers.\1.horizontal.\2"),
        (r"conv_layers\.(\d+)\.conv_vert_to_horiz\.(.*)", r"layers.\1.link.\2"),
        (r"conv_layers\.(\d+)\.conv_horiz_1x1\.(.*)", r"layers.\1.residual.\2"),
        (r"conv_out\.(.*)", r"out.\1"),
        # pytorch-generative
        *(
            (layer + theirs + r"\.(weight|bias)", ours_layer + ours + number)
            for layer, ours_layer, number in (
                (r"_input\.", "first.", r".\1"),
                (r"_gated_layers\.(\d+)\.", r"layers.\1.", r".\2"),
            )
            for theirs, ours in (
                ("_vstack_1xN", "across"),
                ("_vstack_Nx1", "down"),
                ("_vstack_1x1", "vertical"),
                ("_link", "link"),
                ("_hstack_1xN", "horizontal"),
                ("_hstack_residual", "residual"),
                ("_hstack_skip", "skip"),
            )
        ),
        (r"_head\.1\.(.*)", r"head.\1"),
        (r"_head\.3\.(.*)", r"out.\1"),
    )

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 64,
        *,
        dilations: Sequence[int] = TUTORIAL_DILATIONS,
        kernel_size: int = 3,
        input_kernel_size: int = 3,
        factorized: bool = False,
        head_channels: int | None = None,
        distribution: str = "categorical",
        levels: int = 256,
        num_classes: int | None = None,
        condition_channels: int | None = None,
        unit_range: bool = False,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "channels": channels,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "input_kernel_size": input_kernel_size,
            "factorized": factorized,
            "head_channels": head_channels,
            "distribution": distribution,
            "levels": levels,
            "num_classes": num_classes,
            "condition_channels": condition_channels,
            "unit_range": unit_range,
        }
        _check_config(config)
        super().__init__(config, distribution)
        conditions = (num_classes, condition_channels)
        self.first: FactorizedGatedLayer | None = None
        if factorized:
            assert head_channels is not None
            self.first = FactorizedGatedLayer(in_channels, channels, input_kernel_size, 1, *conditions, before=True)
            self.layers = nn.ModuleList(
                FactorizedGatedLayer(channels, channels, kernel_size, dilation, *conditions) for dilation in dilations
            )
            self.head = nn.Conv2d(channels, head_channels, 1)
            self.out = nn.Conv2d(head_channels, self._outputs, 1)
        else:
            half = input_kernel_size // 2
            self.vertical_in = ShiftedConv2d(in_channels, channels, (half, input_kernel_size), centred=True, above=True)
            self.horizontal_in = ShiftedConv2d(in_channels, channels, (1, half), before=True)
            self.layers = nn.ModuleList(
                GatedLayer(channels, kernel_size, dilation, *conditions) for dilation in dilations
            )
            self.out = nn.Conv2d(channels, self._outputs, 1)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[N, C, H, W] -> logits [N, K, C, H, W], or [N, C, H, W] for ``"bernoulli"``; see :class:`AutoregressiveModel`.

        Raises:
            ValueError: a shape does not fit, or ``condition`` is missing or superfluous; the message names the argument.
        """
        self._check_input(x, condition)
        x = self._scaled(x)
        if self.first is None:
            vertical, horizontal = (channels_innermost(first(x)) for first in (self.vertical_in, self.horizontal_in))
            for layer in self.layers:
                vertical, horizontal = layer(vertical, horizontal, condition)
            return self._logits(self.out(F.elu(horizontal)))
        vertical, horizontal, skips = self.first(x, x, condition)
        for layer in self.layers:
            vertical, horizontal, skip = layer(vertical, horizontal, condition)
            skips = skips + skip
        return self._logits(self.out(F.relu(self.head(F.relu(skips)))))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        depth = count(state, r"layers\.(\d+)\.")
        channels = state["layers.0.residual.weight"].shape[0]
        factorized = "first.across.weight" in state
        first = state["first.across.weight" if factorized else "vertical_in.weight"]
        found: dict[str, Any] = {
            "in_channels": first.shape[1],
            "channels": channels,
            "input_kernel_size": first.shape[3],
            "factorized": factorized,
            "unit_range": factorized,
            **outputs_config(state, "out", first.shape[1]),
            **conditioning_config(state, "layers.0.condition"),
        }
        if factorized:
            kernel = state["layers.0.across.weight"]
            return found | {
                "kernel_size": kernel.shape[3],
                "dilations": [1] * depth,
                "head_channels": state["head.weight"].shape[0],
            }
        dilations = TUTORIAL_DILATIONS if depth == len(TUTORIAL_DILATIONS) else [1] * depth
        return found | {"kernel_size": state["layers.0.vertical.weight"].shape[3], "dilations": list(dilations)}


class GatedLayer(nn.Module):
    """(vertical, horizontal) [N, C, H, W] -> the same, with

    ``above = conv(vertical) + condition``, ``vertical = gate(above)``,
    ``horizontal += residual(gate(conv(horizontal) + link(above)))``.
    """

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, num_classes: int | None, condition_channels: int | None
    ) -> None:
        super().__init__()
        half = kernel_size // 2 + 1
        self.vertical = ShiftedConv2d(channels, 2 * channels, (half, kernel_size), centred=True, dilation=dilation)
        self.horizontal = ShiftedConv2d(channels, 2 * channels, (1, half), dilation=dilation)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.condition = Conditioning(2 * channels, num_classes, condition_channels)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        above = added(self.vertical(vertical), self.condition(condition))  # in the gate below too, by way of the link
        beside = self.horizontal(horizontal) + self.link(above)
        return gated_activation(above), horizontal + self.residual(gated_activation(beside))


class FactorizedGatedLayer(nn.Module):
    """(vertical, horizontal) [N, C, H, W] -> the same and a skip connection.

    The first layer (``before``) reads the image, in which the pixel itself must not be seen, and has no residual connection.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        dilation: int,
        num_classes: int | None,
        condition_channels: int | None,
        *,
        before: bool = False,
    ) -> None:
        super().__init__()
        half = kernel_size // 2 + 1
        self.before = before
        self.across = ShiftedConv2d(in_channels, channels, (1, kernel_size), centred=True, dilation=dilation)
        self.down = ShiftedConv2d(channels, 2 * channels, (half, 1), above=True, dilation=dilation)
        self.vertical = nn.Conv2d(in_channels, 2 * channels, 1)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = ShiftedConv2d(in_channels, 2 * channels, (1, half), before=before, dilation=dilation)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.condition = Conditioning(2 * channels, num_classes, condition_channels)

    def forward(
        self, vertical: Tensor, horizontal: Tensor, condition: Condition | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        above = added(self.down(self.across(vertical)), self.condition(condition))
        gated = gated_activation(self.link(above) + self.horizontal(horizontal))
        residual = self.residual(gated)
        return (
            gated_activation(above + self.vertical(vertical)),
            residual if self.before else horizontal + residual,
            self.skip(gated),
        )


def _check_config(config: Mapping[str, Any]) -> None:
    name = "GatedPixelCNN"
    check_positive(name, config, "channels", "kernel_size", "input_kernel_size")
    check_positive(name, config, "head_channels", optional=True)
    for key in ("kernel_size", "input_kernel_size"):
        if config[key] % 2 == 0 or config[key] < 3:
            raise ValueError(f"{name}: {key} must be odd and at least 3, got {config[key]}")
    dilations = config["dilations"]
    if not dilations or not all(isinstance(d, int) and d >= 1 for d in dilations):
        raise ValueError(f"{name}: dilations must be positive integers, one a layer, got {dilations}")
    if config["factorized"] != (config["head_channels"] is not None):
        raise ValueError(
            f"{name}: head_channels must be given if and only if factorized, got head_channels={config['head_channels']} "
            f"and factorized={config['factorized']}"
        )
    if config["distribution"] == "logistic_mixture":
        raise ValueError(f"{name}: distribution must be 'categorical' or 'bernoulli', got 'logistic_mixture'")
