"""What `conv2d` means, in plain torch: a convolution with an affine map and an activation before it, sums and a scale after it.

What its packed weights are is in `_convolution.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _convolution, _convolution_direct
from ._check import check_floats, check_skip, require
from ._convolution import check_image, check_operands, empty, epilogue, in_layout, prologue
from ._layout import opmath_dtype, together
from ._moments import empty_moments, moments


def conv2d_fwd(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
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
    wide = weight.to(y.dtype)
    y = F.conv2d(y, wide, None, list(stride), list(padding), list(dilation), groups)
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


def conv2d_pack(weight: Tensor, outputs: int) -> Tensor:
    return _convolution.pack(weight, outputs, 1)


def conv2d_packed(
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
        1,
    )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv2d_fwd_check(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> None:
    check_image("conv2d_fwd", input)
    c = check_skip("conv2d_fwd", input, skip)
    k = weight.shape[0] if weight.dim() == 4 else 0
    require("conv2d_fwd", groups >= 1 and c % groups == 0 and k % groups == 0, f"groups must divide channels: {groups}")
    require("conv2d_fwd", weight.dim() == 4, f"weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    check_floats("conv2d_fwd", input, (k, c // groups, *weight.shape[2:]), weight=weight)
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        require("conv2d_fwd", len(pair) == 2 and min(pair) >= least, f"{name} must be two integers of at least {least}")
    require("conv2d_fwd", min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")
    size = tuple(
        output_size(*of) for of in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    require("conv2d_fwd", min(size) >= 1, "the kernel is larger than the padded image")
    check_operands("conv2d_fwd", input, c, k, size, bias, input_scale, input_shift, activation, embedding, residual)


def conv2d_pack_check(weight: Tensor, outputs: int) -> None:
    _convolution.check_pack("conv2d_pack", weight, outputs, 1)


def conv2d_packed_check(
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
        "conv2d_packed",
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
        1,
    )


def conv2d_fwd_fake(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
) -> Tensor:
    size = [output_size(*of) for of in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)]
    return empty(input, weight.shape[0], size)


def conv2d_pack_fake(weight: Tensor, outputs: int) -> Tensor:
    return _convolution.empty_packed(weight, outputs, 1)


def conv2d_packed_fake(
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
    return empty(input, out_channels, input.shape[2:])


def conv2d_direct_pack(weight: Tensor) -> Tensor:
    return _convolution_direct.pack(weight, 1)


def conv2d_direct(
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
        1,
    )


def conv2d_direct_pack_check(weight: Tensor) -> None:
    _convolution_direct.check_pack("conv2d_direct_pack", weight, 1)


def conv2d_direct_check(
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
    op = "conv2d_direct"
    _convolution_direct.check_direct(
        op, input, packed, out_channels, bias, input_scale, input_shift, activation, embedding, residual, skip, 1
    )


def conv2d_direct_pack_fake(weight: Tensor) -> Tensor:
    return _convolution_direct.empty_packed(weight, 1)


def conv2d_direct_fake(
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
    return empty(input, out_channels, input.shape[2:])


def conv2d_packed_moments(*args: Any) -> tuple[Tensor, Tensor]:
    y = conv2d_packed(*args)
    return y, moments(y)


def conv2d_direct_moments(*args: Any) -> tuple[Tensor, Tensor]:
    y = conv2d_direct(*args)
    return y, moments(y)


conv2d_packed_moments_check = conv2d_packed_check
conv2d_direct_moments_check = conv2d_direct_check


def conv2d_packed_moments_fake(*args: Any) -> tuple[Tensor, Tensor]:
    y = conv2d_packed_fake(*args)
    return y, empty_moments(y)


def conv2d_direct_moments_fake(*args: Any) -> tuple[Tensor, Tensor]:
    y = conv2d_direct_fake(*args)
    return y, empty_moments(y)
