"""`Squeeze`: blocks of pixels as channels, a step of RealNVP and Glow between their levels."""

import torch
from torch import Tensor, nn

from .._schema import SQUEEZE_ORDERS
from ..ops import squeeze


class Squeeze(nn.Module):
    """[N, C, H, W] to [N, C f^2, H / f, W / f]; its log-determinant is 0.

    Args:
        factor: f.
        order: ``"channel_major"``, ``"space_major"`` or ``"checkerboard"``, see :func:`fastgen.ops.squeeze`.

    Raises:
        ValueError: ``factor`` is not positive, or ``order`` is not known.
    """

    def __init__(self, factor: int = 2, *, order: str = "channel_major") -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"Squeeze: factor must be positive, got {factor}")
        if order not in SQUEEZE_ORDERS:
            raise ValueError(f"Squeeze: order must be one of {SQUEEZE_ORDERS}, got {order!r}")
        self.factor, self.order = factor, order

    def forward(self, input: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (output, zeros [N]); ``context`` is not used. Raises what :func:`fastgen.ops.squeeze` raises."""
        return squeeze(input, self.factor, order=self.order), _zeros(input)

    def inverse(self, input: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The way back."""
        return squeeze(input, self.factor, order=self.order, inverse=True), _zeros(input)

    def extra_repr(self) -> str:
        order = f", order={self.order!r}" if self.order != "channel_major" else ""
        return f"{self.factor}{order}"


def _zeros(input: Tensor) -> Tensor:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch.zeros(input.shape[0], dtype=dtype, device=input.device)
