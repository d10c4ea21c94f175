"""`PixelSNAIL`: gated causal convolutions, and attention over all pixels before.

Chen et al. 2018 (PixelSNAIL: an improved autoregressive generative model), with a skip connection of every block.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MaskedConv2d
from ..ops import gated_activation
from ._configured import check_positive, count
from ._shifted_conv2d import ShiftedConv2d
from .autoregressive import (
    AutoregressiveModel,
    Condition,
    Conditioning,
    conditioning_config,
    outputs_config,
)


class PixelSNAIL(AutoregressiveModel):
    """PixelSNAIL in the form of `pytorch-generative`, whose state dicts load as they are.

    Args:
        in_channels: of the image; logits of a pixel see pixels, not channels, before it.
        channels: of the convolutions, even.
        num_blocks: each of residual blocks and an attention.
        num_residual: residual blocks of a block.
        key_channels: of queries and keys.
        value_channels: of values.
        distribution: ``"categorical"`` or ``"bernoulli"``.
        levels: K, values that a channel can take; 2 for ``"bernoulli"``.
        num_classes: None, or the number of classes: a table a residual block, added inside its gate.
        condition_channels: None, or channels of a map: a 1x1 convolution a residual block, added inside its gate.
        unit_range: the network sees pixels in [0, 1], as pytorch-generative's do; the argument of ``forward`` is in [-1, 1] still.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (
        (r".*\.mask|_[chw]", ""),
        (r"_input\.(.*)", r"first.\1"),
        (r"_pixel_snail_blocks\.(\d+)\._residual\.(\d+)\._input_conv\.(.*)", r"blocks.\1.residual.\2.conv_1.\3"),
        (r"_pixel_snail_blocks\.(\d+)\._residual\.(\d+)\._output_conv\.(.*)", r"blocks.\1.residual.\2.conv_2.\3"),
        (r"_pixel_snail_blocks\.(\d+)\._attention\._q\.(.*)", r"blocks.\1.attention.query.\2"),
        (r"_pixel_snail_blocks\.(\d+)\._attention\._kv\.(.*)", r"blocks.\1.attention.key_value.\2"),
        (r"_pixel_snail_blocks\.(\d+)\._attention\._proj\.(.*)", r"blocks.\1.attention.out.\2"),
        (r"_pixel_snail_blocks\.(\d+)\._(residual_out|attention_out|out)\.(.*)", r"blocks.\1.\2.\3"),
        (r"_output\.0\.(.*)", r"head.\1"),
        (r"_output\.1\.(.*)", r"out.\1"),
    )

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 64,
        *,
        num_blocks: int = 8,
        num_residual: int = 2,
        key_channels: int = 4,
        value_channels: int = 32,
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
            "num_residual": num_residual,
            "key_channels": key_channels,
            "value_channels": value_channels,
            "distribution": distribution,
            "levels": levels,
            "num_classes": num_classes,
            "condition_channels": condition_channels,
            "unit_range": unit_range,
        }
        _check_config(config)
        super().__init__(config, distribution)

        def block() -> PixelSNAILBlock:
            residual = [SNAILResBlock(channels, num_classes, condition_channels) for _ in range(num_residual)]
            return PixelSNAILBlock(residual, channels, in_channels, key_channels, value_channels)

        self.first = MaskedConv2d(in_channels, channels, 3, "A")
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))
        self.head = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Conv2d(channels // 2, self._outputs, 1)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[N, C, H, W] -> logits [N, K, C, H, W], or [N, C, H, W] for ``"bernoulli"``; see :class:`AutoregressiveModel`.

        Raises:
            ValueError: a shape does not fit, or ``condition`` is missing or superfluous; the message names the argument.
        """
        self._check_input(x, condition)
        image = self._scaled(x)
        position = pixel_positions(image)
        h = self.first(image)
        for block in self.blocks:
            h = h + block(h, image, position, condition)
        return self._logits(self.out(self.head(h)))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first, query = state["first.weight"], state["blocks.0.attention.query.weight"]
        return {
            "in_channels": first.shape[1],
            "channels": first.shape[0],
            "num_blocks": count(state, r"blocks\.(\d+)\."),
            "num_residual": count(state, r"blocks\.0\.residual\.(\d+)\."),
            "key_channels": query.shape[0],
            "value_channels": state["blocks.0.attention.out.weight"].shape[0],
            "unit_range": True,
            **outputs_config(state, "out", first.shape[1]),
            **conditioning_config(state, "blocks.0.residual.0.condition"),
        }


class SNAILResBlock(nn.Module):
    """x + a sigmoid(b), (a, b) = conv(elu(conv(elu(x)))) + condition; the 2 x 2 kernels end in the pixel of the output."""

    def __init__(self, channels: int, num_classes: int | None, condition_channels: int | None) -> None:
        super().__init__()
        self.conv_1 = ShiftedConv2d(channels, channels, (2, 2))
        self.conv_2 = ShiftedConv2d(channels, 2 * channels, (2, 2))
        self.condition = Conditioning(2 * channels, num_classes, condition_channels)

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        h = self.conv_2(F.elu(self.conv_1(F.elu(x))))
        return x + gated_activation(h, self.condition(condition), activation="identity")


class PixelSNAILBlock(nn.Module):
    """Residual blocks, and an attention of their output, its keys and values of the image too, over the pixels before."""

    def __init__(
        self, residual: list[SNAILResBlock], channels: int, in_channels: int, key_channels: int, value_channels: int
    ) -> None:
        super().__init__()
        self.residual = nn.ModuleList(residual)
        self.attention = StrictlyCausalAttention(channels + 2, in_channels, key_channels, value_channels)
        self.residual_out = nn.Conv2d(channels, channels, 1)
        self.attention_out = nn.Conv2d(value_channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, image: Tensor, position: Tensor, condition: Condition | None) -> Tensor:
        for block in self.residual:
            x = block(x, condition)
        attended = self.attention(torch.cat([position, x], 1), image)
        attended = F.elu(self.attention_out(F.elu(attended)))
        return F.elu(self.out(F.elu(F.elu(self.residual_out(F.elu(x))) + attended)))


class StrictlyCausalAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v of one head over the pixels before the query's own; the first pixel has none and gets 0.

    q is of ``x`` [N, C, H, W] alone, k and v are of ``x`` and the ``image``, which the query's own pixel must not see.
    """

    def __init__(self, channels: int, image_channels: int, key_channels: int, value_channels: int) -> None:
        super().__init__()
        self.key_channels, self.value_channels = key_channels, value_channels
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key_value = nn.Conv2d(channels + image_channels, key_channels + value_channels, 1)
        self.out = nn.Conv2d(value_channels, value_channels, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        q = self.query(x).flatten(2).transpose(1, 2)  # [N, L, E]
        key_value = self.key_value(torch.cat([x, image], 1)).flatten(2)
        k, v = key_value.split([self.key_channels, self.value_channels], 1)  # [N, E, L], [N, V, L]
        length = q.shape[1]
        unseen = torch.ones(length, length, dtype=torch.bool, device=x.device).triu()
        weights = (q @ k / math.sqrt(self.key_channels)).masked_fill(unseen, -math.inf).softmax(-1)
        weights = weights.masked_fill(unseen, 0.0)  # the first row is NaN
        return self.out((weights @ v.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]))


def pixel_positions(image: Tensor) -> Tensor:
    """[N, 2, H, W]: y / H - 1/2 and x / W - 1/2."""
    n, _, height, width = image.shape
    y, x = (torch.arange(size, device=image.device, dtype=image.dtype) / size - 0.5 for size in (height, width))
    return torch.stack([y[:, None].expand(height, width), x.expand(height, width)]).expand(n, 2, height, width)


def _check_config(config: Mapping[str, Any]) -> None:
    name = "PixelSNAIL"
    check_positive(name, config, "channels", "num_blocks", "num_residual", "key_channels", "value_channels")
    if config["channels"] % 2:
        raise ValueError(f"{name}: channels must be even, got {config['channels']}")
    if config["distribution"] == "logistic_mixture":
        raise ValueError(f"{name}: distribution must be 'categorical' or 'bernoulli', got 'logistic_mixture'")
