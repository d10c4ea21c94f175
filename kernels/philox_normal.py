"""Triton kernel of `philox_normal`: one program fills 4 * BLOCK normals of one sample."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._philox import normals_4

BLOCK = 256  # blocks of four normals a program: 8 registers of state a block over 128 threads


@triton.jit
def philox_normal_kernel(
    out,  # [N, size] float32
    seeds,  # [N] int64
    size,
    step,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + n)
    z0, z1, z2, z3 = normals_4(block, step.to(tl.int64), seed)
    row = out + n * size
    element = block * 4
    tl.store(row + element, z0, mask=element < size)
    tl.store(row + element + 1, z1, mask=element + 1 < size)
    tl.store(row + element + 2, z2, mask=element + 2 < size)
    tl.store(row + element + 3, z3, mask=element + 3 < size)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    seeds, shape, _ = args
    if shape[0] > 65535:
        return [f"at most 65535 samples fit a launch grid, got {shape[0]}"]
    return [] if seeds.dtype == torch.int64 else [f"seeds must be int64, got {seeds.dtype}"]


def philox_normal(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    out = torch.empty(tuple(shape), dtype=torch.float32, device=seeds.device)
    n, size = shape[0], math.prod(shape[1:])
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(size, 4 * BLOCK), n)
    philox_normal_kernel[grid](
        out, seeds.contiguous(), size, step & 0xFFFFFFFF, BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return out
