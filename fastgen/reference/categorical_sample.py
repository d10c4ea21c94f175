"""What `categorical_sample` means, in plain torch: the draw itself is in `_sampling`."""

import math

import torch
from torch import Tensor

from ._check import check_main, check_per_sample, require
from ._layout import opmath_dtype
from ._sampling import draw_categorical, uniforms


def categorical_sample(
    logits: Tensor,
    seeds: Tensor,
    element: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    return_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    """(levels [N, *], log-probabilities [N, *] or empty); -1 and NaN where the largest logit of a position is not finite."""
    positions = math.prod(logits.shape[2:])
    rows = logits.movedim(1, -1).reshape(logits.shape[0], positions, logits.shape[1])  # [N, P, K]
    drawn, log_probs = draw_categorical(rows, temperature, top_k, top_p, uniforms(seeds, element, step, positions))
    shape = (logits.shape[0], *logits.shape[2:])
    drawn = drawn.reshape(shape).contiguous()
    return drawn, log_probs.reshape(shape).contiguous() if return_log_prob else log_probs.new_empty(0)


def categorical_sample_check(
    logits: Tensor,
    seeds: Tensor,
    element: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    return_log_prob: bool,
) -> None:
    op = "categorical_sample"
    check_main(op, "logits", logits, dims=2)
    require(op, logits.shape[1] > 0, f"logits must be [N, K, *] with K >= 1, got shape {tuple(logits.shape)}")
    check_per_sample(op, "seeds", seeds, logits)
    require(op, element >= 0, f"element must not be negative, got {element}")
    require(op, 0 <= temperature < math.inf, f"temperature must be finite and not negative, got {temperature}")
    require(op, top_k >= 0, f"top_k must not be negative, got {top_k}")
    require(op, 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")


def categorical_sample_fake(
    logits: Tensor,
    seeds: Tensor,
    element: int,
    step: int,
    temperature: float,
    top_k: int,
    top_p: float,
    return_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], *logits.shape[2:])
    log_probs = logits.new_empty(shape if return_log_prob else (0,), dtype=opmath_dtype(logits.dtype))
    return logits.new_empty(shape, dtype=torch.int64), log_probs
