"""Triton kernel of `sampler_step`: one launch a step, whatever the solver.

A program owns BLOCK elements in the memory order of the sample, reads each operand once and writes one or two results.
The coefficients are read on the device from row `step` of the table; normals are indexed by logical (contiguous) element,
so a channels-last sample gets the same noise.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._philox import normal_at, normals_4
from fastgen.reference._layout import empty_like_layout, is_channels_last, output_strides

BLOCK = 512  # four elements a thread over 128 threads: one vector of fp32 of each operand, one Philox block
MAX_HISTORY = 4

# The columns of a table, as in fastgen/reference/sampler_step.py.
_HISTORY = tl.constexpr(16)


@triton.jit
def coefficient(row, column: tl.constexpr, ACC: tl.constexpr):
    return tl.load(row + column).to(ACC)


@triton.jit
def read(pointer, at, mask, ACC: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def sampler_step_kernel(
    sample,  # all operands [N, *] in the memory order of the sample, or None
    model_output,
    uncond,
    h0,
    h1,
    h2,
    h3,
    noise,
    variance,
    mask_keep,
    known,
    known_noise,
    table,  # [steps, columns]
    seeds,  # [N] int64 or None
    out,
    second,  # or None
    step,
    table_stride,
    numel,
    size,  # elements of a sample
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    QUADS: tl.constexpr,  # contiguous, and samples of a multiple of four elements
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    row = table + step.to(tl.int64) * table_stride
    x = read(sample, at, mask, ACC)
    g = read(model_output, at, mask, ACC)
    if uncond is not None:
        u = read(uncond, at, mask, ACC)
        g = coefficient(row, 8, ACC) * (g - u) + u
    p = coefficient(row, 4, ACC) * x + coefficient(row, 5, ACC) * g
    low = coefficient(row, 6, ACC)
    high = coefficient(row, 7, ACC)
    p = tl.where(p < low, low, p)  # a NaN passes both
    p = tl.where(p > high, high, p)
    y = coefficient(row, 0, ACC) * x + (coefficient(row, 1, ACC) * p + coefficient(row, 2, ACC) * g)
    if second is not None:
        value = coefficient(row, 9, ACC) * x + (coefficient(row, 10, ACC) * p + coefficient(row, 11, ACC) * g)
        tl.store(second + at, value.to(second.dtype.element_ty), mask=mask)
    if h0 is not None:
        y += coefficient(row, _HISTORY, ACC) * read(h0, at, mask, ACC)
    if h1 is not None:
        y += coefficient(row, _HISTORY + 1, ACC) * read(h1, at, mask, ACC)
    if h2 is not None:
        y += coefficient(row, _HISTORY + 2, ACC) * read(h2, at, mask, ACC)
    if h3 is not None:
        y += coefficient(row, _HISTORY + 3, ACC) * read(h3, at, mask, ACC)
    if seeds is not None or noise is not None:
        std = coefficient(row, 3, ACC)
        if variance is not None:
            log_std = coefficient(row, 12, ACC) + coefficient(row, 13, ACC) * read(variance, at, mask, ACC)
            std = std * tl.exp(log_std)
        if seeds is not None:
            if QUADS:  # four neighbours share one Philox block
                quad = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
                n = quad // (size // 4)
                seed = tl.load(seeds + n, mask=quad * 4 < numel, other=0)
                z0, z1, z2, z3 = normals_4(quad - n * (size // 4), step.to(tl.int64), seed)
                z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)).to(ACC)
            else:
                n = at // size
                element = at - n * size
                if CHANNELS_LAST:
                    element = element % channels * pixels + element // channels
                z = normal_at(element, step.to(tl.int64), tl.load(seeds + n, mask=mask, other=0)).to(ACC)
        else:
            z = read(noise, at, mask, ACC)
        y += std * z
    if mask_keep is not None:
        keep = coefficient(row, 14, ACC) * read(known, at, mask, ACC)
        if known_noise is not None:
            keep += coefficient(row, 15, ACC) * read(known_noise, at, mask, ACC)
        y = read(mask_keep, at, mask, ACC) * (y - keep) + keep
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    sample, history = args[0], args[5]
    found = []
    if len(history) > MAX_HISTORY:
        found.append(f"the kernel takes at most {MAX_HISTORY} history tensors, got {len(history)}")
    if sample.numel() > 2**40:
        found.append(f"at most 2^40 elements fit a launch grid, got {sample.numel()}")
    return found


def sampler_step_fwd(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    uncond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    variance: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    return_prediction: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_like_layout(sample)
    second = empty_like_layout(sample) if return_prediction else None
    if sample.numel() > 0:
        past = [*history, *[None] * (MAX_HISTORY - len(history))]
        tensors = (sample, model_output, uncond, *past, noise, variance, mask, known, known_noise)
        operands = [None if t is None else _in_order(t, sample) for t in tensors]
        channels = sample.shape[1] if sample.dim() > 1 else 1
        size, channels_last = math.prod(sample.shape[1:]), is_channels_last(sample)
        sampler_step_kernel[(triton.cdiv(sample.numel(), BLOCK),)](
            *operands,
            table if table.stride(1) == 1 else table.contiguous(),
            None if seeds is None else seeds.contiguous(),
            out,
            second,
            step,
            table.stride(0) if table.stride(1) == 1 else table.shape[1],
            sample.numel(),
            size,
            channels,
            size // channels,
            CHANNELS_LAST=channels_last,
            QUADS=not channels_last and size % 4 == 0,
            BLOCK=BLOCK,
            ACC=tl.float64 if sample.dtype == torch.float64 else tl.float32,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, sample.new_empty(0) if second is None else second


def _in_order(t: Tensor, sample: Tensor) -> Tensor:
    """``t`` in the memory order of an output like ``sample``; a copy only where it lies otherwise."""
    strides = output_strides(sample)
    if all(size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return empty_like_layout(sample, t.dtype).copy_(t)
