"""Triton kernels of `concat_elu`: a program owns BLOCK elements of x in memory order, reads them once and writes elu(x) and
elu(-x), which stand `inner` apart, or in the backward reads the two gradients there.

Of a contiguous tensor `inner` is the elements of a sample, of a channels-last one its channels. Where it is large a program stays
within one stretch of so many elements, where it is small it goes through several.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._activations import exp_and_less_one
from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.reference._layout import empty_like_layout, empty_with_channels, is_channels_last

__all__ = ["concat_elu_bwd", "concat_elu_fwd", "reasons"]

BLOCK = 1024  # eight elements a thread over 128 threads: 16 bytes of bf16
WITHIN = 8 * BLOCK  # stretches of at least so many elements have programs of their own


@triton.jit
def place(inner, tiles, count, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the elements of a program: where each stands in x, where its first half stands in y, and which are there."""
    program = tl.program_id(0).to(tl.int64)
    if ACROSS:
        first = program * BLOCK
        at = first + tl.arange(0, BLOCK)
        outer = first // inner + ((first % inner).to(tl.int32) + tl.arange(0, BLOCK)) // inner
        return at, at + outer * inner, at < count
    else:
        outer, i = program // tiles, program % tiles * BLOCK + tl.arange(0, BLOCK)
        return outer * inner + i, outer * 2 * inner + i, i < inner


@triton.jit
def concat_elu_kernel(
    x,  # [outer, inner]
    y,  # [outer, 2, inner]
    inner,
    tiles,  # programs a stretch where not ACROSS
    count,  # elements of x
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    at, to, inside = place(inner, tiles, count, ACROSS, BLOCK)
    v = read(x, at, inside, ACC)
    _, below = exp_and_less_one(-tl.abs(v), ACC)
    tl.store(y + to, tl.where(v > 0, v, below).to(y.dtype.element_ty), mask=inside)
    tl.store(y + to + inner, tl.where(v < 0, -v, below).to(y.dtype.element_ty), mask=inside)


@triton.jit
def concat_elu_bwd_kernel(
    grad,  # [outer, 2, inner]
    x,  # [outer, inner]
    dx,  # as x
    inner,
    tiles,  # programs a stretch where not ACROSS
    count,  # elements of x
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    at, to, inside = place(inner, tiles, count, ACROSS, BLOCK)
    v = read(x, at, inside, ACC)
    first = read(grad, to, inside, ACC)
    second = read(grad, to + inner, inside, ACC)
    e = tl.exp(-tl.abs(v))
    value = first * tl.where(v > 0, 1.0, e) - second * tl.where(v < 0, 1.0, e)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(args)


def concat_elu_fwd(input: Tensor) -> Tensor:
    operands = _operands("concat_elu_fwd", input)
    x, y = operands.like("input", input), empty_with_channels(input, 2 * input.shape[1])
    _launch(concat_elu_kernel, input, x, y)
    return y


def concat_elu_bwd(grad_output: Tensor, input: Tensor) -> Tensor:
    operands = _operands("concat_elu_bwd", input)
    if grad_output.dtype != input.dtype:
        operands.fail(f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    doubled = empty_with_channels(input, 2 * input.shape[1])
    operands.check("grad_output", grad_output, doubled.shape)
    x, dx = operands.like("input", input), empty_like_layout(input)
    _launch(concat_elu_bwd_kernel, input, dense(grad_output, doubled), x, dx)
    return dx


def _operands(op: str, input: Tensor) -> Operands:
    operands = Operands(op, input)
    if input.dim() < 2:
        operands.fail(f"input must be [N, C, *], got shape {tuple(input.shape)}")
    return operands


def _launch(kernel: Any, input: Tensor, *tensors: Tensor) -> None:
    count = input.numel()
    if count == 0:
        return
    inner = input.shape[1] if is_channels_last(input) else math.prod(input.shape[1:])
    across, tiles = inner < WITHIN, triton.cdiv(inner, BLOCK)
    with on_device(input):
        launch(
            kernel, triton.cdiv(count, BLOCK) if across else count // inner * tiles, *tensors, inner, tiles, count, ACROSS=across,
            BLOCK=BLOCK, ACC=accumulator(input), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
