"""What the autoregressive models are made of: causal convolutions, gates, and the discretised logistic mixture."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gated_activation(input: Tensor, condition: Tensor | None = None, *, activation: str = "tanh") -> Tensor:
    """activation(a) * sigmoid(b) of the halves a and b of the channels of input + condition: [N, 2 C, H, W] -> [N, C, H, W]."""
    a, b = (input if condition is None else input + condition).chunk(2, 1)
    return (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)


def concat_elu(x: Tensor) -> Tensor:
    """elu of (x, -x): [N, C, H, W] -> [N, 2 C, H, W]."""
    return F.elu(torch.cat([x, -x], 1))


def logistic_mixture(logits: Tensor, target: Tensor, *, levels: int) -> Tensor:
    """-log p(target) of mixtures of discretised logistics, [N] nats (Salimans et al. 2017, PixelCNN++).

    Args:
        logits: [N, 3 M, H, W] for one channel: M logits of the mixture, M means, M logarithms of the scales; [N, 10 M, H, W] for
            three: M logits, then for each channel M means, M logarithms and M coefficients.
        target: [N, 1 or 3, H, W] in [-1, 1], levels ``2 k / (levels - 1) - 1``.
    """
    channels = target.shape[1]
    mixtures = logits.shape[1] // (3 if channels == 1 else 10)
    weights = logits[:, :mixtures].log_softmax(1)  # [N, M, H, W]
    parts = logits[:, mixtures:].unflatten(1, (channels, -1, mixtures))  # [N, C, 2 or 3, M, H, W]
    means, log_scales = parts[:, :, 0], parts[:, :, 1].clamp(min=-7.0)
    x = target.unsqueeze(2)  # [N, C, 1, H, W]
    if channels == 3:
        a, b, c = parts[:, :, 2].tanh().unbind(1)
        red, green = x[:, 0], x[:, 1]
        means = torch.stack([means[:, 0], means[:, 1] + a * red, means[:, 2] + b * red + c * green], 1)
    centred, half, inverse = x - means, 1 / (levels - 1), (-log_scales).exp()
    upper, lower, middle = inverse * (centred + half), inverse * (centred - half), inverse * centred
    mass = upper.sigmoid() - lower.sigmoid()
    density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)  # where the mass is lost to rounding
    inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    nats = torch.where(x > 1 - half, -F.softplus(lower), inside)
    nats = torch.where(x < half - 1, upper - F.softplus(upper), nats)
    return -(nats.sum(1) + weights).logsumexp(1).flatten(1).sum(1)


class MaskedConv2d(nn.Conv2d):
    """A convolution of which output (y, x) reads what comes before (y, x) in raster order, and (y, x) itself but for mask A.

    The kernel is odd and centred, the image keeps its size; weights on what is not read have no part in anything.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, mask_type: str, *, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.mask_type = mask_type

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        read = torch.arange(rows * columns, device=x.device) < rows * columns // 2 + int(self.mask_type == "B")
        return F.conv2d(x, self.weight * read.view(rows, columns), self.bias, padding=self.padding)


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
