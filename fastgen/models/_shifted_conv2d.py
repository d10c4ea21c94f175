"""`ShiftedConv2d`: the causal convolution of models whose kernels hold nothing that is masked."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masked_conv2d


class ShiftedConv2d(nn.Conv2d):
    """A causal convolution without a mask: its kernel ends in the row of the output, and is as small as what it reads.

    Output (y, x) reads the rows y - d (k_h - 1), ..., y, all one further up where ``above``; and where ``centred`` the columns
    from x - d (k_w - 1) / 2 to x + d (k_w - 1) / 2, else x - d (k_w - 1), ..., x, all one further left where ``before``. The image
    keeps its size. :func:`fastgen.ops.masked_conv2d` with ``"down"`` or ``"down_right"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        centred: bool = False,
        above: bool = False,
        before: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation)
        self.mask_type = "down" if centred else "down_right"
        self.above, self.before = above, before

    def forward(self, x: Tensor) -> Tensor:
        if self.above or self.before:
            x = moved(x, int(self.above), int(self.before))
        dilation: Any = self.dilation
        return masked_conv2d(x, self.weight, self.bias, mask_type=self.mask_type, dilation=dilation)


def moved(x: Tensor, down: int, right: int) -> Tensor:
    """An image by that many pixels down and right, zeros where nothing was."""
    return F.pad(x[:, :, : x.shape[2] - down, : x.shape[3] - right], (right, 0, down, 0))
