"""Triton kernel of `categorical_sample`: one program draws ROWS positions of one sample, all of their levels in registers.

Each logit is read once. `top_k` and `top_p` look for a threshold bit by bit, in integers that are ordered as the logits are: the
largest at or above which there are still k levels, or p of the probability. Of the levels that equal it the first are kept, by
their rank. The draw is the first level whose cumulative sum passes u times the total.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.kernels._philox import low_word
from fastgen.kernels._sampling import uniform_at
from fastgen.reference._layout import is_channels_last, opmath_dtype

__all__ = ["categorical_sample", "reasons"]

# Four levels a thread: with eight, ptxas spills some of what both thresholds need.
MAX_LEVELS = 4096  # of a row in registers, of 32 warps
TILE = 512  # levels of all rows of a program, where a row is shorter


@triton.jit
def ordered_bits(x, ACC: tl.constexpr):
    """Signed integers in the order of ``x``, equal where it is (-0 is 0)."""
    x = tl.where(x == 0.0, 0.0, x)
    if tl.float64 == ACC:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def held(key, bound, weights):
    """What the levels at or above ``bound`` [ROWS] weigh."""
    return tl.sum(tl.where(key >= bound[:, None], weights, 0), axis=1)


@triton.jit
def threshold(key, weights, wanted, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The largest bound [ROWS] at or above which the levels weigh ``wanted``."""
    if tl.float64 == ACC:
        zero = tl.zeros((ROWS,), tl.int64)
        lowest = zero + (-0x7FFFFFFFFFFFFFFF - 1)
        bits: tl.constexpr = 63
    else:
        zero = tl.zeros((ROWS,), tl.int32)
        lowest = zero + (-0x7FFFFFFF - 1)
        bits: tl.constexpr = 31
    found = tl.where(held(key, zero, weights) >= wanted, zero, lowest)
    for i in range(bits):
        higher = found + ((zero + 1) << (bits - 1 - i))
        found = tl.where(held(key, higher, weights) >= wanted, higher, found)
    return found


