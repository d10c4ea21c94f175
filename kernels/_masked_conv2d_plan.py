"""What the kernels of `masked_conv2d` share: the operands of a call, the taps and runs of its mask, how large the tiles are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen.kernels._operands import Operands, accumulator
from fastgen.kernels._tiles import factor_type, padded
from fastgen.reference._masked_taps import Run, orders_colors, origin, runs, taps
from fastgen.reference.masked_conv2d import check_mask

# Pixels, outputs and channels of a tile, chosen by count, not yet by measurement: of halves, which tensor cores multiply, 64 x 64
# sums are 32 registers a thread of 4 warps; the others are multiplied out in registers, and want smaller tiles.
HALVES = (64, 64, 32)
WIDE = (32, 32, 16)


@dataclass(frozen=True)
class Plan:
    """The mask of one call and the constants of its kernels. ``weight``: [K, C / groups, kh, kw] in the dtype of the input."""

    weight: Tensor
    mask_type: int
    dilation: tuple[int, int]
    groups: int
    color_channels: int
    origin: tuple[int, int]
    taps: range
    types: dict[str, Any]
    options: dict[str, Any]

    @property
    def ordered_tap(self) -> int:
        """The centre, if a color sees some of its channels alone; -1 if all or none are seen."""
        return self.taps.stop - 1 if self.color_channels > 1 else -1

    def runs(self, transposed: bool) -> list[Run]:
        channels = self.weight.shape[0], self.weight.shape[1] * self.groups
        outputs, inputs = channels[::-1] if transposed else channels
        return runs(outputs, inputs, self.mask_type, self.groups, self.color_channels, transposed)

    def tile(self, outputs: int, channels: int, pixels: int) -> dict[str, Any]:
        most = HALVES if self.weight.element_size() == 2 else WIDE
        wanted = zip(("BLOCK_P", "BLOCK_K", "BLOCK_C"), most, (pixels, outputs, channels), strict=True)
        return {name: min(limit, padded(length)) for name, limit, length in wanted} | self.types


def make_plan(
    op: str, input: Tensor, weight: Tensor, mask_type: int, dilation: Sequence[int], groups: int, color_channels: int
) -> tuple[Plan, Operands]:
    """The plan of a call, once its arguments have been held against each other."""
    operands = Operands(op, input)
    if input.dim() != 4 or weight.dim() != 4 or 0 in weight.shape:
        operands.fail(
            f"input must be [N, C, H, W] and weight [K, C / groups, kh, kw], got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    kernel = (weight.shape[2], weight.shape[3])
    try:
        check_mask(op, (weight.shape[0], input.shape[1]), kernel, mask_type, groups, color_channels)
    except RuntimeError as error:  # of a raw op; a launcher's are ValueErrors
        raise ValueError(*error.args) from error
    operands.check("weight", weight, (weight.shape[0], input.shape[1] // groups, *kernel))
    if len(dilation) != 2 or min(dilation) < 1 or max(dilation) * max(kernel) >= 2**30:
        operands.fail(
            f"dilation must be two integers of at least 1 and reach less than 2^30 pixels, got {list(dilation)}"
        )
    ordered = color_channels if orders_colors(mask_type) else 1
    types = {"DOT": factor_type(input), "ACC": accumulator(input)}
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    plan = Plan(
        weight.to(input.dtype), mask_type, (dilation[0], dilation[1]), groups, ordered, origin(mask_type, kernel),
        taps(mask_type, kernel, ordered), types, options,
    )  # fmt: skip
    return plan, operands
