"""`PixelCNN`: one stack of masked convolutions, with ReLU.

Van den Oord et al. 2016 (Pixel recurrent neural networks).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MaskedConv2d
from ._configured import check_positive, count
from .autoregressive import (
    AutoregressiveModel,
    Condition,
    Conditioning,
    added,
    conditioning_config,
    outputs_config,
)

BLOCKS = ("bottleneck", "residual", "plain")


class PixelCNN(AutoregressiveModel):
    """PixelCNN: a masked convolution that does not see its pixel, and blocks of masked convolutions that do.

    A block is one of ``BLOCKS``:

    - ``"bottleneck"``: relu, 1x1 to half the channels, relu, k x k masked, relu, 1x1 back, beside a residual connection (the
      paper's, and `pytorch-generative`'s, whose state dicts load as they are);
    - ``"residual"``: relu, k x k masked, beside a residual connection;
    - ``"plain"``: k x k masked, relu: eight of 64 channels and 7 x 7, say.

    Args:
        in_channels: of the image; logits of a pixel see pixels, not channels, before it.
        channels: of the stack, even for ``"bottleneck"``.
        num_blocks: how many follow the first convolution.
        block: one of the three.
        kernel_size: of the blocks, odd.
        input_kernel_size: of the first convolution, odd.
        head_channels: of a layer before the logits, None for none.
        skip_gain: x of a residual connection is ``skip_gain x``; pytorch-generative adds x twice, which is 2.
        distribution: ``"categorical"`` or ``"bernoulli"``.
        levels: K, values that a channel can take; 2 for ``"bernoulli"``.
        num_classes: None, or the number of classes: a table a block, added to the output of its masked convolution.
        condition_channels: None, or channels of a map: a 1x1 convolution a block, added there too.
        unit_range: the network sees pixels in [0, 1], as pytorch-generative's do; the argument of ``forward`` is in [-1, 1] still.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (
        (r".*\.mask|_[chw]", ""),
        (r"_input\.(.*)", r"first.\1"),
        (r"_causal_layers\.(\d+)\._net\.1\.(.*)", r"blocks.\1.narrow.\2"),
        (r"_causal_layers\.(\d+)\._net\.3\.(.*)", r"blocks.\1.conv.\2"),
        (r"_causal_layers\.(\d+)\._net\.5\.(.*)", r"blocks.\1.widen.\2"),
        (r"_head\.1\.(.*)", r"head.\1"),
        (r"_head\.3\.(.*)", r"out.\1"),
    )

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 128,
        *,
        num_blocks: int = 15,
        block: str = "bottleneck",
        kernel_size: int = 3,
        input_kernel_size: int = 7,
        head_channels: int | None = 32,
        skip_gain: float = 1.0,
        distribution: str = "categorical",
        levels: int = 256,
        num_classes: int | None = None,
        condition_channels: int | None = None,
        unit_range: bool = False,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "channels": channels,
            "num_blocks": num_blocks,
            "block": block,
            "kernel_size": kernel_size,
            "input_kernel_size": input_kernel_size,
            "head_channels": head_channels,
            "skip_gain": skip_gain,
            "distribution": distribution,
            "levels": levels,
            "num_classes": num_classes,
            "condition_channels": condition_channels,
            "unit_range": unit_range,
        }
        _check_config(config)
        super().__init__(config, distribution)
        self.first = MaskedConv2d(in_channels, channels, input_kernel_size, "A")
        self.blocks = nn.ModuleList(
            PixelCNNBlock(channels, kernel_size, block, skip_gain, num_classes, condition_channels)
            for _ in range(num_blocks)
        )
        self.head = None if head_channels is None else nn.Conv2d(channels, head_channels, 1)
        self.out = nn.Conv2d(head_channels or channels, self._outputs, 1)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[N, C, H, W] -> logits [N, K, C, H, W], or [N, C, H, W] for ``"bernoulli"``; see :class:`AutoregressiveModel`.

        Raises:
            ValueError: a shape does not fit, or ``condition`` is missing or superfluous; the message names the argument.
        """
        self._check_input(x, condition)
        h = self.first(self._scaled(x))
        if self._config["block"] == "plain":
            h = F.relu(h)
        for block in self.blocks:
            h = block(h, condition)
        if self.head is not None:
            h = self.head(F.relu(h))
        return self._logits(self.out(F.relu(h)))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first, kernel = state["first.weight"], state["blocks.0.conv.weight"]
        narrowed = "blocks.0.narrow.weight" in state
        return {
            "in_channels": first.shape[1],
            "channels": first.shape[0],
            "num_blocks": count(state, r"blocks\.(\d+)\."),
            "block": "bottleneck" if narrowed else "plain",
            "kernel_size": kernel.shape[3],
            "input_kernel_size": first.shape[3],
            "head_channels": state["head.weight"].shape[0] if "head.weight" in state else None,
            "skip_gain": 2.0 if narrowed else 1.0,
            "unit_range": narrowed,
            **outputs_config(state, "out", first.shape[1]),
            **conditioning_config(state, "blocks.0.condition"),
        }


class PixelCNNBlock(nn.Module):
    """[N, channels, H, W] -> [N, channels, H, W]; see :class:`PixelCNN`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        kind: str,
        skip_gain: float,
        num_classes: int | None,
        condition_channels: int | None,
    ) -> None:
        super().__init__()
        self.kind, self.skip_gain = kind, skip_gain
        width = channels // 2 if kind == "bottleneck" else channels
        if kind == "bottleneck":
            self.narrow = nn.Conv2d(channels, width, 1)
            self.widen = nn.Conv2d(width, channels, 1)
        self.conv = MaskedConv2d(width, width, kernel_size, "B")
        self.condition = Conditioning(width, num_classes, condition_channels)

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        if self.kind == "plain":
            return F.relu(added(self.conv(x), self.condition(condition)))
        h = F.relu(x)
        if self.kind == "bottleneck":
            h = F.relu(self.narrow(h))
        h = added(self.conv(h), self.condition(condition))
        if self.kind == "bottleneck":
            h = self.widen(F.relu(h))
        return h + (x if self.skip_gain == 1 else self.skip_gain * x)


def _check_config(config: Mapping[str, Any]) -> None:
    name = "PixelCNN"
    check_positive(name, config, "channels", "num_blocks", "kernel_size", "input_kernel_size")
    check_positive(name, config, "head_channels", optional=True)
    for key in ("kernel_size", "input_kernel_size"):
        if config[key] % 2 == 0:
            raise ValueError(f"{name}: {key} must be odd, got {config[key]}")
    if config["block"] not in BLOCKS:
        raise ValueError(f"{name}: block must be one of {BLOCKS}, got {config['block']!r}")
    if config["block"] == "bottleneck" and config["channels"] % 2:
        raise ValueError(f"{name}: channels must be even for block='bottleneck', got {config['channels']}")
    if config["distribution"] == "logistic_mixture":
        raise ValueError(f"{name}: distribution must be 'categorical' or 'bernoulli', got 'logistic_mixture'")