# Where a position stands in its stream and the options of a draw are other numbers every call.
@triton.jit(do_not_specialize=["element", "step", "top_k"])
def categorical_sample_kernel(
    logits,  # [N, K, P]
    seeds,  # [N] int64
    drawn,  # [N, P] int64
    log_probs,  # [N, P] or None
    count,  # K
    positions,  # P
    tiles,  # programs a sample
    level_stride,
    position_stride,
    element,
    step,  # int32, the low word of the step
    temperature,
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    CUT_K: tl.constexpr,
    CUT_P: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)  # divided in 32 bits: a division of 64 is a subroutine and has a stack
    n, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    position = tile * ROWS + tl.arange(0, ROWS)
    level = tl.arange(0, LEVELS)
    there = position < positions
    mask = there[:, None] & (level < count)[None, :]
    at = n * count * positions + position[:, None] * position_stride + level[None, :].to(tl.int64) * level_stride
    x = tl.load(logits + at, mask=mask, other=float("-inf")).to(ACC)
    seed = tl.load(seeds + n)

    nan = tl.sum((x != x).to(tl.int32), axis=1) > 0
    x = tl.where(x != x, float("-inf"), x)
    largest = tl.max(x, axis=1)
    fine = (largest > float("-inf")) & (largest < float("inf")) & (nan == 0)
    shift = tl.where(fine, largest, 0.0)[:, None]
    if GREEDY:
        found = tl.min(tl.where(x == largest[:, None], level[None, :], LEVELS), axis=1)
    else:
        scaled = (x - shift) / tl.cast(temperature, ACC)
        weights = tl.where(scaled < -87.0, 0.0, tl.exp(scaled))
        if CUT_K or CUT_P:
            key = ordered_bits(x, ACC)
        if CUT_K:
            bound = threshold(key, tl.full((ROWS, LEVELS), 1, tl.int32), top_k, ROWS, ACC)[:, None]
            larger = tl.sum((key > bound).to(tl.int32), axis=1)[:, None]
            rank = tl.cumsum((key == bound).to(tl.int32), axis=1) - 1
            weights = tl.where((key > bound) | ((key == bound) & (larger + rank < top_k)), weights, 0.0)
        if CUT_P:
            wanted = tl.sum(weights, axis=1) * tl.cast(top_p, ACC)
            bound = threshold(key, weights, wanted, ROWS, ACC)[:, None]
            above = tl.sum(tl.where(key > bound, weights, 0.0), axis=1)[:, None]
            each = tl.max(tl.where(key == bound, weights, 0.0), axis=1)[:, None]
            rank = tl.cumsum((key == bound).to(tl.int32), axis=1) - 1
            short = above + rank.to(ACC) * each < wanted[:, None]
            weights = tl.where((key > bound) | ((key == bound) & short), weights, 0.0)
        u = uniform_at(element + position, step, seed).to(ACC)
        passed = tl.cumsum(weights, axis=1) > (u * tl.sum(weights, axis=1))[:, None]
        first = tl.min(tl.where(passed & (weights > 0.0), level[None, :], LEVELS), axis=1)
        last = tl.max(tl.where(weights > 0.0, level[None, :], 0), axis=1)
        found = tl.where(first < LEVELS, first, last)
    if log_probs is not None:
        chosen = tl.sum(tl.where(level[None, :] == found[:, None], x - shift, 0.0), axis=1)
        total = tl.sum(tl.exp(x - shift), axis=1)
        score = tl.where(fine, chosen - tl.log(total), float("nan"))
        tl.store(log_probs + n * positions + position, score.to(log_probs.dtype.element_ty), mask=there)
    tl.store(drawn + n * positions + position, tl.where(fine, found, -1).to(tl.int64), mask=there)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    logits, seeds, *_ = args
    found = tensor_reasons((logits,))
    if seeds.dtype != torch.int64:
        found.append(f"seeds must be int64, got {seeds.dtype}")
    if logits.dim() > 1 and logits.shape[1] > MAX_LEVELS:
        found.append(f"at most {MAX_LEVELS} levels fit the registers of a program, got {logits.shape[1]}")
    return found


def categorical_sample(
    logits: Tensor,
    seeds: Tensor,
    element: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    return_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    operands = Operands("categorical_sample", logits)
    if logits.dim() < 2 or not 1 <= logits.shape[1] <= MAX_LEVELS:
        operands.fail(f"logits must be [N, K, *] with K from 1 to {MAX_LEVELS}, got {tuple(logits.shape)}")
    if element < 0 or top_k < 0:
        operands.fail(f"{'element' if element < 0 else 'top_k'} must not be negative, got {element}, {top_k}")
    if not 0 <= temperature < math.inf:
        operands.fail(f"temperature must be finite and not negative, got {temperature}")
    if not 0 < top_p <= 1:
        operands.fail(f"top_p must be in (0, 1], got {top_p}")
    seeds = operands.indices("seeds", seeds)
    n, count, *rest = logits.shape
    positions = math.prod(rest)
    drawn = torch.empty((n, *rest), dtype=torch.int64, device=logits.device)
    shape = (n, *rest) if return_log_prob else (0,)
    log_probs = torch.empty(shape, dtype=opmath_dtype(logits.dtype), device=logits.device)
    if drawn.numel() == 0:
        return drawn, log_probs
    levels = triton.next_power_of_2(count)
    rows = max(TILE // levels, 1)
    strides = (1, count) if is_channels_last(logits) else (positions, 1)
    with on_device(logits):
        launch(
            categorical_sample_kernel, n * triton.cdiv(positions, rows), dense(logits, logits), seeds, drawn,
            log_probs if return_log_prob else None, count, positions, triton.cdiv(positions, rows), *strides, element,
            low_word(step), float(temperature), top_k, float(top_p), GREEDY=temperature == 0, CUT_K=0 < top_k < count,
            CUT_P=top_p < 1, ROWS=rows, LEVELS=levels, ACC=accumulator(logits), num_warps=max(4, levels // 128),
            enable_fp_fusion=False,
        )  # fmt: skip
    return drawn, log_probs
