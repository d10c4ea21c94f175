"""Triton kernels of `autoregressive_inverse`: a program takes BLOCK_N samples from the first level of features to the last.

Whatever a level needs of the network was computed at the levels before it, or is now; see `_masked_network`. Sums, scales and the
log-det are in fp32, or fp64 for fp64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import AUTOREGRESSIVE_SCALES, SPLINE_PARAMETRIZATIONS
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._masked_network import (
    BLOCK_N,
    CONSTANTS,
    FEATURES,
    LEVEL_APART,
    LEVEL_FEATURE,
    LEVEL_FEATURES,
    LEVEL_OUTPUTS,
    ROWS,
    checked,
    levels_of,
    number,
    options,
    order_of,
    read_constants,
    read_row,
    run_level,
    scratch,
)
from fastgen.kernels._node_activations import sigmoid, tanh
from fastgen.kernels._operands import tensor_reasons
from fastgen.kernels._spline import spline_of
from fastgen.reference import autoregressive_inverse as reference

__all__ = ["autoregressive_inverse", "autoregressive_inverse_advance", "autoregressive_inverse_spline", "reasons"]

MOST_BINS = 128  # of a spline: 16 samples beside all of them are in registers

NONE, EXP, TANH, SOFT_TANH, CENTERED, SOFT_CLIP, SIGMOID = (
    tl.constexpr(AUTOREGRESSIVE_SCALES.index(name))
    for name in ("none", "exp", "tanh", "soft_tanh", "sigmoid_centered", "soft_clip", "sigmoid")
)


@triton.jit
def scale_of(a, bound, offset, eps, SCALE: tl.constexpr):
    """(s, log s)."""
    if SCALE == NONE:
        return a * 0.0 + 1.0, a * 0.0
    elif SCALE == SIGMOID:
        s = sigmoid(a + offset) + eps
        return s, tl.log(s)
    elif SCALE == EXP:
        return tl.exp(a), a
    elif SCALE == TANH:
        log_s = bound * tanh(a)
        return tl.exp(log_s), log_s
    elif SCALE == SOFT_TANH:
        log_s = bound * tanh(a / bound)
        return tl.exp(log_s), log_s
    elif SCALE == CENTERED:
        log_s = bound * tanh(a * 0.5)
        return tl.exp(log_s), log_s
    elif SCALE == SOFT_CLIP:
        log_s = a / (1.0 + tl.abs(a / bound))
        return tl.exp(log_s), log_s
    else:  # softplus; the logarithm of the rounded 1 + e is mended by what the rounding took (Kahan)
        e = tl.exp(-tl.abs(a))
        u = 1.0 + e
        taken = tl.where(u == 1.0, 1.0, u - 1.0)
        s = tl.where(a > 0, a, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / taken)) + eps
        s = tl.where(s > bound, bound, s)
        return s, tl.log(s)


@triton.jit(do_not_specialize=["samples", "most_outputs", "level_count"])
def inverse_kernel(
    input,  # [N, D]
    constants,  # [N, C] or None
    output,  # [N, D]
    log_det,  # [N]
    state,  # [programs][rows][BLOCK_N]
    made,  # [programs][outputs of a level][BLOCK_N]
    program,
    weights,
    parameters,
    numbers,  # bound, offset, eps, gain
    samples,
    most_outputs,
    level_count,
    SCALE: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    MULTIPLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    rows, features, constant_count = number(program + ROWS), number(program + FEATURES), number(program + CONSTANTS)
    levels, order = levels_of(program), order_of(program)
    block, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    sample = block * BLOCK_N + n
    state += block * rows * BLOCK_N
    made += block * most_outputs * BLOCK_N
    bound, offset, eps, gain = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    if constants is not None:
        read_constants(constants, state, sample, samples, features, constant_count, BLOCK_N, ACC)
    total = tl.zeros([BLOCK_N], dtype=ACC)
    for index in range(0, level_count):
        level = levels + index * LEVEL_APART
        run_level(
            level, program, state, made, weights, parameters, BLOCK_N, BLOCK_K, UNITS, ACC,
        )  # fmt: skip
        first, count = number(level + LEVEL_FEATURE), number(level + LEVEL_FEATURES)
        each = number(level + LEVEL_OUTPUTS) // count
        for f in range(0, count):
            at_shift = tl.where(SHIFT_FIRST, 0, each - 1)
            at_scale = tl.where(SHIFT_FIRST, each - 1, 0)
            a = gain * tl.load(made + (f * each + at_scale) * BLOCK_N + n)
            shift = gain * tl.load(made + (f * each + at_shift) * BLOCK_N + n)
            feature = number(order + first + f)
            y = read_row(input, sample, features, feature, samples, ACC)
            s, log_s = scale_of(a, bound, offset, eps, SCALE)
            if MULTIPLY:
                x = y * s + shift
                total += log_s
            else:
                x = (y - shift) / s
                total -= log_s
            tl.store(state + (first + f) * BLOCK_N + n, x)
            tl.store(output + sample * features + feature, x.to(output.dtype.element_ty), mask=sample < samples)
    tl.store(log_det + sample, total, mask=sample < samples)


@triton.jit(do_not_specialize=["samples", "most_outputs", "level_count"])
def spline_kernel(
    input,  # [N, D]
    constants,  # [N, C] or None
    output,  # [N, D]
    log_det,  # [N]
    state,  # [programs][rows][BLOCK_N]
    made,  # [programs][outputs of a level][BLOCK_N]
    program,
    weights,
    parameters,
    samples,
    most_outputs,
    level_count,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    LEAST_WIDTH: tl.constexpr, LEAST_HEIGHT: tl.constexpr, LEAST_SLOPE: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr,
    TAILS: tl.constexpr,
    TURN: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,  # of derivatives
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    rows, features, constant_count = number(program + ROWS), number(program + FEATURES), number(program + CONSTANTS)
    levels, order = levels_of(program), order_of(program)
    block, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    sample = block * BLOCK_N + n
    state += block * rows * BLOCK_N
    made += block * most_outputs * BLOCK_N
    if constants is not None:
        read_constants(constants, state, sample, samples, features, constant_count, BLOCK_N, ACC)
    total = tl.zeros([BLOCK_N], dtype=ACC)
    zero = tl.zeros([BLOCK_N], dtype=ACC)
    for index in range(0, level_count):
        level = levels + index * LEVEL_APART
        run_level(
            level, program, state, made, weights, parameters, BLOCK_N, BLOCK_K, UNITS, ACC,
        )  # fmt: skip
        first, count = number(level + LEVEL_FEATURE), number(level + LEVEL_FEATURES)
        for f in range(0, count):
            feature = number(order + first + f)
            y = read_row(input, sample, features, feature, samples, ACC)
            at = (f * (2 * K + COLUMNS)) * BLOCK_N + n
            x, log = spline_of(
                y, made, at, BLOCK_N, made, at + K * BLOCK_N, BLOCK_N, made, at + 2 * K * BLOCK_N, BLOCK_N, n >= 0,
                zero + LEFT, zero + RIGHT, zero + BOTTOM, zero + TOP, LEAST_WIDTH, LEAST_HEIGHT, LEAST_SLOPE, SCALE, CLIP,
                TAILS, True, K, COLUMNS, BINS, ACC,
            )  # fmt: skip
            if TURN:
                x -= (2.0 * RIGHT) * tl.floor(x / (2.0 * RIGHT))
                x -= RIGHT
            total += log
            tl.store(state + (first + f) * BLOCK_N + n, x)
            tl.store(output + sample * features + feature, x.to(output.dtype.element_ty), mask=sample < samples)
    tl.store(log_det + sample, total, mask=sample < samples)


@triton.jit(do_not_specialize=["samples", "first", "count", "outputs", "index"])
def advance_kernel(
    state,  # [programs][rows][BLOCK_N]
    known,  # [N, features of the level before]
    constants,  # [N, C], or None
    output,  # [N, outputs of the level]
    made,  # [programs][outputs of the level][BLOCK_N]
    program,
    weights,
    parameters,
    samples,
    first,  # of the rows of what is known
    count,
    outputs,
    index,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    rows, features, constant_count = number(program + ROWS), number(program + FEATURES), number(program + CONSTANTS)
    block, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    sample = block * BLOCK_N + n
    state += block * rows * BLOCK_N
    made += block * outputs * BLOCK_N
    for f in range(0, count):
        tl.store(state + (first + f) * BLOCK_N + n, read_row(known, sample, count, f, samples, ACC))
    if constants is not None:
        read_constants(constants, state, sample, samples, features, constant_count, BLOCK_N, ACC)
    level = levels_of(program) + index * LEVEL_APART
    run_level(
        level, program, state, made, weights, parameters, BLOCK_N, BLOCK_K, UNITS, ACC,
    )  # fmt: skip
    for q in range(0, outputs):
        tl.store(output + sample * outputs + q, tl.load(made + q * BLOCK_N + n), mask=sample < samples)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    found = tensor_reasons(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
    if op == "autoregressive_inverse" and args[5] == AUTOREGRESSIVE_SCALES.index("atan"):
        found.append("Triton has no atan")
    if op == "autoregressive_inverse_spline" and args[6] > MOST_BINS:
        found.append(f"more than {MOST_BINS} bins")
    return found


def autoregressive_inverse(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    scale: int,
    numbers: Sequence[float],
    shift_first: bool,
    multiply: bool,
) -> tuple[Tensor, Tensor]:
    op, check = "autoregressive_inverse", reference.autoregressive_inverse_check
    arguments = (input, program, weights, parameters, constants, scale, numbers, shift_first, multiply)
    read = checked(check, op, program, weights, parameters, *arguments)
    samples = len(input)
    out = torch.empty(tuple(input.shape), dtype=input.dtype, device=input.device)
    log_det = torch.empty((samples,), dtype=weights.dtype, device=weights.device)
    if samples:
        most = max((level.outputs for level in read.levels), default=0)
        state, made = scratch(weights, samples, read.rows), scratch(weights, samples, most)
        given = torch.tensor(list(numbers), dtype=weights.dtype).to(weights.device, non_blocking=True)
        with on_device(input):
            launch(
                inverse_kernel, triton.cdiv(samples, BLOCK_N), input.contiguous(), constants, out, log_det, state, made, program,
                weights, parameters, given, samples, most, len(read.levels), SCALE=scale,
                SHIFT_FIRST=shift_first, MULTIPLY=multiply, **options(weights),
            )  # fmt: skip
    return out, log_det


def autoregressive_inverse_spline(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    numbers: Sequence[float],
    num_bins: int,
    derivatives: int,
    tails: int,
    parametrization: int,
    turn: bool,
) -> tuple[Tensor, Tensor]:
    op, check = "autoregressive_inverse_spline", reference.autoregressive_inverse_spline_check
    of_spline = (numbers, num_bins, derivatives, tails, parametrization, turn)
    read = checked(check, op, program, weights, parameters, input, program, weights, parameters, constants, *of_spline)
    samples = len(input)
    out = torch.empty(tuple(input.shape), dtype=input.dtype, device=input.device)
    log_det = torch.empty((samples,), dtype=weights.dtype, device=weights.device)
    if samples:
        most = max((level.outputs for level in read.levels), default=0)
        state, made = scratch(weights, samples, read.rows), scratch(weights, samples, most)
        names = ("LEFT", "RIGHT", "BOTTOM", "TOP", "LEAST_WIDTH", "LEAST_HEIGHT", "LEAST_SLOPE", "SCALE")
        n = dict(zip(names, map(float, numbers), strict=True))
        zuko = SPLINE_PARAMETRIZATIONS[parametrization] == "zuko"
        with on_device(input):
            launch(
                spline_kernel, triton.cdiv(samples, BLOCK_N), input.contiguous(), constants, out, log_det, state, made, program,
                weights, parameters, samples, most, len(read.levels), **n,
                CLIP=-1 / math.log(n["LEAST_SLOPE"]) if zuko else 0.0, TAILS=tails, TURN=turn, K=num_bins, COLUMNS=derivatives,
                BINS=max(triton.next_power_of_2(num_bins), 2), **options(weights),
            )  # fmt: skip
    return out, log_det


def autoregressive_inverse_advance(
    state: Tensor,
    known: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    level: int,
    outputs: int,
) -> Tensor:
    op, check = "autoregressive_inverse_advance", reference.autoregressive_inverse_advance_check
    arguments = (state, known, program, weights, parameters, constants, level, outputs)
    read = checked(check, op, program, weights, parameters, *arguments)
    samples = len(known)
    out = torch.empty((samples, outputs), dtype=known.dtype, device=known.device)
    if samples:
        before = read.levels[level - 1] if level else None
        first, count = (before.feature, before.features) if before is not None else (0, 0)
        with on_device(known):
            launch(
                advance_kernel, triton.cdiv(samples, BLOCK_N), state, known.contiguous(), constants if level == 0 else None, out,
                scratch(weights, samples, outputs), program, weights, parameters, samples, first, count, outputs, level,
                **options(weights),
            )  # fmt: skip
    return out
