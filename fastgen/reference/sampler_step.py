"""What `sampler_step` means, in plain torch: one row of a coefficient table applied to a sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._schema import COLUMNS
from ._layout import empty_like_layout, opmath_dtype
from .philox_normal import philox_normal


def sampler_step_fwd(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    uncond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    variance: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    threshold: Tensor | None,
    return_prediction: bool,
    return_corrected: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arithmetic in fp32, or fp64 for an fp64 sample. Returns (x_next, second, third), like sample or empty tensors."""
    dtype = opmath_dtype(sample.dtype)
    row = table[step].to(dtype)
    c = dict(zip(COLUMNS, row.unbind(), strict=False))
    past = [h.to(dtype) for h in history]
    x, guided = sample.to(dtype), model_output.to(dtype)
    if uncond is not None:
        guided = uncond.to(dtype) + c["guidance_scale"] * (guided - uncond.to(dtype))
    prediction = c["prediction_sample"] * x + c["prediction_model"] * guided
    if threshold is not None:
        prediction = prediction * (1 / threshold.to(dtype)).reshape(-1, *[1] * (sample.dim() - 1))
    prediction = torch.clamp(prediction, c["clip_min"], c["clip_max"])

    def combined(of_sample: str, of_prediction: str, of_model: str) -> Tensor:
        return c[of_sample] * x + c[of_prediction] * prediction + _take(c[of_model], guided)

    x_next = combined("sample", "prediction", "model")
    for c_k, h in zip(row[len(COLUMNS) :], past, strict=False):
        x_next = x_next + c_k * h
    if seeds is not None:
        noise = philox_normal(seeds, sample.shape, step)
    if noise is not None:
        s = c["noise"]
        if variance is not None:
            s = s * torch.exp(c["log_noise"] + c["log_noise_slope"] * variance.to(dtype))
        x_next = x_next + s * noise.to(dtype)
    if mask is not None and known is not None:
        keep = c["known"] * known.to(dtype)
        if known_noise is not None:
            keep = keep + c["known_noise"] * known_noise.to(dtype)
        x_next = keep + mask.to(dtype) * (x_next - keep)
    second, third = sample.new_empty(0), sample.new_empty(0)
    if return_prediction:
        second = combined("output_sample", "output_prediction", "output_model")
        second = empty_like_layout(sample).copy_(second)
    if return_corrected:
        corrected = combined("corrected_sample", "corrected_prediction", "corrected_model")
        for e_k, h in zip(row[len(COLUMNS) + len(past) :], past, strict=False):
            corrected = corrected + e_k * h
        third = empty_like_layout(sample).copy_(corrected)
    return empty_like_layout(sample).copy_(x_next), second, third


def _take(coefficient: Tensor, guided: Tensor) -> Tensor:
    """A coefficient of 0 takes nothing: an infinite model output that the clip tames must not come back as 0 * Inf."""
    return torch.where(coefficient == 0, torch.zeros_like(guided), coefficient * guided)


def sampler_step_fwd_fake(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    uncond: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    variance: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    threshold: Tensor | None,
    return_prediction: bool,
    return_corrected: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    second, third = (
        empty_like_layout(sample) if wanted else sample.new_empty(0) for wanted in (return_prediction, return_corrected)
    )
    return empty_like_layout(sample), second, third


def sampler_step_out(*args: Any) -> None:
    """As :func:`sampler_step_fwd`, into the last three of its arguments: out, and prediction and corrected or None."""
    out, prediction, corrected = args[-3:]
    inputs: Any = (*args[:-3], prediction is not None, corrected is not None)
    results = sampler_step_fwd(*inputs)
    for target, result in zip((out, prediction, corrected), results, strict=True):
        if target is not None:
            target.copy_(result)


def sampler_step_out_fake(*args: Any) -> None:
    """Nothing comes back."""
