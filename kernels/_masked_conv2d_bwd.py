"""The Triton kernel of the gradient of the weight of `masked_conv2d`.

A program owns one live tap, BLOCK_K outputs and BLOCK_C channels of a group, and a chunk of the pixels of all samples: outputs
times pixels of the gradient times pixels, shifted by the tap, times channels of the image. Torch adds the chunks up, in one order
and without atomics, and lets go what no color sees. Masked taps have no program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._masked_conv2d_plan import Plan
from fastgen.kernels._tiles import product, strides_of
from fastgen.reference._layout import opmath_dtype
from fastgen.reference._masked_taps import mask

PROGRAMS = 528  # that fill a GPU: 4 a multiprocessor on 132 of them
LEAST = 256  # pixels of a chunk


@triton.jit
def weight_kernel(
    grad,  # [N, K, H, W]
    image,  # [N, C, H, W]
    out,  # [chunks, taps, K, C / groups]
    grad_strides,
    image_strides,
    samples,
    height,
    width,
    outputs,  # of a group
    seen,  # channels of a group
    groups,
    chunk,  # pixels of all samples
    first_tap,
    taps,
    kernel_width,
    origin_y,
    origin_x,
    dy,
    dx,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    of_outputs, of_channels = tl.cdiv(outputs, BLOCK_K), tl.cdiv(seen, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    part, rest = (
        program // (taps * groups * of_outputs * of_channels),
        program % (taps * groups * of_outputs * of_channels),
    )
    t, rest = rest // (groups * of_outputs * of_channels), rest % (groups * of_outputs * of_channels)
    group, rest = rest // (of_outputs * of_channels), rest % (of_outputs * of_channels)
    k = rest // of_channels * BLOCK_K + tl.arange(0, BLOCK_K)
    c = rest % of_channels * BLOCK_C + tl.arange(0, BLOCK_C)
    there, live = k < outputs, c < seen
    tap = (first_tap + t).to(tl.int32)
    down, across = (tap // kernel_width - origin_y) * dy, (tap % kernel_width - origin_x) * dx
    area = height * width
    of_output = grad + (group * outputs + k) * grad_strides[1]
    of_channel = image + (group * seen + c) * image_strides[1]
    acc = tl.zeros([BLOCK_K, BLOCK_C], dtype=ACC)
    last = tl.minimum((part + 1) * chunk, samples.to(tl.int64) * area)
    for start in range(part * chunk, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        n, of_sample = p // area, (p % area).to(tl.int32)
        y, x = of_sample // width, of_sample % width
        ty, tx = y + down, x + across
        read = inside & (ty >= 0) & (ty < height) & (tx >= 0) & (tx < width)
        at = n * grad_strides[0] + y.to(tl.int64) * grad_strides[2] + x.to(tl.int64) * grad_strides[3]
        g = tl.load(of_output[:, None] + at[None, :], mask=there[:, None] & read[None, :], other=0.0)
        to = n * image_strides[0] + ty.to(tl.int64) * image_strides[2] + tx.to(tl.int64) * image_strides[3]
        i = tl.load(of_channel[None, :] + to[:, None], mask=read[:, None] & live[None, :], other=0.0)
        acc += product(g, i, DOT, ACC)
    row = ((part * taps + t) * groups + group) * outputs
    tl.store(out + (row + k)[:, None] * seen + c[None, :], acc, mask=there[:, None] & live[None, :])


def weight_gradient(plan: Plan, grad: Tensor, image: Tensor) -> Tensor:
    """[K, C / groups, kh, kw] in the type of the sums."""
    outputs, seen, _, width = plan.weight.shape
    result = torch.zeros(plan.weight.shape, dtype=opmath_dtype(image.dtype), device=image.device)
    if image.numel() == 0 or len(plan.taps) == 0:
        return result
    pixels, of_group = image.shape[0] * image.shape[2] * image.shape[3], outputs // plan.groups
    tile: dict[str, Any] = plan.tile(of_group, seen, pixels)
    tile["BLOCK_P"] = min(32, tile["BLOCK_P"])
    tiles = len(plan.taps) * plan.groups * triton.cdiv(of_group, tile["BLOCK_K"]) * triton.cdiv(seen, tile["BLOCK_C"])
    chunks = max(min(PROGRAMS // tiles, pixels // LEAST), 1)
    chunk = triton.cdiv(triton.cdiv(pixels, chunks), tile["BLOCK_P"]) * tile["BLOCK_P"]
    chunks = triton.cdiv(pixels, chunk)
    parts = torch.empty((chunks, len(plan.taps), outputs, seen), dtype=result.dtype, device=image.device)
    with on_device(image):
        launch(
            weight_kernel, tiles * chunks, grad, image, parts, strides_of(grad), strides_of(image), image.shape[0],
            image.shape[2], image.shape[3], of_group, seen, plan.groups, chunk, plan.taps.start, len(plan.taps), width,
            *plan.origin, *plan.dilation, **tile, **plan.options,
        )  # fmt: skip
    result.flatten(2)[..., plan.taps.start : plan.taps.stop] = parts.sum(0).permute(1, 2, 0)
    if plan.ordered_tap < 0:
        return result
    live = mask(plan.mask_type, plan.weight.shape, plan.groups, plan.color_channels, image.device)
    return torch.where(live, result, 0.0)
