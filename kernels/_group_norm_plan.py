"""How `group_norm` is cut up for a GPU: tiles of pixels by channels, split so that a batch of one fills it too.

Every kernel reads tiles [BLOCK_P, BLOCK_C] of one sample through two strides, so contiguous and channels-last input share
the code; the longer side of the tile lies along memory. Statistics are kept a channel and a split; groups are formed when
the splits are merged, in a fixed order and without atomics, so that two runs give the same bits on any device.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.reference._layout import is_channels_last, output_strides

# Chosen by count, not yet by measurement: 2048 elements are 16 a thread over 128 threads in fp32, within 64 registers;
# 528 programs are four a multiprocessor on 132 of them; 8192 elements of one group stay in the registers of 8 warps.
TILE = 2048
PROGRAMS = 528
WHOLE_GROUP = 8192

MAX_ELEMENTS = 2**40  # grids are one-dimensional, 2^31 programs of TILE elements


@dataclass(frozen=True)
class Plan:
    """Sizes of one call. ``stride_c`` and ``stride_p``: from a channel, a pixel to the next, in elements."""

    n: int
    channels: int
    pixels: int
    groups: int
    stride_c: int
    stride_p: int
    block_p: int
    block_c: int
    splits: int
    wide: bool  # fp64 input, fp64 arithmetic

    @property
    def per_group(self) -> int:
        return self.channels // self.groups

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.block_c)

    @property
    def pixel_blocks(self) -> int:
        return triton.cdiv(self.pixels, self.block_p)

    @property
    def pixels_per_split(self) -> int:
        """Whole tiles, so that only the last split has a ragged end."""
        return triton.cdiv(self.pixel_blocks, self.splits) * self.block_p

    @property
    def accumulate(self) -> tl.dtype:
        return tl.float64 if self.wide else tl.float32

    @property
    def opmath(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32

    @property
    def fits_one_program(self) -> bool:
        return triton.next_power_of_2(self.per_group) * triton.next_power_of_2(self.pixels) <= WHOLE_GROUP


def make_plan(x: Tensor, groups: int) -> Plan:
    """The plan for ``x`` [N, C, *spatial]."""
    n, channels = x.shape[:2]
    pixels = max(math.prod(x.shape[2:]), 1)
    along_channels = is_channels_last(x) or pixels == 1
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
    return Plan(n, channels, pixels, groups, *strides, block_p, block_c, splits, x.dtype == torch.float64)


def dense(t: Tensor, like: Tensor) -> Tensor:
    """``t`` itself where it has the dense strides of an output like ``like``, else a copy that has."""
    strides = output_strides(like)
    if all(size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


@triton.jit
def tile_of(program, channels, pixels, first_p, last_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixels, channels and mask of the tile of ``program`` among the channel blocks, from pixel ``first_p`` on."""
    c = program * BLOCK_C + tl.arange(0, BLOCK_C)
    p = first_p + tl.arange(0, BLOCK_P)
    mask = (p < last_p)[:, None] & (c < channels)[None, :]
    return p, c, mask


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def load_or(pointer, index, mask, absent: tl.constexpr, dtype: tl.constexpr):
    """Values of an optional parameter in the accumulation type, ``absent`` where it is None."""
    if pointer is None:
        return tl.full(index.shape, absent, dtype)
    else:
        return tl.load(pointer + index, mask=mask, other=absent).to(dtype)
