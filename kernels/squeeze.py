"""The Triton kernel of `squeeze`: a program owns BLOCK elements of a sample of the output in memory order, finds where each comes
from, and copies them. Offsets within a sample are of 32 bits, those of samples of 64."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import SQUEEZE_ORDERS
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, dense, tensor_reasons
from fastgen.reference._layout import is_channels_last
from fastgen.reference.squeeze import squeeze_fake

__all__ = ["reasons", "squeeze"]

BLOCK = 1024  # eight elements a thread over 128 threads: 16 bytes of bf16
MAX_SAMPLE = 2**31 - BLOCK

CHANNEL_MAJOR = tl.constexpr(SQUEEZE_ORDERS.index("channel_major"))
CHECKERBOARD = tl.constexpr(SQUEEZE_ORDERS.index("checkerboard"))


@triton.jit
def squeeze_kernel(
    x,  # [N, C_x, H_x, W_x], dense
    y,  # [N, C_y, H_y, W_y], dense, in the same layout
    sample,  # elements
    tiles,  # programs a sample
    channels,  # of the large image
    channels_x,
    height_x,
    width_x,
    channels_y,
    height_y,
    width_y,
    FACTOR: tl.constexpr,
    ORDER: tl.constexpr,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = (program % tiles * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c, column, row = at % channels_y, at // channels_y % width_y, at // channels_y // width_y
    else:
        column, row, c = at % width_y, at // width_y % height_y, at // width_y // height_y
    if INVERSE:
        i, j = row % FACTOR, column % FACTOR
        place = i * FACTOR + j
        if ORDER == CHECKERBOARD:
            place = tl.where(place == 0, 0, tl.where(place == 3, 1, place + 1))
        c = c * (FACTOR * FACTOR) + place if ORDER == CHANNEL_MAJOR else place * channels + c
        row, column = row // FACTOR, column // FACTOR
    else:
        if ORDER == CHANNEL_MAJOR:
            place, c = c % (FACTOR * FACTOR), c // (FACTOR * FACTOR)
        else:
            place, c = c // channels, c % channels
        if ORDER == CHECKERBOARD:
            place = tl.where(place == 0, 0, tl.where(place == 1, 3, place - 1))
        row, column = row * FACTOR + place // FACTOR, column * FACTOR + place % FACTOR
    if CHANNELS_LAST:
        source = (row * width_x + column) * channels_x + c
    else:
        source = (c * height_x + row) * width_x + column
    first = program // tiles * sample
    value = tl.load(x + first + source, mask=at < sample)
    tl.store(y + first + at, value, mask=at < sample)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    input = args[0]
    found = tensor_reasons([input])
    sample = math.prod(input.shape[1:])
    if sample > MAX_SAMPLE:
        found.append(f"samples of less than 2^31 elements fit the offsets, got {sample}")
    return found


def squeeze(input: Tensor, factor: int, order: int, inverse: bool) -> Tensor:
    operands = Operands("squeeze", input)
    operands.code("order", order, SQUEEZE_ORDERS)
    if input.dim() != 4:
        operands.fail(f"input must be [N, C, H, W], got shape {tuple(input.shape)}")
    if factor < 1 or (SQUEEZE_ORDERS[order] == "checkerboard" and factor != 2):
        operands.fail(f"factor must be positive, and the checkerboard has factor 2, got {factor}")
    n, c, h, w = input.shape
    if (c % factor**2) if inverse else (h % factor or w % factor):
        operands.fail(f"factor must divide the image, got {factor} and shape {tuple(input.shape)}")
    output = squeeze_fake(input, factor, order, inverse)
    if output.numel() == 0:
        return output
    sample = c * h * w
    tiles = triton.cdiv(sample, BLOCK)
    with on_device(input):
        launch(
            squeeze_kernel, n * tiles, dense(input, input), output, sample, tiles, output.shape[1] if inverse else c, c, h, w,
            *output.shape[1:], FACTOR=factor, ORDER=order, INVERSE=inverse, CHANNELS_LAST=is_channels_last(input),
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output
