"""What `gaussian_log_prob` means, in plain torch: the log-density of independent normals, summed over the features of a sample.

Where there is no ``log_scale`` beside ``mean``, the latter holds both, [N, 2 C, *], in one of GAUSSIAN_LAYOUTS.
"""

import math

import torch
from torch import Tensor

from .._schema import GAUSSIAN_LAYOUTS
from ._check import check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, opmath_dtype


def gaussian_log_prob_fwd(input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> Tensor:
    """[N] in fp32 (fp64 for fp64)."""
    x = input.to(opmath_dtype(input.dtype))
    m, s = _parameters(x, mean, log_scale, layout)
    terms = -0.5 * ((x - m) * torch.exp(-s)).square() - s - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).double().sum(1).to(x.dtype)


def gaussian_log_prob_bwd(
    grad_log_prob: Tensor, input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    """With u = (x - mean) / scale: -grad u / scale, grad u / scale and grad (u^2 - 1). Returns the gradients of (input, mean,
    log_scale), each of the dtype and layout of its own, the last two empty where there is none; that of both together, packed."""
    x = input.to(opmath_dtype(input.dtype))
    m, s = _parameters(x, mean, log_scale, layout)
    grad = grad_log_prob.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    e = torch.exp(-s)
    u = (x - m) * e
    d_mean, d_log_scale = grad * u * e, grad * (u.square() - 1)
    none = x.new_empty(0)
    in_input = copy_like(-d_mean, input)
    if mean is None:
        return in_input, none, none.clone()
    if log_scale is None:
        return in_input, copy_like(_packed(d_mean, d_log_scale, layout), mean), none
    return in_input, copy_like(d_mean, mean), copy_like(d_log_scale, log_scale)


def _parameters(x: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> tuple[Tensor, Tensor]:
    """(mean, log_scale) of the shape and dtype of ``x``."""
    if mean is None:
        return torch.zeros_like(x), torch.zeros_like(x)
    if log_scale is None:
        if GAUSSIAN_LAYOUTS[layout] == "interleaved":
            mean, log_scale = mean[:, 0::2], mean[:, 1::2]
        else:
            mean, log_scale = mean.chunk(2, 1) if x.shape[1] else (mean, mean)
            if GAUSSIAN_LAYOUTS[layout] == "scale_first":
                mean, log_scale = log_scale, mean
    return mean.to(x.dtype), log_scale.to(x.dtype)


def _packed(mean: Tensor, log_scale: Tensor, layout: int) -> Tensor:
    if GAUSSIAN_LAYOUTS[layout] == "interleaved":
        return torch.stack([mean, log_scale], 2).flatten(1, 2)
    return torch.cat([mean, log_scale] if GAUSSIAN_LAYOUTS[layout] == "mean_first" else [log_scale, mean], 1)


def gaussian_log_prob_fwd_check(input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> None:
    op = "gaussian_log_prob"
    check_main(op, "input", input, dims=2)
    known = 0 <= layout < len(GAUSSIAN_LAYOUTS)
    require(op, known, f"layout must be an index of GAUSSIAN_LAYOUTS, got {layout}")
    require(op, mean is not None or log_scale is None, "log_scale needs mean beside it")
    n, c, *spatial = input.shape
    both = mean is not None and log_scale is None
    check_floats(op, input, (n, 2 * c if both else c, *spatial), mean=mean)
    check_floats(op, input, tuple(input.shape), log_scale=log_scale)


def gaussian_log_prob_bwd_check(
    grad_log_prob: Tensor, input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int
) -> None:
    gaussian_log_prob_fwd_check(input, mean, log_scale, layout)
    check_floats("gaussian_log_prob", input, (input.shape[0],), grad_log_prob=grad_log_prob)


def gaussian_log_prob_fwd_fake(input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> Tensor:
    return input.new_empty(input.shape[0], dtype=opmath_dtype(input.dtype))


def gaussian_log_prob_bwd_fake(
    grad_log_prob: Tensor, input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    none = input.new_empty(0, dtype=opmath_dtype(input.dtype))
    d_mean, d_log_scale = (none.clone() if p is None else empty_like_layout(p) for p in (mean, log_scale))
    return empty_like_layout(input), d_mean, d_log_scale
