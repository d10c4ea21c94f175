"""Triton kernel of `philox_normal`: one program fills 4 * BLOCK neighbouring normals of one sample.

Nothing is read but the seed; a thread makes two Philox blocks and writes each as one vector where rows are aligned.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import MAX_ELEMENTS, Operands
from fastgen.kernels._philox import low_word, normals_of

__all__ = ["philox_normal", "reasons"]

# Blocks of four normals a program, two a thread: enough in flight to hide the multiplies, under 64 registers.
BLOCK = 256


# A step is another number every call: without the list Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["step"])
def philox_normal_kernel(
    out,  # [N, size] float32
    seeds,  # [N] int64
    size,
    tiles,  # programs a sample
    step,  # int32, the low word of the step
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    block = tile * BLOCK + tl.arange(0, BLOCK)
    element = tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    normals = normals_of(block, step, tl.load(seeds + n))
    tl.store(out + n * size + element, normals, mask=element < size)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    seeds, shape, _ = args
    found = [] if seeds.dtype == torch.int64 else [f"seeds must be int64, got {seeds.dtype}"]
    elements = (
        0 if len(shape) == 0 else shape[0] * max(math.prod(shape[1:]), 4 * BLOCK)
    )  # a sample takes at least one program
    return found + ([f"at most 2^40 elements fit a launch grid, got {elements}"] if elements > MAX_ELEMENTS else [])


def philox_normal(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    if len(shape) == 0 or min(shape) < 0:
        raise ValueError(f"philox_normal: shape must be [N, *], got {tuple(shape)}")
    out = torch.empty(tuple(shape), dtype=torch.float32, device=seeds.device)
    seeds = Operands("philox_normal", out).indices("seeds", seeds)
    if out.numel() == 0:
        return out
    n, size = shape[0], math.prod(shape[1:])
    tiles = triton.cdiv(size, 4 * BLOCK)
    with on_device(out):
        launch(
            philox_normal_kernel, n * tiles, out, seeds, size, tiles, low_word(step), BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
