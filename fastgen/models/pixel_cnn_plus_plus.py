"""`PixelCNNPlusPlus`: PixelCNN with a discretised logistic mixture, two streams, two downsamplings and their way back.

Salimans et al. 2017 (PixelCNN++).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import concat_elu, gated_activation
from ._configured import check_positive, count
from ._shifted_conv2d import moved
from .autoregressive import (
    AutoregressiveModel,
    Condition,
    Conditioning,
    conditioning_config,
    split_condition,
)

DOWNSAMPLING = 4
ABOVE, BESIDE = (2, 3), (2, 2)  # kernels of the two streams


class PixelCNNPlusPlus(AutoregressiveModel):
    """PixelCNN++ in the form of the PyTorch port `pixel-cnn-pp`, whose state dicts load as they are.

    The ``above`` stream of features sees the rows above a pixel, the ``beside`` stream what is left of it too. Three stages on the
    way down, three on the way up, the latter with skip connections from every block of the former.

    Args:
        in_channels: of the image, 1 or 3; of three, green is drawn given red, and blue given both, by the mixture itself.
        channels: of both streams.
        num_resnet: residual blocks a stage, one more in the second and third on the way up.
        mixtures: M, logistics of a pixel.
        levels: K, values that a channel can take.
        dropout: rate at which channels are dropped inside the residual blocks in training.
        num_classes: None, or the number of classes: a table a residual block, added inside its gate.
        condition_channels: None, or channels of a map: a 1x1 convolution a residual block, added inside its gate; the map is
            averaged over what a pixel of a lower resolution stands for.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (
        (r"u_init\.conv\.(.*)", r"above_in.\1"),
        (r"ul_init\.0\.conv\.(.*)", r"beside_in.0.\1"),
        (r"ul_init\.1\.conv\.(.*)", r"beside_in.1.\1"),
        *(
            (rf"{theirs}\.(\d+)\.{stream}_stream\.(\d+)\.{layer}\.(.*)", rf"{ours}.\1.\2.{name}.{our_layer}.\3")
            for theirs, ours in (("up_layers", "encoder"), ("down_layers", "decoder"))
            for stream, name in (("u", "above"), ("ul", "beside"))
            for layer, our_layer in (
                (r"conv_input\.conv", "conv_1"),
                (r"conv_out\.conv", "conv_2"),
                (r"nin_skip\.lin_a", "skip"),
            )
        ),
        (r"downsize_u_stream\.(\d+)\.conv\.(.*)", r"down.\1.above.\2"),
        (r"downsize_ul_stream\.(\d+)\.conv\.(.*)", r"down.\1.beside.\2"),
        (r"upsize_u_stream\.(\d+)\.deconv\.(.*)", r"up.\1.above.\2"),
        (r"upsize_ul_stream\.(\d+)\.deconv\.(.*)", r"up.\1.beside.\2"),
        (r"nin_out\.lin_a\.(.*)", r"out.\1"),
    )

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 80,
        *,
        num_resnet: int = 5,
        mixtures: int = 10,
        levels: int = 256,
        dropout: float = 0.5,
        num_classes: int | None = None,
        condition_channels: int | None = None,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "channels": channels,
            "num_resnet": num_resnet,
            "mixtures": mixtures,
            "levels": levels,
            "dropout": dropout,
            "num_classes": num_classes,
            "condition_channels": condition_channels,
        }
        _check_config(config)
        super().__init__(config, "logistic_mixture")

        def stage(blocks: int, skip_above: int, skip_beside: int) -> nn.ModuleList:
            rest = (dropout, num_classes, condition_channels)
            return nn.ModuleList(
                Pair(
                    GatedResBlock(channels, ABOVE, skip_above, *rest),
                    GatedResBlock(channels, BESIDE, skip_beside, *rest),
                )
                for _ in range(blocks)
            )

        self.above_in = NormedConv2d(in_channels + 1, channels, (2, 3), centred=True)
        self.beside_in = nn.ModuleList(
            [
                NormedConv2d(in_channels + 1, channels, (1, 3), centred=True),
                NormedConv2d(in_channels + 1, channels, (2, 1)),
            ]
        )
        self.encoder = nn.ModuleList(stage(num_resnet, 0, 1) for _ in range(3))
        self.decoder = nn.ModuleList(stage(blocks, 1, 2) for blocks in (num_resnet, num_resnet + 1, num_resnet + 1))
        self.down = nn.ModuleList(
            Streams(
                NormedConv2d(channels, channels, ABOVE, centred=True, stride=2),
                NormedConv2d(channels, channels, BESIDE, stride=2),
            )
            for _ in range(2)
        )
        self.up = nn.ModuleList(
            Streams(NormedUpConv2d(channels, ABOVE, centred=True), NormedUpConv2d(channels, BESIDE)) for _ in range(2)
        )
        self.out = NormedConv2d(channels, (3 if in_channels == 1 else 10) * mixtures, (1, 1))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[N, C, H, W], H and W divisible by 4 -> [N, 3 M, H, W] or [N, 10 M, H, W]; see :class:`AutoregressiveModel`.

        Raises:
            ValueError: a shape does not fit, or ``condition`` is missing or superfluous; the message names the argument.
        """
        self._check_input(x, condition)
        if x.shape[2] % DOWNSAMPLING or x.shape[3] % DOWNSAMPLING or 0 in x.shape[2:]:
            raise ValueError(
                f"PixelCNNPlusPlus: height and width of x must be divisible by {DOWNSAMPLING}, got shape {tuple(x.shape)}"
            )
        conditions = [condition, _halved(condition), _halved(_halved(condition))]
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # the ones tell the image from the zeros around it
        # what is moved is the output, bias and all: the first row, or column, is 0
        above = moved(self.above_in(x), 1, 0)
        beside = moved(self.beside_in[0](x), 1, 0) + moved(self.beside_in[1](x), 0, 1)
        skips = [(above, beside)]
        for level, stage in enumerate(self.encoder):
            for pair in stage.children():
                above, beside = pair(above, beside, conditions[level])
                skips.append((above, beside))
            if level < 2:
                above, beside = self.down[level](above, beside)
                skips.append((above, beside))
        above, beside = skips.pop()
        for i, stage in enumerate(self.decoder):
            for pair in stage.children():
                above, beside = pair(above, beside, conditions[2 - i], *skips.pop())
            if i < 2:
                above, beside = self.up[i](above, beside)
        return self.out(F.elu(beside))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first = state["above_in.weight_v"]
        in_channels = first.shape[1] - 1
        return {
            "in_channels": in_channels,
            "channels": first.shape[0],
            "num_resnet": count(state, r"encoder\.0\.(\d+)\."),
            "mixtures": state["out.weight_v"].shape[0] // (3 if in_channels == 1 else 10),
            **conditioning_config(state, "encoder.0.0.above.condition"),
        }


class Streams(nn.Module):
    """A layer of either stream."""

    def __init__(self, above: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.above, self.beside = above, beside

    def forward(self, above: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        return self.above(above), self.beside(beside)


class Pair(Streams):
    """A residual block of either stream; that of ``beside`` is given ``above`` too, and on the way up both have a skip."""

    def forward(  # type: ignore[override]  # what it is given besides
        self,
        above: Tensor,
        beside: Tensor,
        condition: Condition | None,
        skip_above: Tensor | None = None,
        skip_beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        above = self.above(above, skip_above, condition)
        other = above if skip_beside is None else torch.cat([above, skip_beside], 1)
        return above, self.beside(beside, other, condition)


class GatedResBlock(nn.Module):
    """x + a sigmoid(b), (a, b) = conv_2(dropout(f(conv_1(f(x)) + skip(f(other))))) + condition, with f = concat_elu.

    ``other`` has ``skips`` times as many channels as ``x``, and is None where that is 0.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        skips: int,
        dropout: float,
        num_classes: int | None,
        condition_channels: int | None,
    ) -> None:
        super().__init__()
        centred = kernel_size == ABOVE
        self.conv_1 = NormedConv2d(2 * channels, channels, kernel_size, centred=centred)
        self.skip = NormedConv2d(2 * skips * channels, channels, (1, 1)) if skips else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_2 = NormedConv2d(2 * channels, 2 * channels, kernel_size, centred=centred)
        self.condition = Conditioning(2 * channels, num_classes, condition_channels)

    def forward(self, x: Tensor, other: Tensor | None, condition: Condition | None) -> Tensor:
        h = self.conv_1(concat_elu(x))
        if self.skip is not None:
            assert other is not None
            h = h + self.skip(concat_elu(other))
        h = self.conv_2(self.dropout(concat_elu(h)))
        return x + gated_activation(h, self.condition(condition), activation="identity")


