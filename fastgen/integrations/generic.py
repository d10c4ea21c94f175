"""torch's own modules, wherever they stand: convolutions, GroupNorm, and GroupNorm, SiLU and convolution in a row."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import nn as fused
from .fusing import in_a_row
from .stand_in import StandIn


class Conv2d(StandIn, fused.Conv2d):
    of, project, does = "Conv2d", "torch", "Winograd's algorithms for 3x3, one matrix product for 1x1"
    takes = ("input",)

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(module, nn.Conv2d)  # and not the one of that name for quantised tensors

    @classmethod
    def reasons(cls, module: nn.Conv2d) -> Iterator[str]:
        if module.padding_mode != "zeros":
            yield f"padding_mode {module.padding_mode!r}"


class GroupNorm(StandIn, fused.GroupNorm):
    of, project, does = "GroupNorm", "torch", "one pass over the input"
    takes = ("input",)
    activation = None


class Sequential(StandIn):
    of, project, does = (
        "Sequential",
        "torch",
        "GroupNorm, SiLU and convolution as one call, upsampling and convolution as one",
    )
    takes = ("input",)

    @classmethod
    def concerns(cls, module: nn.Sequential) -> bool:
        return any(isinstance(each, (nn.GroupNorm, nn.Upsample)) for each in module)

    def forward(self: Any, input: Tensor) -> Tensor:
        return in_a_row(self, input)


STAND_INS = (Conv2d, GroupNorm, Sequential)
