"""torch's own modules, wherever they stand: convolutions, GroupNorm, and GroupNorm, SiLU and convolution in a row."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import nn as fused
from .fusing import fusible, idle, norm_silu, norm_silu_conv, upsample_conv, upsampling, with_silu
from .stand_in import StandIn, bare


class Conv2d(StandIn, fused.Conv2d):
    of, project, does = "Conv2d", "torch", "Winograd's algorithms for 3x3, one matrix product for 1x1"
    takes = ("input",)

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
        modules = list(self)
        while modules:
            norm, *after = modules
            length = next(
                (i for i, m in enumerate(after[1:], 1) if not idle(m)), len(after)
            )  # of the rest, up to a convolution
            if after and is_nearest_by_two(norm) and upsampling(after[0]) and bare((norm,)):
                input, modules = upsample_conv(after[0], input), after[1:]
            elif length < len(after) and fusible(norm, after[0], after[length], *after[1:length]):
                input, modules = norm_silu_conv(norm, after[length], input), after[length + 1 :]
            elif after and with_silu(norm, after[0]):
                input, modules = norm_silu(norm, input), after[1:]
            else:
                input, modules = norm(input), after
        return input


def is_nearest_by_two(module: nn.Module) -> bool:
    return type(module) is nn.Upsample and module.mode == "nearest" and module.size is None and module.scale_factor == 2


STAND_INS = (Conv2d, GroupNorm, Sequential)