class NormedConv2d(nn.Conv2d):
    """A causal convolution with weight normalisation (Salimans and Kingma 2016): weight = g v / |v|, a norm each output.

    Output (y, x) reads the rows s y - k_h + 1, ..., s y for the stride s, and as many columns up to s x or, ``centred``, around it.
    """

    weight_v: nn.Parameter
    weight_g: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        centred: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        rows, columns = kernel_size[0] - 1, kernel_size[1] - 1
        self._around = (columns // 2, columns // 2, rows, 0) if centred else (columns, 0, rows, 0)
        normalise_weight(self)

    def forward(self, x: Tensor) -> Tensor:
        # a weight made anew each time is not worth packing, as masked_conv2d would
        x = F.pad(x, self._around) if any(self._around) else x
        return F.conv2d(x, normed(self.weight_v, self.weight_g), self.bias, self.stride)


class NormedUpConv2d(nn.ConvTranspose2d):
    """[N, C, H, W] -> [N, C, 2 H, 2 W]: of the transposed convolution, the rows and columns that are causal; a norm each input."""

    weight_v: nn.Parameter
    weight_g: nn.Parameter

    def __init__(self, channels: int, kernel_size: tuple[int, int], *, centred: bool = False) -> None:
        super().__init__(channels, channels, kernel_size, stride=2, output_padding=1)
        self._first_column = (kernel_size[1] - 1) // 2 if centred else 0
        normalise_weight(self)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        full = F.conv_transpose2d(
            x, normed(self.weight_v, self.weight_g), self.bias, self.stride, 0, self.output_padding
        )
        left = self._first_column
        return full[:, :, : 2 * x.shape[2], left : left + 2 * x.shape[3]]


def normalise_weight(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """In place of ``weight`` its direction ``weight_v`` and its norms ``weight_g`` [first dimension, 1, 1, 1]."""
    weight = conv.weight.detach()
    del conv.weight
    conv.weight_v = nn.Parameter(weight)
    conv.weight_g = nn.Parameter(torch.norm_except_dim(weight, 2, 0))


def normed(direction: Tensor, norms: Tensor) -> Tensor:
    return direction * (norms / torch.norm_except_dim(direction, 2, 0))


def _halved(condition: Condition | None) -> Condition | None:
    """A condition for half the resolution: the map averaged over 2 x 2, labels as they are."""
    labels, area = split_condition(condition)
    if area is None:
        return condition
    half = F.avg_pool2d(area, 2)
    return half if labels is None else (labels, half)


def _check_config(config: Mapping[str, Any]) -> None:
    name = "PixelCNNPlusPlus"
    check_positive(name, config, "channels", "num_resnet", "mixtures")
    if config["in_channels"] not in (1, 3):
        raise ValueError(f"{name}: in_channels must be 1 or 3, got {config['in_channels']!r}")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {config['dropout']}")
