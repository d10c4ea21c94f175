"""What `upsample_conv2d` means, in plain torch: nearest upsampling by two, then a 3x3 convolution that keeps the size, with an
affine map and an activation before them, sums and a scale after them. What its packed weights are is in `_convolution.py`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _convolution, _convolution_direct
from ._check import check_floats, check_skip, require
from ._convolution import check_image, check_operands, empty, epilogue, in_layout, prologue
from ._layout import opmath_dtype, together
from ._moments import empty_moments, moments


def upsample_conv2d_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    y = prologue(together(input, skip).to(opmath_dtype(input.dtype)), input_scale, input_shift, activation)
    y = F.conv2d(upsampled(y), weight.to(y.dtype), padding=1)
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


def upsampled(x: Tensor) -> Tensor:
    """Every pixel of [N, C, H, W] four times, [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def upsample_conv2d_pack(weight: Tensor, outputs: int) -> Tensor:
    return _convolution.pack(weight, outputs, 2)


def upsample_conv2d_packed(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    return _convolution.packed(
        input,
        packed,
        out_channels,
        bias,
        input_scale,
        input_shift,
        activation,
        embedding,
        residual,
        output_scale,
        skip,
        2,
    )


def output_size(input: Tensor) -> tuple[int, int]:
    return 2 * input.shape[2], 2 * input.shape[3]


def upsample_conv2d_fwd_check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> None:
    op = "upsample_conv2d_fwd"
    check_image(op, input)
    c = check_skip(op, input, skip)
    fits = weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3)
    require(op, fits, f"weight must be [K, C, 3, 3], got shape {tuple(weight.shape)}")
    check_floats(op, input, (weight.shape[0], c, 3, 3), weight=weight)
    require(op, min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")
    require(op, min(input.shape[2:]) >= 1, f"the image must have a pixel, got shape {tuple(input.shape)}")
    check_operands(
        op,
        input,
        c,
        weight.shape[0],
        output_size(input),
        bias,
        input_scale,
        input_shift,
        activation,
        embedding,
        residual,
    )


def upsample_conv2d_pack_check(weight: Tensor, outputs: int) -> None:
    _convolution.check_pack("upsample_conv2d_pack", weight, outputs, 2)


def upsample_conv2d_packed_check(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> None:
    _convolution.check_packed(
        "upsample_conv2d_packed",
        input,
        packed,
        out_channels,
        bias,
        input_scale,
        input_shift,
        activation,
        embedding,
        residual,
        skip,
        2,
    )


def upsample_conv2d_fwd_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    return empty(input, weight.shape[0], output_size(input))


def upsample_conv2d_pack_fake(weight: Tensor, outputs: int) -> Tensor:
    return _convolution.empty_packed(weight, outputs, 2)


def upsample_conv2d_packed_fake(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    return empty(input, out_channels, output_size(input))


def upsample_conv2d_direct_pack(weight: Tensor) -> Tensor:
    return _convolution_direct.pack(weight, 2)


def upsample_conv2d_direct(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    return _convolution_direct.direct(
        input,
        packed,
        out_channels,
        bias,
        input_scale,
        input_shift,
        activation,
        embedding,
        residual,
        output_scale,
        skip,
        2,
    )


def upsample_conv2d_direct_pack_check(weight: Tensor) -> None:
    _convolution_direct.check_pack("upsample_conv2d_direct_pack", weight, 2)


def upsample_conv2d_direct_check(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> None:
    op = "upsample_conv2d_direct"
    _convolution_direct.check_direct(
        op, input, packed, out_channels, bias, input_scale, input_shift, activation, embedding, residual, skip, 2
    )


def upsample_conv2d_direct_pack_fake(weight: Tensor) -> Tensor:
    return _convolution_direct.empty_packed(weight, 2)


def upsample_conv2d_direct_fake(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    return empty(input, out_channels, output_size(input))


def upsample_conv2d_packed_moments(*args: Any) -> tuple[Tensor, Tensor]:
    y = upsample_conv2d_packed(*args)
    return y, moments(y)


def upsample_conv2d_direct_moments(*args: Any) -> tuple[Tensor, Tensor]:
    y = upsample_conv2d_direct(*args)
    return y, moments(y)


upsample_conv2d_packed_moments_check = upsample_conv2d_packed_check
upsample_conv2d_direct_moments_check = upsample_conv2d_direct_check


def upsample_conv2d_packed_moments_fake(*args: Any) -> tuple[Tensor, Tensor]:
    y = upsample_conv2d_packed_fake(*args)
    return y, empty_moments(y)


def upsample_conv2d_direct_moments_fake(*args: Any) -> tuple[Tensor, Tensor]:
    y = upsample_conv2d_direct_fake(*args)
    return y, empty_moments(y)
