"""How `layer_norm` and `rms_norm` are cut up for a GPU: a program holds whole slices, [BLOCK_P, BLOCK_C], all of their C elements.

The backward also sums over slices, channel by channel: a program goes through a block of slices of one sample, or of all where
no small tensor is a sample's own, keeps the sums in registers and stores them once. Torch adds the blocks up, in one order and
without atomics.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Chosen by count, not yet by measurement: 8 numbers of each operand a thread, 4 programs a multiprocessor on 132 of them.
TILE = 1024
NUMBERS = 8
PROGRAMS = 528

MAX_SIZE = 8192  # elements of a slice that fit the registers of a program


def size_reasons(size: int) -> list[str]:
    """A sentence against slices that no program holds."""
    return [f"slices of at most {MAX_SIZE} elements fit a program, got {size}"] if size > MAX_SIZE else []


def tile_of(size: int, most_warps: int = 16) -> dict[str, int]:
    """The tile of whole slices of ``size`` elements, and its warps."""
    block_c = triton.next_power_of_2(max(size, 1))
    block_p = max(TILE // block_c, 1)
    warps = min(max(block_p * block_c // (32 * NUMBERS), 1), most_warps)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}


@dataclass(frozen=True)
class Blocks:
    """``groups`` of ``slices`` each, cut into ``a_group`` blocks of ``block``."""

    groups: int
    slices: int
    block: int

    @functools.cached_property
    def a_group(self) -> int:
        return triton.cdiv(self.slices, self.block)


def blocks_of(groups: int, slices: int, block_p: int) -> Blocks:
    """Blocks of whole tiles, about as many as fill a GPU."""
    tiles = max(triton.cdiv(slices, block_p), 1)
    blocks = min(max(PROGRAMS // max(groups, 1), 1), tiles)
    return Blocks(groups, slices, triton.cdiv(tiles, blocks) * block_p)


def partial_sums(blocks: Blocks, sums: int, size: int, like: Tensor) -> Tensor:
    """Room for the sums of all blocks, [sums, groups, blocks, C], of no block zero."""
    make: Any = torch.empty if blocks.groups * blocks.slices * size else torch.zeros
    return make((sums, blocks.groups, max(blocks.a_group, 1), size), dtype=like.dtype, device=like.device)
