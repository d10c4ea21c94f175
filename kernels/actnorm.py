"""Triton kernels of `actnorm`: tiles of positions by channels (`_channel_tiles`), each element read once and written once.

The backward and the statistics go through blocks of tiles of some channels and keep their sums in registers: of dy and of
dy (x + before); of x and of its square, both less the first element of the block, which is not far from their mean.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._channel_tiles import Positions, tile_at
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.reference._layout import empty_like_layout, opmath_dtype

__all__ = ["actnorm_bwd", "actnorm_fwd", "actnorm_statistics", "reasons"]


@triton.jit
def affine(scale, shift, c, inside, LOG: tl.constexpr, BEFORE: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr):
    """(before, slope, after) of channels: (x + before) slope + after."""
    s = tl.load(scale + c, mask=inside, other=0.0 if LOG else 1.0).to(ACC)
    t = tl.load(shift + c, mask=inside, other=0.0).to(ACC)
    if LOG:
        slope = tl.exp(-s) if INVERSE else tl.exp(s)
    else:
        slope = 1.0 / s if INVERSE else s
    if INVERSE:
        t = -t
    none = tl.zeros(t.shape, ACC)
    if BEFORE:
        return t, slope, none
    else:
        return none, slope, t


@triton.jit
def actnorm_kernel(
    x,  # [N, positions, C] through strides
    scale,  # [C]
    shift,  # [C]
    y,  # as x
    tiles,  # of a sample
    positions,
    channels,
    stride_p,
    stride_c,
    LOG: tl.constexpr,
    BEFORE: tl.constexpr,  # whether the shift is added first
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    beside = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    c = (program % beside * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    at, mask = tile_at(program // beside, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P)
    value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    before, slope, after = affine(scale, shift, c, c < channels, LOG, BEFORE, INVERSE, ACC)
    value = (value + before[None, :]) * slope[None, :] + after[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["all_tiles", "blocks"])
def actnorm_bwd_kernel(
    dy,  # [N, positions, C] through strides
    x,  # as dy
    scale,  # [C]
    shift,  # [C]
    dx,  # as dy
    parts,  # [2, blocks, C]: sums of dy and of dy (x + before)
    all_tiles,
    blocks,
    block,  # tiles of a block
    tiles,  # of a sample
    positions,
    channels,
    stride_p,
    stride_c,
    LOG: tl.constexpr,
    BEFORE: tl.constexpr,  # whether the shift is added first
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    beside = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    c = (program % beside * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    before, slope, _ = affine(scale, shift, c, c < channels, LOG, BEFORE, INVERSE, ACC)
    sum_dy = tl.zeros([BLOCK_C], dtype=ACC)
    sum_dy_x = tl.zeros([BLOCK_C], dtype=ACC)
    first = program // beside * block
    last = tl.minimum(first + block, all_tiles)
    for tile in range(first, last):
        at, mask = tile_at(tile, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        sum_dy += tl.sum(grad, axis=0)
        sum_dy_x += tl.sum(grad * (value + before[None, :]), axis=0)
        tl.store(dx + at, (grad * slope[None, :]).to(dx.dtype.element_ty), mask=mask)
    to = parts + program // beside * channels + c
    tl.store(to, sum_dy, mask=c < channels)
    tl.store(to + tl.cast(blocks, tl.int64) * channels, sum_dy_x, mask=c < channels)


@triton.jit(do_not_specialize=["all_tiles", "blocks"])
def statistics_kernel(
    x,  # [N, positions, C] through strides
    parts,  # [4, blocks, C]: the number of elements, the first, the sums of all less that and of their squares
    all_tiles,
    blocks,
    block,  # tiles of a block
    tiles,  # of a sample
    positions,
    channels,
    stride_p,
    stride_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    beside = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    c = (program % beside * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    first = program // beside * block
    last = tl.minimum(first + block, all_tiles)
    of_first = first // tiles * positions * channels + first % tiles * BLOCK_P * stride_p
    pivot = tl.load(x + of_first + c.to(tl.int64) * stride_c, mask=c < channels, other=0.0).to(ACC)
    sums = tl.zeros([BLOCK_C], dtype=ACC)
    squares = tl.zeros([BLOCK_C], dtype=ACC)
    number = tl.zeros([BLOCK_C], dtype=ACC)
    for tile in range(first, last):
        at, mask = tile_at(tile, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P)
        value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        value = tl.where(mask, value - pivot[None, :], 0.0)
        sums += tl.sum(value, axis=0)
        squares += tl.sum(value * value, axis=0)
        number += tl.sum(mask.to(ACC), axis=0)
    to = parts + program // beside * channels + c
    apart = tl.cast(blocks, tl.int64) * channels
    tl.store(to, number, mask=c < channels)
    tl.store(to + apart, pivot, mask=c < channels)
    tl.store(to + 2 * apart, sums, mask=c < channels)
    tl.store(to + 3 * apart, squares, mask=c < channels)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


class _Call:
    """The sizes of a call, its tiles and its constants."""

    def __init__(self, op: str, input: Tensor) -> None:
        self.operands = Operands(op, input)
        if input.dim() < 2:
            self.operands.fail(f"input must be [N, C, *], got shape {tuple(input.shape)}")
        self.at = Positions.of(input)
        self.channels, self.positions = input.shape[1], math.prod(input.shape[2:])
        block_p, block_c = self.at.tile()
        self.beside = max(triton.cdiv(self.channels, block_c), 1)
        self.tiles = self.at.tiles(block_p)
        self.all_tiles = self.at.samples * self.tiles
        self.blocks, self.block = self.at.blocks(block_p, self.beside)
        self.tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "ACC": accumulator(input), "num_warps": 4}


def actnorm_fwd(
    input: Tensor, scale: Tensor, shift: Tensor, log_scale: bool, shift_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    call = _Call("actnorm_fwd", input)
    x, y = call.operands.like("input", input), empty_like_layout(input)
    scale, shift = (call.operands.sized(n, p, call.channels) for n, p in (("scale", scale), ("shift", shift)))
    if input.numel():
        with on_device(input):
            launch(
                actnorm_kernel, call.all_tiles * call.beside, x, scale, shift, y, call.tiles, *call.at.sizes(),
                LOG=log_scale, BEFORE=shift_first != inverse, INVERSE=inverse, **call.tile, enable_fp_fusion=True,
            )  # fmt: skip
    logs = scale.to(opmath_dtype(input.dtype))
    total = (logs if log_scale else logs.abs().log()).sum() * (call.positions * (-1 if inverse else 1))
    return y, total.repeat(input.shape[0])


def actnorm_bwd(
    grad_output: Tensor,
    grad_log_det: Tensor | None,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    log_scale: bool,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call("actnorm_bwd", input)
    if grad_output.dtype != input.dtype:
        call.operands.fail(f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    x, dx = call.operands.like("input", input), empty_like_layout(input)
    dy = call.operands.like("grad_output", grad_output)
    scale, shift = (call.operands.sized(n, p, call.channels) for n, p in (("scale", scale), ("shift", shift)))
    grad_log_det = call.operands.sized("grad_log_det", grad_log_det, input.shape[0])
    dtype = opmath_dtype(input.dtype)
    parts = (torch.empty if input.numel() else torch.zeros)(
        (2, call.blocks, call.channels), dtype=dtype, device=input.device
    )
    if input.numel():
        with on_device(input):
            launch(
                actnorm_bwd_kernel, call.blocks * call.beside, dy, x, scale, shift, dx, parts, call.all_tiles, call.blocks,
                call.block, call.tiles, *call.at.sizes(), LOG=log_scale, BEFORE=shift_first != inverse,
                INVERSE=inverse, **call.tile, enable_fp_fusion=True,
            )  # fmt: skip
    sum_dy, sum_dy_x = parts.sum(1)
    s, sign = scale.to(dtype), -1 if inverse else 1
    if log_scale:
        slope = torch.exp(sign * s)
    else:
        slope = 1 / s if inverse else s
    of_logs = sum_dy_x * slope
    if grad_log_det is not None:
        of_logs = of_logs + grad_log_det.to(dtype).sum() * call.positions
    d_shift = sum_dy * slope if shift_first != inverse else sum_dy
    return dx, sign * (of_logs if log_scale else of_logs / s), sign * d_shift


def actnorm_statistics(input: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    call = _Call("actnorm_statistics", input)
    if correction not in (0, 1):
        call.operands.fail(f"correction must be 0 or 1, got {correction}")
    dtype = opmath_dtype(input.dtype)
    if not input.numel():
        nothing = torch.full((call.channels,), float("nan"), dtype=dtype, device=input.device)
        return nothing, nothing.clone()
    parts = torch.empty((4, call.blocks, call.channels), dtype=dtype, device=input.device)
    with on_device(input):
        launch(
            statistics_kernel, call.blocks * call.beside, dense(input, input), parts, call.all_tiles, call.blocks,
            call.block, call.tiles, *call.at.sizes(), **call.tile, enable_fp_fusion=True,
        )  # fmt: skip
    counts, pivot, sums, squares = parts.double()
    count = input.numel() // call.channels
    means = pivot + sums / counts
    mean = (means * counts).sum(0) / count
    within, between = squares - sums.square() / counts, counts * (means - mean).square()
    variance = (within + between).sum(0).clamp_min(0) / max(count - correction, 0)
    return mean.to(dtype), variance.sqrt().to(dtype)
