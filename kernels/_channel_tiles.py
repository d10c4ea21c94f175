"""Tensors [N, C, *] as tiles of positions by channels, for kernels that know a number or a row of numbers a channel.

A tile is [BLOCK_P, BLOCK_C] of one sample through two strides, so that planes, channels-last images and vectors share the code;
where the channels lie innermost all samples are one. Tiles are counted through all samples. Sums over positions are taken by blocks
of tiles, which a program goes through; torch adds the blocks up, in one order and without atomics.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastgen.reference._layout import is_channels_last

TILE = 1024  # numbers of an operand: eight a thread of 4 warps
PROGRAMS = 528  # that fill a GPU: 4 a multiprocessor on 132 of them


@triton.jit
def tile_at(tile, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P: tl.constexpr):
    """The offsets of a tile (int64), ``tiles`` of a sample, of channels ``c``, and which of its elements are there."""
    p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    at = tile // tiles * positions * channels + p[:, None] * stride_p + c.to(tl.int64)[None, :] * stride_c
    return at, (p < positions)[:, None] & (c < channels)[None, :]


@dataclass(frozen=True)
class Positions:
    """The sizes of a tensor [N, C, *] and its dense strides in the layout of an output like it."""

    samples: int
    positions: int
    channels: int
    stride_p: int
    stride_c: int

    @classmethod
    def of(cls, t: Tensor) -> "Positions":
        n, channels, positions = t.shape[0], t.shape[1], math.prod(t.shape[2:])
        if positions > 1 and not is_channels_last(t):
            return cls(n, positions, channels, 1, positions)
        return cls(1, n * positions, channels, channels, 1)

    @property
    def planes(self) -> bool:
        return self.stride_c != 1

    def tile(self) -> tuple[int, int]:
        """(BLOCK_P, BLOCK_C), the longer side where memory lies in order."""
        channels = triton.next_power_of_2(max(self.channels, 1))
        if self.planes:
            block_p = min(triton.next_power_of_2(self.positions), TILE)
            return block_p, min(TILE // block_p, channels)
        block_c = min(channels, TILE)
        return TILE // block_c, block_c

    def tiles(self, block_p: int) -> int:
        """Of a sample."""
        return max(triton.cdiv(self.positions, block_p), 1)

    def blocks(self, block_p: int, beside: int = 1) -> tuple[int, int]:
        """(Blocks of all tiles, tiles of a block): with ``beside`` programs for each block about as many as fill a GPU."""
        tiles = max(self.samples * self.tiles(block_p), 1)
        block = triton.cdiv(tiles, min(max(PROGRAMS // beside, 1), tiles))
        return triton.cdiv(tiles, block), block

    def sizes(self) -> tuple[int, int, int, int]:
        """As the kernels take them."""
        return self.positions, self.channels, self.stride_p, self.stride_c
