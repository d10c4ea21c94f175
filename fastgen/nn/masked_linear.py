"""`MaskedLinear`: a linear layer whose outputs see the inputs of degrees up to their own; Germain et al. 2015 (MADE)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masked_linear, masked_linear_fits


class MaskedLinear(nn.Linear):
    """`torch.nn.Linear` of which a mask hides weights, over :func:`fastgen.ops.masked_linear` where that is faster. Its state is
    that of the linear.

    Args:
        in_degrees: of the inputs, integers.
        out_degrees: of the outputs.
        strict: whether an output sees only inputs of smaller degree, as the last layer of a MADE does, or of its own too.
        bias, device, dtype: as in `torch.nn.Linear`.
    """

    def __init__(
        self,
        in_degrees: Sequence[int] | range,
        out_degrees: Sequence[int] | range,
        *,
        strict: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(len(in_degrees), len(out_degrees), bias, device, dtype)
        self.in_degrees, self.out_degrees, self.strict = tuple(in_degrees), tuple(out_degrees), strict
        self._masks: dict[torch.device, Tensor] = {}

    @property
    def mask(self) -> Tensor:
        """[outputs, inputs], boolean, on the device of the weight: True where a weight counts. The same tensor at each call."""
        device = self.weight.device
        kept = self._masks.get(device)
        if kept is None:
            outputs, inputs = (torch.tensor(d, device=device) for d in (self.out_degrees, self.in_degrees))
            kept = outputs[:, None] > inputs if self.strict else outputs[:, None] >= inputs
            self._masks = {device: kept}
        return kept

    def forward(self, input: Tensor) -> Tensor:
        if not masked_linear_fits(self.weight):
            return F.linear(input, torch.where(self.mask, self.weight, 0), self.bias)
        return masked_linear(input, self.weight, self.bias, mask=self.mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strict={self.strict}"
