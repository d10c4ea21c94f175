"""What `group_norm_affine` means, in plain torch: group normalization as one multiply-add a (sample, channel).

With mean m and reciprocal deviation r of the group of a channel, of input + channel_bias: ((x + channel_bias - m) r w + b)
(1 + s) + t = x a + c, where a = r w (1 + s) and c = b (1 + s) + t - (m - channel_bias) a.
"""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, check_skip, require
from ._layout import opmath_dtype, together


def group_norm_affine(
    input: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns (a, c) [N, C] in fp32, or fp64 for fp64 input; of two inputs the channels of ``skip`` come last."""
    x = together(input, skip).to(opmath_dtype(input.dtype))
    n, c = x.shape[:2]
    if channel_bias is not None:
        x = x + channel_bias.to(x.dtype).reshape(n, c, *[1] * (x.dim() - 2))
    grouped = x.reshape(n, num_groups, c // num_groups * math.prod(x.shape[2:]))
    mean = grouped.mean(-1, keepdim=True)
    rstd = torch.rsqrt((grouped - mean).square().mean(-1, keepdim=True) + eps)
    mean, a = (t.expand(n, num_groups, c // num_groups).reshape(n, c) for t in (mean, rstd))
    if weight is not None:
        a = a * weight.to(x.dtype)
    beta = torch.zeros_like(a) if bias is None else bias.to(x.dtype).expand(n, c)
    if scale is not None:
        modulation = 1 + scale.to(x.dtype)
        a, beta = a * modulation, beta * modulation
    if shift is not None:
        beta = beta + shift.to(x.dtype)
    centre = mean if channel_bias is None else mean - channel_bias.to(x.dtype)
    return a.contiguous(), beta - centre * a


def group_norm_affine_check(
    input: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> None:
    op = "group_norm_affine"
    check_main(op, "input", input, dims=2)
    n, c = input.shape[0], check_skip(op, input, skip)
    require(op, num_groups >= 1 and c % num_groups == 0, f"num_groups must divide channels: {num_groups}, {c}")
    check_floats(op, input, (c,), weight=weight, bias=bias)
    check_floats(op, input, (n, c), channel_bias=channel_bias, scale=scale, shift=shift)


def group_norm_affine_fake(
    input: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    c = input.shape[1] + (0 if skip is None else skip.shape[1])
    of_sample = input.new_empty((input.shape[0], c), dtype=opmath_dtype(input.dtype))
    return of_sample, torch.empty_like(of_sample)
