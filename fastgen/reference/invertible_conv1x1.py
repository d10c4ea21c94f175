"""What `invertible_conv1x1` means, in plain torch: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions",
2018, 3.2, with the actnorm of 3.1 before it: y = W z + bias with z = x scale + shift, or (x + shift) scale, over channels."""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, opmath_dtype


def invertible_conv1x1_fwd(
    input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None, shift_first: bool
) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    x = (
        input.to(opmath_dtype(input.dtype)).flatten(2)
        if input.dim() > 2
        else input.to(opmath_dtype(input.dtype))[..., None]
    )
    s, t, b = (None if p is None else p.to(x.dtype)[:, None] for p in (scale, shift, bias))
    if t is not None and shift_first:
        x = x + t
    if s is not None:
        x = x * s
    if t is not None and not shift_first:
        x = x + t
    y = torch.matmul(weight.to(x.dtype), x)
    return copy_like((y if b is None else y + b).reshape(input.shape), input)


def invertible_conv1x1_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, shift_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With P = sum dy x^T and g = sum dy over samples and positions: dx = scale W^T dy, dW = P diag(scale) + g shift^T (of
    (x + shift) scale: (P + g shift^T) diag(scale)), the others from W^T P and W^T g. Returns the gradients of (input, weight
    [C, C], scale [C], shift [C], bias [C]), the small ones in fp32 (fp64 for fp64)."""
    dtype = opmath_dtype(input.dtype)
    x, dy = (
        t.to(dtype).movedim(1, 0).reshape(t.shape[1], math.prod(input.shape) // max(t.shape[1], 1))
        for t in (input, grad_output)
    )
    w = weight.to(dtype)
    s = x.new_ones(x.shape[0]) if scale is None else scale.to(dtype)
    t = x.new_zeros(x.shape[0]) if shift is None else shift.to(dtype)
    p, g = dy @ x.T, dy.sum(1)
    if shift_first:
        p = p + torch.outer(g, t)
        d_weight, d_shift = p * s, w.T @ g * s
    else:
        d_weight, d_shift = p * s + torch.outer(g, t), w.T @ g
    dx = (w * s).T @ dy
    n, c, *spatial = input.shape
    in_input = copy_like(dx.reshape(c, n, *spatial).movedim(0, 1), input)
    return in_input, d_weight, (w * p).sum(0), d_shift, g


def invertible_conv1x1_log_det(
    weight: Tensor, scale: Tensor | None, log_scale: bool, n: int, positions: int, wide: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """positions (log |det W| + sum log |s|), -inf of a singular matrix, as [n] in fp32 or fp64, and positions W^-T, NaN of a
    singular matrix, or [0, 0], in fp32 (fp64 for an fp64 weight); found in fp64."""
    matrix = weight.double()
    total = torch.linalg.slogdet(matrix).logabsdet
    if scale is not None:
        total = total + (scale.double() if log_scale else scale.double().abs().log()).sum()
    log_det = (positions * total).to(torch.float64 if wide else torch.float32).repeat(n)
    if not gradient:
        return log_det, matrix.new_empty(0, 0).to(opmath_dtype(weight.dtype))
    found = torch.linalg.inv_ex(matrix)
    inverse = torch.where(found.info == 0, found.inverse.T * positions, torch.nan)
    return log_det, inverse.to(opmath_dtype(weight.dtype)).contiguous()


def invertible_conv1x1_fwd_check(
    input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None, shift_first: bool
) -> None:
    op = "invertible_conv1x1"
    check_main(op, "input", input, dims=2)
    c = input.shape[1]
    check_floats(op, input, (c, c), weight=weight)
    check_floats(op, input, (c,), scale=scale, shift=shift, bias=bias)


def invertible_conv1x1_bwd_check(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, shift_first: bool
) -> None:
    op = "invertible_conv1x1"
    invertible_conv1x1_fwd_check(input, weight, scale, shift, None, shift_first)
    check_floats(op, input, tuple(input.shape), grad_output=grad_output)
    require(op, grad_output.dtype == input.dtype, f"grad_output must be {input.dtype}, got {grad_output.dtype}")


def invertible_conv1x1_log_det_check(
    weight: Tensor, scale: Tensor | None, log_scale: bool, n: int, positions: int, wide: bool, gradient: bool
) -> None:
    op = "invertible_conv1x1"
    check_main(op, "weight", weight, dims=2)
    require(op, weight.dim() == 2 and weight.shape[0] == weight.shape[1], "weight must be [C, C]")
    check_floats(op, weight, (weight.shape[0],), scale=scale)
    require(op, n >= 0, f"n must not be negative, got {n}")


def invertible_conv1x1_fwd_fake(
    input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None, shift_first: bool
) -> Tensor:
    return empty_like_layout(input)


def invertible_conv1x1_bwd_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, shift_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, dtype = input.shape[1], opmath_dtype(input.dtype)
    small = [input.new_empty(shape, dtype=dtype) for shape in ((c, c), (c,), (c,), (c,))]
    return empty_like_layout(input), small[0], small[1], small[2], small[3]


def invertible_conv1x1_log_det_fake(
    weight: Tensor, scale: Tensor | None, log_scale: bool, n: int, positions: int, wide: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    side = weight.shape[0] if gradient else 0
    log_det = weight.new_empty((n,), dtype=torch.float64 if wide else torch.float32)
    return log_det, weight.new_empty((side, side), dtype=opmath_dtype(weight.dtype))
