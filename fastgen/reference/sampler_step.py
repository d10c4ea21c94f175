"""What `sampler_step` means, in plain torch: one row of a coefficient table applied to a sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._schema import COLUMNS
from ._check import check_floats, check_main, check_per_sample, check_table, require
from ._layout import copy_like, empty_like_layout, opmath_dtype
from ._memory import refuse_overlap
from ._philox import normals


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
        noise = normals(seeds, sample.shape, step)
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
        second = copy_like(second, sample)
    if return_corrected:
        corrected = combined("corrected_sample", "corrected_prediction", "corrected_model")
        for e_k, h in zip(row[len(COLUMNS) + len(past) :], past, strict=False):
            corrected = corrected + e_k * h
        third = copy_like(corrected, sample)
    return copy_like(x_next, sample), second, third


def _take(coefficient: Tensor, guided: Tensor) -> Tensor:
    """A coefficient of 0 takes nothing: an infinite model output that the clip tames must not come back as 0 * Inf."""
    return torch.where(coefficient == 0, torch.zeros_like(guided), coefficient * guided)


def _check_inputs(
    corrected: bool,
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
) -> None:
    op = "sampler_step"
    check_main(op, "sample", sample)
    check_floats(
        op, sample, tuple(sample.shape), model_output=model_output, uncond=uncond, noise=noise, variance=variance, mask=mask,
        known=known, known_noise=known_noise, **{f"history[{k}]": h for k, h in enumerate(history)},
    )  # fmt: skip
    require(op, (mask is None) == (known is None), "mask and known come together")
    check_floats(op, sample, (sample.shape[0],), threshold=threshold)
    if seeds is not None:
        check_per_sample(op, "seeds", seeds, sample)
    check_table(op, "table", table, sample, len(COLUMNS) + (2 if corrected else 1) * len(history))
    require(op, 0 <= step < table.shape[0], f"step {step} is not a row of the table")


def sampler_step_fwd_check(*args: Any) -> None:
    *inputs, _, return_corrected = args
    _check_inputs(return_corrected, *inputs)


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
    refuse_shared_memory(*args)
    out, prediction, corrected = args[-3:]
    inputs: Any = (*args[:-3], prediction is not None, corrected is not None)
    results = sampler_step_fwd(*inputs)
    for target, result in zip((out, prediction, corrected), results, strict=True):
        if target is not None:
            target.copy_(result)


def refuse_shared_memory(*args: Any) -> None:
    """The outputs of :func:`sampler_step_out` may overlap nothing that a kernel reads once it has begun to write."""
    sample, model_output, table, _, uncond, history, *small, out, prediction, corrected = args
    names = ("noise", "seeds", "variance", "mask", "known", "known_noise", "threshold")
    refuse_overlap(
        "sampler_step",
        {"out": out, "prediction": prediction, "corrected": corrected},
        {"sample": sample, "model_output": model_output, "uncond": uncond},
        {**dict(zip(names, small, strict=True)), "table": table, **{f"history[{k}]": h for k, h in enumerate(history)}},
    )


def sampler_step_out_check(*args: Any) -> None:
    *inputs, out, prediction, corrected = args
    _check_inputs(corrected is not None, *inputs)
    sample = inputs[0]
    check_floats("sampler_step", sample, tuple(sample.shape), out=out, prediction=prediction, corrected=corrected)
    alike = all(t is None or t.dtype == sample.dtype for t in (out, prediction, corrected))
    require("sampler_step", alike, f"out, prediction and corrected must have the dtype of sample, {sample.dtype}")


def sampler_step_out_fake(*args: Any) -> None:
    """Nothing comes back."""
