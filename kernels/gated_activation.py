"""Triton kernels of `gated_activation`: a program owns a tile of positions and channels of one sample, [BLOCK_P, BLOCK_C] through
two strides, so that contiguous and channels-last tensors share the code; it reads a and b once and writes each result once.

In the backward it goes through a block of tiles and keeps the sums that are the gradient of a condition a channel in registers;
torch adds the blocks up, in one order and without atomics.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import GATED_ACTIVATIONS
from fastgen.kernels._activations import sigmoid_with_slope, tanh_with_slope
from fastgen.kernels._elements import load_or
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.kernels._slices import Blocks, blocks_of, partial_sums
from fastgen.reference._layout import empty_like_layout, empty_with_channels, is_channels_last, opmath_dtype

__all__ = ["gated_activation_bwd", "gated_activation_fwd", "reasons"]

TILE = 1024  # eight elements of a and of b a thread over 128 threads


@triton.jit
def place(start, positions, c, channels, stride_c, stride_p, BLOCK_P: tl.constexpr):
    """Offsets of a tile within a sample, and which elements are there."""
    p = start + tl.arange(0, BLOCK_P)
    return p[:, None] * stride_p + c[None, :] * stride_c, (p < positions)[:, None] & (c < channels)[None, :]


@triton.jit
def halves(x, beside, c_a, c_b, at, half, mask, ACC: tl.constexpr):
    """a + c_a and b + c_b of a tile; ``beside`` is a condition of the shape of x, or None."""
    a = tl.load(x + at, mask=mask, other=0.0).to(ACC) + c_a[None, :]
    b = tl.load(x + at + half, mask=mask, other=0.0).to(ACC) + c_b[None, :]
    if beside is not None:
        a += tl.load(beside + at, mask=mask, other=0.0).to(ACC)
        b += tl.load(beside + at + half, mask=mask, other=0.0).to(ACC)
    return a, b


@triton.jit(do_not_specialize=["tiles_c", "tiles"])
def gated_activation_kernel(
    x,  # [N, 2 C, P] through strides
    condition,  # [N, 2 C] or None
    beside,  # as x, or None
    y,  # [N, C, P]
    channels,  # C
    positions,  # P
    tiles_c,  # programs side by side
    tiles,  # programs a sample
    stride_c,
    stride_p,  # of x
    stride_y,  # of a position of y
    TANH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    size = tl.cast(channels, tl.int64) * positions
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tile // tiles_c * BLOCK_P
    at, mask = place(start, positions, c, channels, stride_c, stride_p, BLOCK_P)
    to, _mask = place(start, positions, c, channels, stride_c, stride_y, BLOCK_P)
    c_a = load_or(condition, n * 2 * channels + c, c < channels, 0.0, ACC)
    c_b = load_or(condition, (n * 2 + 1) * channels + c, c < channels, 0.0, ACC)
    a, b = halves(x, beside, c_a, c_b, at + n * 2 * size, tl.cast(channels, tl.int64) * stride_c, mask, ACC)
    if TANH:
        a, _slope = tanh_with_slope(a, ACC)
    s, _slope = sigmoid_with_slope(b)
    tl.store(y + n * size + to, (a * s).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_c", "blocks", "steps", "samples"])
def gated_activation_bwd_kernel(
    grad,  # [N, C, P]
    x,  # [N, 2 C, P] through strides
    condition,  # [N, 2 C] or None
    beside,  # as x, or None
    dx,  # as x
    parts,  # [2, N, blocks, C]: sums of the gradients of a and b, or None
    channels,  # C
    positions,  # P
    tiles_c,  # programs side by side
    blocks,  # of a sample and a tile of channels
    steps,  # tiles of a block, one after the other
    samples,  # N
    stride_c,
    stride_p,  # of x
    stride_y,  # of a position of grad
    TANH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile, of_block = program % tiles_c, program // tiles_c
    n = of_block // blocks
    size = tl.cast(channels, tl.int64) * positions
    half = tl.cast(channels, tl.int64) * stride_c
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    c_a = load_or(condition, n * 2 * channels + c, inside, 0.0, ACC)
    c_b = load_or(condition, (n * 2 + 1) * channels + c, inside, 0.0, ACC)
    sum_a = tl.zeros([BLOCK_C], dtype=ACC)
    sum_b = tl.zeros([BLOCK_C], dtype=ACC)
    first = of_block % blocks * steps * BLOCK_P
    for start in range(
        first, first + tl.cast(steps, tl.int64) * BLOCK_P, BLOCK_P
    ):  # past the last position nothing is there
        at, mask = place(start, positions, c, channels, stride_c, stride_p, BLOCK_P)
        from_grad, _mask = place(start, positions, c, channels, stride_c, stride_y, BLOCK_P)
        at += n * 2 * size
        g = tl.load(grad + n * size + from_grad, mask=mask, other=0.0).to(ACC)
        a, b = halves(x, beside, c_a, c_b, at, half, mask, ACC)
        s, slope_b = sigmoid_with_slope(b)
        if TANH:
            t, slope_a = tanh_with_slope(a, ACC)
            d_a = g * slope_a * s
            d_b = g * t * slope_b
        else:
            d_a = g * s
            d_b = g * a * slope_b
        if parts is not None:
            sum_a += tl.sum(tl.where(mask, d_a, 0.0), axis=0)
            sum_b += tl.sum(tl.where(mask, d_b, 0.0), axis=0)
        tl.store(dx + at, d_a.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + at + half, d_b.to(dx.dtype.element_ty), mask=mask)
    if parts is not None:
        to = parts + of_block * channels + c
        tl.store(to, sum_a, mask=inside)
        tl.store(to + tl.cast(samples, tl.int64) * blocks * channels, sum_b, mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


class _Call:
    """The sizes, strides, tiles and conditions of a call."""

    def __init__(self, op: str, input: Tensor, condition: Tensor | None, activation: int) -> None:
        self.operands = Operands(op, input)
        if input.dim() < 2 or input.shape[1] % 2 or input.shape[1] < 2:
            self.operands.fail(f"input must be [N, 2 C, *] with C >= 1, got {tuple(input.shape)}")
        self.operands.code("activation", activation, GATED_ACTIVATIONS)
        self.n, self.channels, self.positions = len(input), input.shape[1] // 2, math.prod(input.shape[2:])
        self.input = self.operands.like("input", input)
        self.of_channel = self.beside = None
        if condition is not None and condition.dim() == 2:
            self.of_channel = self.operands.sized("condition", condition, self.n, 2 * self.channels)
        else:
            self.beside = self.operands.like("condition", condition)
        rows = is_channels_last(input) or self.positions == 1
        innermost = self.channels if rows else self.positions
        along = min(triton.next_power_of_2(max(innermost, 1)), TILE)
        block_p, block_c = (TILE // along, along) if rows else (along, TILE // along)
        self.strides = (1, 2 * self.channels, self.channels) if rows else (self.positions, 1, 1)
        self.tiles_c = triton.cdiv(self.channels, block_c)
        self.block_p = block_p
        self.constants = {
            "TANH": GATED_ACTIVATIONS[activation] == "tanh", "BLOCK_P": block_p, "BLOCK_C": block_c, "ACC": accumulator(input),
            "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip


def gated_activation_fwd(input: Tensor, condition: Tensor | None, activation: int) -> Tensor:
    call = _Call("gated_activation_fwd", input, condition, activation)
    y = empty_with_channels(input, call.channels)
    if y.numel():
        tiles = triton.cdiv(call.positions, call.block_p) * call.tiles_c
        with on_device(input):
            launch(
                gated_activation_kernel, call.n * tiles, call.input, call.of_channel, call.beside, y, call.channels, call.positions,
                call.tiles_c, tiles, *call.strides, **call.constants,
            )  # fmt: skip
    return y


def gated_activation_bwd(
    grad_output: Tensor, input: Tensor, condition: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    call = _Call("gated_activation_bwd", input, condition, activation)
    if grad_output.dtype != input.dtype:
        call.operands.fail(f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    halved = empty_with_channels(input, call.channels)
    call.operands.check("grad_output", grad_output, halved.shape)
    statistics = input.new_empty(0, dtype=opmath_dtype(input.dtype))
    blocks = Blocks(call.n, call.positions, blocks_of(call.n * call.tiles_c, call.positions, call.block_p).block)
    parts = None if call.of_channel is None else partial_sums(blocks, 2, call.channels, statistics)
    dx = empty_like_layout(input)
    if input.numel():
        with on_device(input):
            launch(
                gated_activation_bwd_kernel, call.n * blocks.a_group * call.tiles_c, dense(grad_output, halved), call.input,
                call.of_channel, call.beside, dx, parts, call.channels, call.positions, call.tiles_c, blocks.a_group,
                blocks.block // call.block_p, call.n, *call.strides, **call.constants,
            )  # fmt: skip
    return dx, statistics if parts is None else parts.sum(2).movedim(0, 1).flatten(1)
