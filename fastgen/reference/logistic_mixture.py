"""What `logistic_mixture` means, in plain torch: Salimans et al., "PixelCNN++", ICLR 2017, section 2.1 and equations 1 and 2, with
the parameters laid out as in pclucas14/pixel-cnn-pp. The arithmetic of one pixel is in `_sampling`, which samplers draw by too."""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, check_per_sample, require
from ._layout import copy_like, dense_strides, empty_like_layout, is_channels_last, opmath_dtype
from ._sampling import draw_logistic_mixture, log_prob_logistic_mixture, log_prob_logistic_mixture_bwd, uniforms


def logistic_mixture_fwd(logits: Tensor, target: Tensor, levels: int) -> Tensor:
    """The negative log-likelihood of every sample [N], in nats, in fp32, or fp64 for fp64 logits."""
    dtype = opmath_dtype(logits.dtype)
    parameters, values = (t.to(dtype).movedim(1, -1) for t in (logits, target))
    pixels = log_prob_logistic_mixture(parameters, values, levels)  # [N, H, W]
    return -pixels.reshape(logits.shape[0], math.prod(logits.shape[2:])).sum(1)


def logistic_mixture_bwd(grad: Tensor, logits: Tensor, target: Tensor, levels: int) -> Tensor:
    dtype = opmath_dtype(logits.dtype)
    parameters, values = (t.to(dtype).movedim(1, -1) for t in (logits, target))
    gradient = log_prob_logistic_mixture_bwd(parameters, values, levels) * -grad.to(dtype)[:, None, None, None]
    return copy_like(gradient.movedim(-1, 1), logits)


def logistic_mixture_sample(
    logits: Tensor, seeds: Tensor, channels: int, element: int, step: int, levels: int, temperature: float
) -> Tensor:
    """Images [N, C, H, W] in fp32, or fp64 for fp64 logits; NaN where a parameter is not finite."""
    n, _, h, w = logits.shape
    drawn_by = uniforms(seeds, element, step, h * w * (1 + channels)).reshape(n, h, w, 1 + channels)
    images = draw_logistic_mixture(logits.movedim(1, -1), channels, levels, temperature, drawn_by).movedim(-1, 1)
    if is_channels_last(logits):
        return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return images.contiguous()


def _check_logits(op: str, logits: Tensor, channels: int, levels: int, least: int) -> None:
    check_main(op, "logits", logits, dims=4)
    require(op, logits.dim() == 4, f"logits must be [N, 10 M or 3 M, H, W], got shape {tuple(logits.shape)}")
    require(op, channels in (1, 3), f"channels must be 1 or 3, got {channels}")
    each = 10 if channels == 3 else 3
    fits = logits.shape[1] > 0 and logits.shape[1] % each == 0
    require(op, fits, f"logits of {channels} colors must have {each} channels a mixture, got {logits.shape[1]}")
    require(op, levels == least or levels >= 2, f"levels must be at least 2, got {levels}")


def logistic_mixture_fwd_check(logits: Tensor, target: Tensor, levels: int) -> None:
    op = "logistic_mixture"
    check_main(op, "target", target, dims=4)
    _check_logits(op, logits, target.shape[1], levels, least=2)
    check_floats(op, logits, (logits.shape[0], target.shape[1], *logits.shape[2:]), target=target)


def logistic_mixture_bwd_check(grad: Tensor, logits: Tensor, target: Tensor, levels: int) -> None:
    logistic_mixture_fwd_check(logits, target, levels)
    check_floats("logistic_mixture", logits, (logits.shape[0],), grad=grad)


def logistic_mixture_sample_check(
    logits: Tensor, seeds: Tensor, channels: int, element: int, step: int, levels: int, temperature: float
) -> None:
    op = "logistic_mixture_sample"
    _check_logits(op, logits, channels, levels, least=0)
    check_per_sample(op, "seeds", seeds, logits)
    require(op, element >= 0, f"element must not be negative, got {element}")
    require(op, 0 <= temperature < math.inf, f"temperature must be finite and not negative, got {temperature}")


def logistic_mixture_fwd_fake(logits: Tensor, target: Tensor, levels: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=opmath_dtype(logits.dtype))


def logistic_mixture_bwd_fake(grad: Tensor, logits: Tensor, target: Tensor, levels: int) -> Tensor:
    return empty_like_layout(logits)


def logistic_mixture_sample_fake(
    logits: Tensor, seeds: Tensor, channels: int, element: int, step: int, levels: int, temperature: float
) -> Tensor:
    shape = (logits.shape[0], channels, *logits.shape[2:])
    strides = dense_strides(shape, is_channels_last(logits))
    return torch.empty_strided(shape, strides, dtype=opmath_dtype(logits.dtype), device=logits.device)
