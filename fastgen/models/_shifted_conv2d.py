"""`ShiftedConv2d`: the causal convolution of models whose kernels hold nothing that is masked."""

import torch.nn.functional as F
from torch import Tensor, nn


class ShiftedConv2d(nn.Conv2d):
    """A causal convolution without a mask: its kernel ends in the row of the output, and is as small as what it reads.

    Output (y, x) reads the rows y - d (k_h - 1), ..., y, all one further up where ``above``; and where ``centred`` the columns
    from x - d (k_w - 1) / 2 to x + d (k_w - 1) / 2, else x - d (k_w - 1), ..., x, all one further left where ``before``.
    With a stride s, rows and columns are those at s y and s x.
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
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, stride=stride, bias=bias)
        rows, columns = dilation * (kernel_size[0] - 1), dilation * (kernel_size[1] - 1)
        left, right = (columns // 2, columns - columns // 2) if centred else (columns, 0)
        self._cropped = (int(above), int(before))
        self._padded = (left + int(before), right, rows + int(above), 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        """``x`` without the last row or column that nothing reads, with zeros around it."""
        rows, columns = self._cropped
        if rows or columns:
            x = x[:, :, : x.shape[2] - rows, : x.shape[3] - columns]
        return F.pad(x, self._padded) if any(self._padded) else x
