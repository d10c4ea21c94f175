"""What `sampler_step` means, in plain torch: one row of a coefficient table applied to a sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import empty_like_layout, opmath_dtype
from .philox_normal import philox_normal

# The columns of a coefficient table, in order; the coefficients c_k of the history follow, one column each.
COLUMNS: tuple[str, ...] = (
    "sample",  # a: x_next takes a * sample
    "prediction",  # b: ... + b * prediction
    "model",  # d: ... + d * guided model output (before conversion and clipping)
    "noise",  # s: ... + s * noise
    "prediction_sample",  # prediction = clip(prediction_sample * sample + prediction_model * guided)
    "prediction_model",
    "clip_min",  # -inf where nothing is clipped
    "clip_max",
    "guidance_scale",  # guided = uncond + guidance_scale * (model_output - uncond)
    "output_sample",  # second output = output_sample * sample + output_prediction * prediction + output_model * guided
    "output_prediction",
    "output_model",
    "log_noise",  # with a learned variance v, s becomes s * exp(log_noise + log_noise_slope * v)
    "log_noise_slope",
    "known",  # inpainting: where mask is 0, x_next is known * known + known_noise * known_noise instead
    "known_noise",
)


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
    return_prediction: bool,
) -> tuple[Tensor, Tensor]:
    """Arithmetic in fp32, or fp64 for an fp64 sample. Returns (x_next like sample, second output or an empty tensor)."""
    dtype = opmath_dtype(sample.dtype)
    row = table[step].to(dtype)
    c = dict(zip(COLUMNS, row.unbind(), strict=False))
    x, guided = sample.to(dtype), model_output.to(dtype)
    if uncond is not None:
        guided = uncond.to(dtype) + c["guidance_scale"] * (guided - uncond.to(dtype))
    prediction = c["prediction_sample"] * x + c["prediction_model"] * guided
    prediction = torch.clamp(prediction, c["clip_min"], c["clip_max"])
    x_next = c["sample"] * x + c["prediction"] * prediction + _take(c["model"], guided)
    for c_k, h in zip(row[len(COLUMNS) :], history, strict=False):
        x_next = x_next + c_k * h.to(dtype)
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
    second = sample.new_empty(0)
    if return_prediction:
        output = c["output_sample"] * x + c["output_prediction"] * prediction + _take(c["output_model"], guided)
        second = empty_like_layout(sample).copy_(output)
    return empty_like_layout(sample).copy_(x_next), second


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
    return_prediction: bool,
) -> tuple[Tensor, Tensor]:
    second = empty_like_layout(sample) if return_prediction else sample.new_empty(0)
    return empty_like_layout(sample), second
