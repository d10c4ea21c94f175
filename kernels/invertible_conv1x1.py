"""Triton kernels of `invertible_conv1x1`: positions by channels (`_channel_tiles`), a matrix over the channels.

Forward: a program owns BLOCK_P positions and all outputs, goes through the inputs BLOCK_K at a time, makes z = (x + before) slope +
after of them on the way, and multiplies. The backward's dx is the same with the transposed matrix. Weight: a program owns a tile of
outputs by inputs and a block of tiles, and keeps P = sum dy x^T and g = sum dy in registers; torch adds up the blocks, in one
order, and makes the gradients of the small tensors of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._channel_tiles import Positions, tile_at
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons
from fastgen.kernels._tiles import padded, product
from fastgen.reference._layout import empty_like_layout, opmath_dtype

__all__ = ["invertible_conv1x1_bwd", "invertible_conv1x1_fwd", "reasons"]

# Chosen by count, not yet by measurement: 32 sums a thread of 4 warps, 8 of each tile of the weight's gradient.
MAX_CHANNELS = 128
BLOCK_K = 16
POSITIONS = 32
WEIGHT_TILE = 32


@triton.jit
def matrix_kernel(
    x,  # [N, positions, C] through strides
    weight,  # [C, C], outputs by inputs
    scale,  # [C] or None
    shift,  # [C] or None
    bias,  # [C] or None
    y,  # as x
    tiles,  # of a sample
    positions,
    channels,
    stride_p,
    stride_c,
    SHIFT_FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < channels
        at, mask = tile_at(tile, tiles, k, positions, channels, stride_p, stride_c, BLOCK_P)
        z = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        matrix = tl.load(
            weight + c[None, :] * channels + k[:, None], mask=inside[:, None] & (c < channels)[None, :], other=0.0
        )
        if SHIFT_FIRST and shift is not None:
            z += tl.load(shift + k, mask=inside, other=0.0).to(ACC)[None, :]
        if scale is not None:
            z *= tl.load(scale + k, mask=inside, other=0.0).to(ACC)[None, :]
        if (not SHIFT_FIRST) and shift is not None:
            z += tl.load(shift + k, mask=inside, other=0.0).to(ACC)[None, :]
        acc += product(z, matrix.to(ACC), DOT, ACC)
    if bias is not None:
        acc += tl.load(bias + c, mask=c < channels, other=0.0).to(ACC)[None, :]
    at, mask = tile_at(tile, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["all_tiles"])
def weight_kernel(
    dy,  # [N, positions, C] through strides
    x,  # as dy
    outer,  # [blocks, C, C]: sums of dy x^T
    sums,  # [blocks, C]: of dy
    all_tiles,
    block,  # tiles of a block
    tiles,  # of a sample
    positions,
    channels,
    stride_p,
    stride_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    beside = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    part, of_matrix = program // (beside * beside), (program % (beside * beside)).to(tl.int32)
    o = of_matrix // beside * BLOCK_C + tl.arange(0, BLOCK_C)
    c = of_matrix % beside * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_C], dtype=ACC)
    total = tl.zeros([BLOCK_C], dtype=ACC)
    first = part * block
    last = tl.minimum(first + block, all_tiles)
    for tile in range(first, last):
        at, mask = tile_at(tile, tiles, o, positions, channels, stride_p, stride_c, BLOCK_P)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        at, mask = tile_at(tile, tiles, c, positions, channels, stride_p, stride_c, BLOCK_P)
        value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        acc += product(tl.trans(grad), value, DOT, ACC)
        total += tl.sum(grad, axis=0)
    inside = (o < channels)[:, None] & (c < channels)[None, :]
    tl.store(outer + (part * channels + o[:, None]) * channels + c[None, :], acc, mask=inside)
    if of_matrix % beside == 0:
        tl.store(sums + part * channels + o, total, mask=o < channels)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    channels = args[0].shape[1] if args[0].dim() > 1 else 0
    found = tensor_reasons(arg for arg in args if isinstance(arg, Tensor))
    if channels > MAX_CHANNELS:
        found.append(
            f"at most {MAX_CHANNELS} channels fit a program, got {channels}: the library's product is faster there"
        )
    return found


class _Call:
    """The sizes of a call and the operands of the shape of its input."""

    def __init__(self, op: str, input: Tensor) -> None:
        self.operands = Operands(op, input)
        if input.dim() < 2:
            self.operands.fail(f"input must be [N, C, *], got shape {tuple(input.shape)}")
        self.input, self.at, self.channels = input, Positions.of(input), input.shape[1]
        if self.channels > MAX_CHANNELS:
            self.operands.fail(f"at most {MAX_CHANNELS} channels fit a program, got {self.channels}")
        few = triton.next_power_of_2(max(self.at.positions, 16))  # a product takes 16 at least
        self.block_p = min(few, POSITIONS) if self.at.planes else POSITIONS
        self.tiles = self.at.tiles(self.block_p)
        self.all_tiles = self.at.samples * self.tiles
        self.acc = accumulator(input)

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        bias: Tensor | None,
        shift_first: bool,
    ) -> Tensor:
        y, block_c = empty_like_layout(self.input), padded(self.channels)
        if x.numel():
            with on_device(x):
                launch(
                    matrix_kernel, self.all_tiles, x, weight, scale, shift, bias, y, self.tiles, *self.at.sizes(),
                    SHIFT_FIRST=shift_first, BLOCK_P=self.block_p,
                    BLOCK_C=block_c, BLOCK_K=BLOCK_K, DOT=self.acc, ACC=self.acc, num_warps=8 if block_c > 64 else 4,
                    enable_fp_fusion=True,
                )  # fmt: skip
        return y


def invertible_conv1x1_fwd(
    input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None, shift_first: bool
) -> Tensor:
    call = _Call("invertible_conv1x1_fwd", input)
    c = call.channels
    weight = call.operands.sized("weight", weight, c, c)
    small = [call.operands.sized(n, p, c) for n, p in (("scale", scale), ("shift", shift), ("bias", bias))]
    return call.multiply(call.operands.like("input", input), weight, small[0], small[1], small[2], shift_first)


def invertible_conv1x1_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, shift_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call("invertible_conv1x1_bwd", input)
    if grad_output.dtype != input.dtype:
        call.operands.fail(f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    c, dtype, device = call.channels, opmath_dtype(input.dtype), input.device
    x, dy = call.operands.like("input", input), call.operands.like("grad_output", grad_output)
    w = call.operands.sized("weight", weight, c, c).to(dtype)
    scale, shift = call.operands.sized("scale", scale, c), call.operands.sized("shift", shift, c)
    s = torch.ones(c, dtype=dtype, device=device) if scale is None else scale.to(dtype)
    t = torch.zeros(c, dtype=dtype, device=device) if shift is None else shift.to(dtype)
    dx = call.multiply(dy, (w * s).T.contiguous(), None, None, None, False)
    beside = max(triton.cdiv(c, WEIGHT_TILE), 1)
    blocks, block = call.at.blocks(call.block_p, beside**2)
    make: Any = torch.empty if input.numel() else torch.zeros
    outer, sums = (make(shape, dtype=dtype, device=device) for shape in ((blocks, c, c), (blocks, c)))
    if input.numel():
        with on_device(input):
            launch(
                weight_kernel, blocks * beside**2, dy, x, outer, sums, call.all_tiles, block, call.tiles, *call.at.sizes(),
                BLOCK_P=call.block_p, BLOCK_C=WEIGHT_TILE, DOT=call.acc, ACC=call.acc, num_warps=4, num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    p, g = outer.sum(0), sums.sum(0)
    through_shift = torch.outer(g, t)
    d_shift = (w * g[:, None]).sum(0)
    if shift_first:
        p = p + through_shift
        return dx, p * s, (w * p).sum(0), d_shift * s, g
    return dx, p * s + through_shift, (w * p).sum(0), d_shift, g
