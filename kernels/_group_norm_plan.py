"""How `group_norm` is cut up for a GPU: tiles of pixels by channels, split so that a batch of one fills it too.

Every kernel reads tiles [BLOCK_P, BLOCK_C] of one sample through two strides, so contiguous and channels-last input share
the code; the longer side of the tile lies along memory. Statistics are kept a channel and a split; groups are formed when
the splits are merged, in a fixed order and without atomics, so that two runs give the same bits on any device.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._operands import Operands, dense, laid_out
from fastgen.reference._layout import dense_strides, is_channels_last

# Chosen by count, not yet by measurement. A tile is 16 elements a thread over 128 threads in fp32, within 64 registers (the
# backward keeps two of them and takes 256 threads). 528 programs are four a multiprocessor on 132 of them.
TILE = 2048
PROGRAMS = 528

# Numbers of a group (padded) that one program keeps in registers: 16 a thread up to 512 threads, then up to 32; the backward
# holds two an element, and fp64 counts twice. One launch then does the work of three, which counts where launches do.
WHOLE_NUMBERS = 16384

# Elements of the tiles [splits, channels of a group] in which partial results are merged.
MERGE_TILE = 1024
MERGE_CHANNELS = 64


@dataclass(frozen=True)
class Plan:
    """Sizes of one call, made once for a shape. ``stride_c`` and ``stride_p``: from a channel, a pixel to the next, in elements."""

    n: int
    channels: int
    pixels: int
    groups: int
    stride_c: int
    stride_p: int
    seam: int  # channels of the first input, all of them where there is no second
    block_p: int
    block_c: int
    splits: int
    wide: bool  # fp64 input, fp64 arithmetic

    @functools.cached_property
    def two(self) -> dict[str, bool]:
        """How the second input, where there is one, lies beside the first."""
        return {"CHANNELS_LAST": self.stride_c == 1}

    @functools.cached_property
    def per_group(self) -> int:
        return self.channels // self.groups

    @functools.cached_property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.block_c)

    @functools.cached_property
    def pixel_blocks(self) -> int:
        return triton.cdiv(self.pixels, self.block_p)

    @functools.cached_property
    def pixels_per_split(self) -> int:
        """Whole tiles, so that only the last split has a ragged end."""
        return triton.cdiv(self.pixel_blocks, self.splits) * self.block_p

    @functools.cached_property
    def accumulate(self) -> tl.dtype:
        return tl.float64 if self.wide else tl.float32

    @functools.cached_property
    def opmath(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32

    @functools.cached_property
    def group_tile(self) -> tuple[int, int]:
        """Pixels and channels of a group, each padded to a power of two."""
        return triton.next_power_of_2(self.pixels), triton.next_power_of_2(self.per_group)

    @functools.cached_property
    def tile(self) -> dict[str, int]:
        return {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}

    @functools.cached_property
    def merge_tile(self) -> dict[str, int]:
        block_d = min(triton.next_power_of_2(self.per_group), MERGE_CHANNELS)
        return {"BLOCK_S": min(triton.next_power_of_2(self.splits), MERGE_TILE // block_d), "BLOCK_D": block_d}

    def whole_numbers(self, an_element: int) -> int:
        """What a program that keeps a whole group holds, in numbers of fp32, at ``an_element`` numbers an element."""
        return math.prod(self.group_tile) * an_element * (2 if self.wide else 1)

    def fits_whole(self, an_element: int) -> bool:
        """Whether one program keeps a group. Where a thread loads element by element, each at an address of its own, half as much
        fits its registers."""
        limit = WHOLE_NUMBERS if self.stride_p == 1 and self.pixels % 16 == 0 else WHOLE_NUMBERS // 2
        return self.whole_numbers(an_element) <= limit

    def whole_launch(self, an_element: int) -> dict[str, Any]:
        """Tile, warps and what divides the channels of a group, of such a program."""
        block_p, block_d = self.group_tile
        warps = min(triton.next_power_of_2(triton.cdiv(self.whole_numbers(an_element), 512)), 16)
        unit = math.gcd(self.per_group, 16)
        return {"UNIT": unit, "BLOCK_P": block_p, "BLOCK_D": block_d, "ACC": self.accumulate, "num_warps": warps}


def make_plan(op: str, x: Tensor, skip: Tensor | None, groups: int) -> Plan:
    """The plan for ``x`` [N, C, *spatial], and for ``skip`` beside it."""
    more = 0 if skip is None else check_skip(op, x, skip)
    channels = x.shape[1] + more if x.dim() > 1 else 0
    if channels < 1 or groups < 1 or channels % groups:
        raise ValueError(f"{op}: num_groups must divide channels, got num_groups={groups} and shape {tuple(x.shape)}")
    return _plan_of(x.shape, more, is_channels_last(x), groups, x.dtype == torch.float64)


def check_skip(op: str, x: Tensor, skip: Tensor) -> int:
    """The channels of a second input, which has the rest of the shape, the dtype and the device of the first."""
    same = skip.dim() == x.dim() >= 2 and (skip.shape[0], *skip.shape[2:]) == (x.shape[0], *x.shape[2:])
    if not same or skip.dtype != x.dtype or skip.device != x.device:
        given = f"{tuple(skip.shape)} of {skip.dtype} on {skip.device}"
        raise ValueError(
            f"{op}: skip must be like input, {tuple(x.shape)} of {x.dtype}, but for the channels, got {given}"
        )
    return skip.shape[1]


@functools.lru_cache(1024)
def _plan_of(shape: torch.Size, more: int, channels_last: bool, groups: int, wide: bool) -> Plan:
    n, channels = shape[0], shape[1] + more
    pixels = max(math.prod(shape[2:]), 1)
    along_channels = channels_last or pixels == 1
    if along_channels:
        block_c = min(triton.next_power_of_2(channels), 128)
        block_p = min(triton.next_power_of_2(pixels), TILE // block_c)
    else:
        block_p = min(triton.next_power_of_2(pixels), 1024)
        block_c = min(triton.next_power_of_2(channels), TILE // block_p)
    programs = max(n * triton.cdiv(channels, block_c), 1)
    pixel_blocks = max(triton.cdiv(pixels, block_p), 1)
    blocks_per_split = triton.cdiv(pixel_blocks, min(triton.cdiv(PROGRAMS, programs), pixel_blocks))
    splits = triton.cdiv(pixel_blocks, blocks_per_split)  # none of them empty
    strides = (1, channels) if along_channels else (pixels, 1)
    return Plan(n, channels, pixels, groups, *strides, shape[1], block_p, block_c, splits, wide)


def both(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The inputs, dense in the layout of the first."""
    return dense(x, x), None if skip is None else laid_out(skip, is_channels_last(x))


