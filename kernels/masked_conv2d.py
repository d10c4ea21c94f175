"""Triton kernels of `masked_conv2d`: a convolution by the live taps alone as one implicit matrix product; the backward is in
`_masked_conv2d_bwd`.

A program owns BLOCK_P pixels of a sample and BLOCK_K outputs of a run, all of one group and one color. It goes through the live
taps in raster order and the channels of the group BLOCK_C at a time: pixels times channels of the image, shifted by the tap, zero
outside of it, times the weights of the tap as they lie in the whole kernel. At the ordered tap it loads the channels that the color
sees and no others. Sums are in ACC registers, in one order.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._masked_conv2d_bwd import weight_gradient
from fastgen.kernels._masked_conv2d_plan import Plan, make_plan
from fastgen.kernels._operands import tensor_reasons
from fastgen.kernels._tiles import product, strides_of
from fastgen.reference._convolution import empty
from fastgen.reference._layout import empty_like_layout

__all__ = ["masked_conv2d_bwd", "masked_conv2d_fwd", "reasons"]


@triton.jit
def taps_kernel(
    image,  # [N, C, H, W]
    weight,  # of [output, input of its group, kh, kw] by its strides
    bias,  # [K] or None
    out,  # [N, K, H, W]
    image_strides,
    weight_strides,
    out_strides,
    height,
    width,
    first,  # output of the run
    outputs,  # of the run
    channel,  # the first channel of the group
    first_weight,  # of the weights of the first output, in the dimension of outputs
    seen,  # channels of the group
    low,  # the channels that are seen at the ordered tap
    high,
    first_tap,
    end_tap,
    ordered_tap,  # -1 where there is none
    kernel_width,
    origin_y,
    origin_x,
    dy,  # pixels from one row of taps to the next, negative where the kernel is turned round
    dx,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles = tl.cdiv(height * width, BLOCK_P)
    blocks = tl.cdiv(outputs, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    n = program // (tiles * blocks)
    p = (program // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int32)
    k = (program % blocks * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    y, x = p // width, p % width
    inside, there = p < height * width, k < outputs
    acc = tl.zeros([BLOCK_P, BLOCK_K], dtype=ACC)
    of_sample = image + n * image_strides[0] + channel.to(tl.int64) * image_strides[1]
    of_output = weight + (first_weight + k).to(tl.int64) * weight_strides[0]
    for tap in range(first_tap, end_tap):
        row, column = tap // kernel_width, tap % kernel_width
        ty, tx = y + (row - origin_y) * dy, x + (column - origin_x) * dx
        read = inside & (ty >= 0) & (ty < height) & (tx >= 0) & (tx < width)
        of_pixel = of_sample + ty.to(tl.int64) * image_strides[2] + tx.to(tl.int64) * image_strides[3]
        of_tap = of_output + row.to(tl.int64) * weight_strides[2] + column * weight_strides[3]
        begin = tl.where(tap == ordered_tap, low, 0)
        end = tl.where(tap == ordered_tap, high, seen)
        for start in range(begin, end, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            live = c < end
            at = c.to(tl.int64)
            pixels = tl.load(
                of_pixel[:, None] + at[None, :] * image_strides[1], mask=read[:, None] & live[None, :], other=0.0
            )
            weights = tl.load(
                of_tap[None, :] + at[:, None] * weight_strides[1], mask=live[:, None] & there[None, :], other=0.0
            )
            acc += product(pixels, weights, DOT, ACC)
    if bias is not None:
        acc += tl.load(bias + first + k, mask=there, other=0.0).to(ACC)[None, :]
    to = out + n * out_strides[0] + (first + k).to(tl.int64)[None, :] * out_strides[1]
    to += y.to(tl.int64)[:, None] * out_strides[2] + x.to(tl.int64)[:, None] * out_strides[3]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside[:, None] & there[None, :])


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    found = tensor_reasons(tensors)
    image = args[1 if op == "masked_conv2d_bwd" else 0]
    if image.dim() == 4 and image.shape[2] * image.shape[3] >= 2**31:
        found.append(f"at most 2^31 pixels fit an image, got {image.shape[2]} x {image.shape[3]}")
    return found


def masked_conv2d_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> Tensor:
    plan, operands = make_plan("masked_conv2d_fwd", input, weight, mask_type, dilation, groups, color_channels)
    if bias is not None:
        operands.check("bias", bias, (weight.shape[0],))
        bias = bias.contiguous()
    out = empty(input, weight.shape[0], input.shape[2:])
    _convolve(plan, input, plan.weight, bias, out, transposed=False)
    return out


def masked_conv2d_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    plan, operands = make_plan("masked_conv2d_bwd", input, weight, mask_type, dilation, groups, color_channels)
    operands.check("grad_output", grad_output, (input.shape[0], weight.shape[0], *input.shape[2:]))
    grad = grad_output.to(input.dtype)
    by_input, by_weight = input.new_empty(0), weight.new_empty(0)
    if wants_input:
        by_input = empty_like_layout(input)
        _convolve(plan, grad, plan.weight, None, by_input, transposed=True)
    if wants_weight:
        by_weight = weight_gradient(plan, grad, input).to(weight.dtype)
    return by_input, by_weight


def _convolve(plan: Plan, image: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, transposed: bool) -> None:
    """``transposed``: of the gradient of the output, with the kernel turned round, to that of the input."""
    if out.numel() == 0:
        return
    (n, outputs, height, width), seen = out.shape, image.shape[1] // plan.groups
    of_group = outputs // plan.groups
    strides = weight.stride()
    if transposed:
        strides = (strides[1], strides[0], *strides[2:])
    sign = -1 if transposed else 1
    with on_device(out):
        for run in plan.runs(transposed):
            length = run.last - run.first
            # Turned round, outputs are the second dimension of the weight, counted within the group, and inputs its first.
            at = run.first - run.group * of_group if transposed else run.first
            weights = weight[run.group * seen :] if transposed else weight
            tile = plan.tile(length, seen, height * width)
            programs = n * triton.cdiv(height * width, tile["BLOCK_P"]) * triton.cdiv(length, tile["BLOCK_K"])
            launch(
                taps_kernel, programs, image, weights, bias, out, strides_of(image), strides, strides_of(out), height,
                width, run.first, length, run.group * seen, at, seen, run.low, run.high, plan.taps.start, plan.taps.stop,
                plan.ordered_tap, weight.shape[3], *plan.origin, sign * plan.dilation[0], sign * plan.dilation[1], **tile,
                **plan.options,
            )  # fmt: skip
