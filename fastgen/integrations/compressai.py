"""CompressAI: the masked convolution of its context models."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .masking import RASTER, masked, unmaskable
from .stand_in import StandIn


class MaskedConv2d(StandIn):
    of, project, does = "MaskedConv2d", "CompressAI", "the taps of the mask alone, the weight left as it is"
    takes, has = ("x",), ("mask", "weight", "kernel_size")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unmaskable(module, module.mask, RASTER)

    def forward(self: Any, x: Tensor) -> Tensor:
        y = masked(self, self.mask, x, RASTER)
        return self.theirs(x) if y is None else y


STAND_INS = (MaskedConv2d,)