def empty_output(x: Tensor, plan: Plan, dtype: torch.dtype | None = None) -> Tensor:
    """An output of all channels in the layout of ``x``."""
    shape = (plan.n, plan.channels, *x.shape[2:])
    return torch.empty_strided(
        shape, dense_strides(shape, is_channels_last(x)), dtype=dtype or x.dtype, device=x.device
    )


def parameters(
    operands: Operands,
    plan: Plan,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> list[Tensor | None]:
    """The small tensors as kernels take them: [C] twice, then [N, C] three times."""
    n, c = plan.n, plan.channels
    return [
        operands.sized("weight", weight, c), operands.sized("bias", bias, c),
        operands.sized("channel_bias", channel_bias, n, c), operands.sized("scale", scale, n, c),
        operands.sized("shift", shift, n, c),
    ]  # fmt: skip


@triton.jit
def tile_of(block, channels, pixels, first_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixels, channels and mask of a tile from pixel ``first_p`` (int64) on. Splits are whole tiles: no end but the last."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    p = first_p + tl.arange(0, BLOCK_P)
    return p, c, (p < pixels)[:, None] & (c < channels)[None, :]


@triton.jit
def load_input(
    x, skip, n, p, c, mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Pixels ``p`` and channels ``c`` of sample n, of any shape together; from channel ``seam`` on those of ``skip``."""
    if skip is None:
        value = tl.load(x + (n * channels * pixels + p * stride_p + c * stride_c), mask=mask, other=0.0)
    else:
        more = channels - seam
        if CHANNELS_LAST:
            of_x, of_skip = p * seam, p * more
        else:
            of_x, of_skip = p * stride_p, p * stride_p
        below = c < seam
        low = tl.load(x + (n * seam * pixels + of_x + c * stride_c), mask=mask & below, other=0.0)
        at_skip = n * more * pixels + of_skip + (c - seam) * stride_c
        high = tl.load(skip + at_skip, mask=mask & (c >= seam), other=0.0)
        value = tl.where(below, low, high)
    return value.to(ACC)


@triton.jit
def channels_of_a_group(channels, groups, UNIT: tl.constexpr):
    """Channels a group, known to be a multiple of ``UNIT``: channels-last input is loaded in vectors of as many."""
    return tl.multiple_of(channels // groups, UNIT)


@triton.jit
def group_size(per_group, pixels, ACC: tl.constexpr):
    """Elements of a group. Arguments of 1 are compile-time constants, which only `tl.cast` turns into numbers."""
    return (tl.cast(per_group, tl.int64) * pixels).to(ACC)
