"""What `actnorm` means, in plain torch: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, 3.1.

Every form is y = (x + before) slope + after with three numbers a channel, so that what cancels, a mean of 1e4 and the shift that
removes it, is added first where the form has it so.
"""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, opmath_dtype


def actnorm_fwd(
    input: Tensor, scale: Tensor, shift: Tensor, log_scale: bool, shift_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Returns (output, log_det [N]), the latter in fp32 (fp64 for fp64)."""
    x = input.to(opmath_dtype(input.dtype))
    before, slope, after = _affine(x, scale, shift, log_scale, shift_first, inverse)
    logs = scale.to(x.dtype) if log_scale else torch.log(scale.to(x.dtype).abs())
    log_det = _positions(x) * logs.sum() * (-1 if inverse else 1)
    return copy_like((x + before) * slope + after, input), log_det.expand(x.shape[0]).contiguous()


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
    """Returns the gradients of (input, scale [C], shift [C]), the small ones in fp32 (fp64 for fp64)."""
    x = input.to(opmath_dtype(input.dtype))
    before, slope, _ = _affine(x, scale, shift, log_scale, shift_first, inverse)
    dy = grad_output.to(x.dtype)
    others = [dim for dim in range(x.dim()) if dim != 1]
    d_after, d_slope = dy.sum(others), (dy * (x + before)).sum(others)
    k = slope.flatten()
    s = scale.to(x.dtype)
    of_log_det = x.new_zeros(()) if grad_log_det is None else grad_log_det.to(x.dtype).sum() * _positions(x)
    if inverse:
        d_scale = -d_slope * k - of_log_det  # of log |s|
        d_shift = -d_after if shift_first else -d_after * k
    else:
        d_scale = d_slope * k + of_log_det
        d_shift = d_after * k if shift_first else d_after
    return copy_like(dy * slope, input), d_scale if log_scale else d_scale / s, d_shift


def actnorm_statistics(input: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    """Returns (mean, deviation) [C] in fp32 (fp64 for fp64); ``correction`` is taken from the number of elements."""
    wide = input.double().movedim(1, 0).flatten(1)
    dtype = opmath_dtype(input.dtype)
    mean = wide.mean(1)
    variance = (wide - mean[:, None]).square().sum(1) / max(wide.shape[1] - correction, 0) if wide.shape[1] else mean
    return mean.to(dtype), variance.sqrt().to(dtype)


def _positions(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _affine(
    x: Tensor, scale: Tensor, shift: Tensor, log_scale: bool, shift_first: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(before, slope, after) in the dtype of ``x``, as they broadcast over it."""
    s, t = scale.to(x.dtype), shift.to(x.dtype)
    if not log_scale and s.device.type == "cpu":  # elsewhere to look would be to wait
        zeros = (s == 0).nonzero().flatten().tolist()
        require("actnorm", not zeros, f"scale must not be 0, got scale[{zeros[0] if zeros else ''}] = 0")
    none = torch.zeros_like(t)
    if log_scale:
        s = torch.exp(-s if inverse else s)
    elif inverse:
        s = 1 / s
    sign = -t if inverse else t
    before, after = (sign, none) if shift_first != inverse else (none, sign)
    return tuple(p.reshape(-1, *[1] * (x.dim() - 2)) for p in (before, s, after))  # type: ignore[return-value]


def actnorm_fwd_check(
    input: Tensor, scale: Tensor, shift: Tensor, log_scale: bool, shift_first: bool, inverse: bool
) -> None:
    check_main("actnorm", "input", input, dims=2)
    check_floats("actnorm", input, (input.shape[1],), scale=scale, shift=shift)


def actnorm_bwd_check(
    grad_output: Tensor,
    grad_log_det: Tensor | None,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    log_scale: bool,
    shift_first: bool,
    inverse: bool,
) -> None:
    actnorm_fwd_check(input, scale, shift, log_scale, shift_first, inverse)
    check_floats("actnorm", input, tuple(input.shape), grad_output=grad_output)
    check_floats("actnorm", input, (input.shape[0],), grad_log_det=grad_log_det)
    same = grad_output.dtype == input.dtype
    require("actnorm", same, f"grad_output must be {input.dtype}, got {grad_output.dtype}")


def actnorm_statistics_check(input: Tensor, correction: int) -> None:
    check_main("actnorm", "input", input, dims=2)
    require("actnorm", correction in (0, 1), f"correction must be 0 or 1, got {correction}")


def actnorm_fwd_fake(
    input: Tensor, scale: Tensor, shift: Tensor, log_scale: bool, shift_first: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(input), input.new_empty(input.shape[0], dtype=opmath_dtype(input.dtype))


def actnorm_bwd_fake(
    grad_output: Tensor,
    grad_log_det: Tensor | None,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    log_scale: bool,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    small = [input.new_empty(input.shape[1], dtype=opmath_dtype(input.dtype)) for _ in range(2)]
    return empty_like_layout(input), small[0], small[1]


def actnorm_statistics_fake(input: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    mean = input.new_empty(input.shape[1], dtype=opmath_dtype(input.dtype))
    return mean, torch.empty_like(mean)
