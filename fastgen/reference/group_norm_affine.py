"""What `group_norm_affine` means, in plain torch: group normalization as one multiply-add a (sample, channel).

With mean m and reciprocal deviation r of the group of a channel, of input + channel_bias: ((x + channel_bias - m) r w + b)
(1 + s) + t = x a + c, where a = r w (1 + s) and c = b (1 + s) + t - (m - channel_bias) a.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import _moments
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
    return _map_of(mean, rstd, c, weight, bias, channel_bias, scale, shift)


def _map_of(
    mean: Tensor,
    rstd: Tensor,
    c: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(a, c) of the statistics [N, groups, 1], in their dtype."""
    n, num_groups, dtype = *mean.shape[:2], mean.dtype
    mean, a = (t.expand(n, num_groups, c // num_groups).reshape(n, c) for t in (mean, rstd))
    if weight is not None:
        a = a * weight.to(dtype)
    beta = torch.zeros_like(a) if bias is None else bias.to(dtype).expand(n, c)
    if scale is not None:
        modulation = 1 + scale.to(dtype)
        a, beta = a * modulation, beta * modulation
    if shift is not None:
        beta = beta + shift.to(dtype)
    centre = mean if channel_bias is None else mean - channel_bias.to(dtype)
    return a.contiguous(), beta - centre * a


def group_norm_affine_known(
    input: Tensor,
    skip: Tensor | None,
    moments: Tensor,
    skip_moments: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`group_norm_affine` from the moments of each channel, in fp64; of what they are of no longer, by reading it."""
    params = (weight, bias, channel_bias, scale, shift)
    parts = [(input, moments)] if skip is None or skip_moments is None else [(input, moments), (skip, skip_moments)]
    if input.numel() == 0 or not all(_moments.fits(*part) for part in parts):
        return group_norm_affine(input, skip, num_groups, *params, eps)
    known = torch.cat([part[1] for part in parts], 1)
    n, c, pixels = *known.shape[:2], math.prod(input.shape[2:])
    means = known[..., 0] if channel_bias is None else known[..., 0] + channel_bias.double()
    means, squares = (t.view(n, num_groups, -1) for t in (means, known[..., 1]))
    mean = means.mean(-1, keepdim=True)
    m2 = (squares + pixels * (means - mean).square()).sum(-1, keepdim=True)
    rstd = torch.rsqrt(m2 / (pixels * (c // num_groups)) + eps)
    a, beta = _map_of(mean, rstd, c, *params)
    return a.to(opmath_dtype(input.dtype)), beta.to(opmath_dtype(input.dtype))


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


def group_norm_affine_known_check(
    input: Tensor,
    skip: Tensor | None,
    moments: Tensor,
    skip_moments: Tensor | None,
    num_groups: int,
    *rest: Any,
) -> None:
    op = "group_norm_affine_known"
    group_norm_affine_check(input, skip, num_groups, *rest)
    require(op, (skip is None) == (skip_moments is None), "skip_moments must be given where skip is")
    for name, of, known in (("moments", input, moments), ("skip_moments", skip, skip_moments)):
        if of is None or known is None:
            continue
        check_floats(op, input, (*of.shape[:2], 3), **{name: known})
        fits = known.dtype == torch.float64 and known.is_contiguous()
        require(op, fits, f"{name} must be what a convolution returns, contiguous float64")


def group_norm_affine_known_fake(
    input: Tensor, skip: Tensor | None, moments: Tensor, skip_moments: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return group_norm_affine_fake(input, skip, *rest)
