"""Halving and doubling the resolution of an image, with or without a convolution, as diffusion U-Nets do."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .conv2d import Conv2d, UpsampleConv2d, conv_of_upsampled, gathering


class Upsample(nn.Module):
    """[N, C, H, W] -> [N, out_channels, 2H, 2W]: nearest neighbour, then a 3x3 convolution if ``use_conv``.

    Args:
        channels: C.
        out_channels: C if None; another number needs ``use_conv``.
        use_conv: whether the convolution follows.
        conv: its class or factory, called as :class:`fastgen.nn.Conv2d`; in whose place :class:`fastgen.nn.UpsampleConv2d` does
            both in one.

    Raises:
        ValueError: ``out_channels`` differs from ``channels`` without ``use_conv``.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        use_conv: bool = True,
        conv: Callable[..., nn.Module] = Conv2d,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = _out_channels("Upsample", channels, out_channels, use_conv)
        self.conv = conv_of_upsampled(conv, channels, self.out_channels) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, UpsampleConv2d):
            return self.conv(x, **gathering(self.conv))  # a norm reads it next, in every network here
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.out_channels}, use_conv={self.conv is not None}"


class Downsample(nn.Module):
    """[N, C, H, W] -> [N, out_channels, H/2, W/2]: a 3x3 convolution of stride 2 if ``use_conv``, else the mean of 2x2.

    Args:
        channels: C.
        out_channels: C if None; another number needs ``use_conv``.
        use_conv: convolution or mean.
        padding: of the convolution: 1 on all sides, or 0, with one row below and one column at the right instead, as
            the autoencoder of latent diffusion has it; odd sizes are then rounded down, not up.

    Raises:
        ValueError: ``out_channels`` differs from ``channels`` without ``use_conv``, or ``padding`` is another number.
    """

    def __init__(
        self, channels: int, out_channels: int | None = None, *, use_conv: bool = True, padding: int = 1
    ) -> None:
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"Downsample: padding must be 0 or 1, got {padding}")
        self.channels = channels
        self.out_channels = _out_channels("Downsample", channels, out_channels, use_conv)
        self.conv = nn.Conv2d(channels, self.out_channels, 3, stride=2, padding=padding) if use_conv else None
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))

    def extra_repr(self) -> str:
        padding = "" if self.padding else ", padding=0"
        return f"{self.channels}, {self.out_channels}, use_conv={self.conv is not None}{padding}"


def _out_channels(name: str, channels: int, out_channels: int | None, use_conv: bool) -> int:
    if out_channels is not None and out_channels != channels and not use_conv:
        raise ValueError(
            f"{name}: without use_conv out_channels must equal channels, got channels={channels} and "
            f"out_channels={out_channels}"
        )
    return channels if out_channels is None else out_channels
