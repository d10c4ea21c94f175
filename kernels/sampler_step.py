"""Triton kernel of `sampler_step`: one launch a step, whatever the solver.

A program owns BLOCK elements of one sample in memory order, reads each operand once and writes one or two results. The
coefficients are read on the device from row `step` of the table (float64 ones are rounded there, once a program); normals
are indexed by logical (contiguous) element, so a channels-last sample gets the same noise.
"""

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import COLUMNS
from fastgen.kernels._elements import draw, read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons
from fastgen.kernels._philox import low_word
from fastgen.reference._layout import empty_like_layout, is_channels_last

__all__ = ["reasons", "sampler_step_fwd", "sampler_step_out"]

BLOCK = 512  # four elements a thread over 128 threads: one vector of fp32 of each operand, one Philox block
MAX_HISTORY = 8  # pointers a compiled kernel holds; solvers use up to 4


def column(name: str) -> tl.constexpr:
    return tl.constexpr(COLUMNS.index(name))


_SAMPLE = column("sample")
_PREDICTION = column("prediction")
_MODEL = column("model")
_NOISE = column("noise")
_PREDICTION_SAMPLE = column("prediction_sample")
_PREDICTION_MODEL = column("prediction_model")
_CLIP_MIN = column("clip_min")
_CLIP_MAX = column("clip_max")
_GUIDANCE_SCALE = column("guidance_scale")
_OUTPUT_SAMPLE = column("output_sample")
_OUTPUT_PREDICTION = column("output_prediction")
_OUTPUT_MODEL = column("output_model")
_CORRECTED_SAMPLE = column("corrected_sample")
_CORRECTED_PREDICTION = column("corrected_prediction")
_CORRECTED_MODEL = column("corrected_model")
_LOG_NOISE = column("log_noise")
_LOG_NOISE_SLOPE = column("log_noise_slope")
_KNOWN = column("known")
_KNOWN_NOISE = column("known_noise")
_HISTORY = tl.constexpr(len(COLUMNS))


@triton.jit
def coefficient(row, column: tl.constexpr, ACC: tl.constexpr):
    return tl.load(row + column).to(ACC)


@triton.jit
def take(coefficient, g):
    """A coefficient of 0 takes nothing: an infinite model output that the clip tames must not come back as 0 * Inf."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * g)


# A step is another number every call, and the others are read once a program: without the list Triton would compile again for 1
# and for multiples of 16 of each.
@triton.jit(do_not_specialize=["step", "table_stride", "channels", "pixels"])
def sampler_step_kernel(
    sample,  # all operands [N, *] in the memory order of the sample, each of its own dtype, or None
    model_output,
    uncond,
    history,  # a tuple of them, or None
    noise,
    variance,
    blend,  # the mask of inpainting
    known,
    known_noise,
    threshold,  # [N] or None
    table,  # [steps, columns]
    seeds,  # [N] int64 or None
    out,
    second,  # or None
    third,  # or None
    step,
    table_stride,
    size,  # elements of a sample; of all samples together where they are all alike
    tiles,  # programs a sample
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at = n * size + element
    row = table + step.to(tl.int64) * table_stride
    x = read(sample, at, mask, ACC)
    g = read(model_output, at, mask, ACC)
    if uncond is not None:
        u = read(uncond, at, mask, ACC)
        g = tl.fma(coefficient(row, _GUIDANCE_SCALE, ACC), g - u, u)
    p = tl.fma(coefficient(row, _PREDICTION_SAMPLE, ACC), x, coefficient(row, _PREDICTION_MODEL, ACC) * g)
    if threshold is not None:
        p = p * (1.0 / tl.load(threshold + n).to(ACC))
    low = coefficient(row, _CLIP_MIN, ACC)
    high = coefficient(row, _CLIP_MAX, ACC)
    p = tl.where(p < low, low, p)  # a NaN passes both
    p = tl.where(p > high, high, p)
    y = tl.fma(coefficient(row, _PREDICTION, ACC), p, take(coefficient(row, _MODEL, ACC), g))
    y = tl.fma(coefficient(row, _SAMPLE, ACC), x, y)
    if second is not None:
        value = tl.fma(coefficient(row, _OUTPUT_PREDICTION, ACC), p, take(coefficient(row, _OUTPUT_MODEL, ACC), g))
        predicted = tl.fma(coefficient(row, _OUTPUT_SAMPLE, ACC), x, value)
    if third is not None:
        value = tl.fma(
            coefficient(row, _CORRECTED_PREDICTION, ACC), p, take(coefficient(row, _CORRECTED_MODEL, ACC), g)
        )
        corrected = tl.fma(coefficient(row, _CORRECTED_SAMPLE, ACC), x, value)
    if history is not None:
        for k in tl.static_range(len(history)):
            h = read(history[k], at, mask, ACC)
            y = tl.fma(coefficient(row, _HISTORY + k, ACC), h, y)
            if third is not None:
                corrected = tl.fma(coefficient(row, _HISTORY + len(history) + k, ACC), h, corrected)
    if seeds is not None or noise is not None:
        if seeds is not None:
            z = draw(seeds, n, tile, step, channels, pixels, CHANNELS_LAST, BLOCK).to(ACC)
        else:
            z = read(noise, at, mask, ACC)
        z = coefficient(row, _NOISE, ACC) * z
        if variance is not None:
            slope = coefficient(row, _LOG_NOISE_SLOPE, ACC)
            z = z * tl.exp(tl.fma(slope, read(variance, at, mask, ACC), coefficient(row, _LOG_NOISE, ACC)))
        y += z
    if blend is not None:
        keep = coefficient(row, _KNOWN, ACC) * read(known, at, mask, ACC)
        if known_noise is not None:
            keep = tl.fma(coefficient(row, _KNOWN_NOISE, ACC), read(known_noise, at, mask, ACC), keep)
        y = tl.fma(read(blend, at, mask, ACC), y - keep, keep)
    # Only now the stores: what is written may be what is read, so no load could be moved before one.
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    if second is not None:
        tl.store(second + at, predicted.to(second.dtype.element_ty), mask=mask)
    if third is not None:
        tl.store(third + at, corrected.to(third.dtype.element_ty), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    sample, model_output, table, _, uncond, history, noise, _, variance, mask, known, known_noise, threshold, *rest = (
        args
    )
    operands = (uncond, *history, noise, variance, mask, known, known_noise, threshold)
    written = (t for t in rest if isinstance(t, Tensor))
    found = tensor_reasons((sample, model_output, table, *operands, *written))
    if len(history) > MAX_HISTORY:
        found.append(f"the kernel takes at most {MAX_HISTORY} history tensors, got {len(history)}")
    return found


def sampler_step_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, return_prediction, return_corrected = args
    sample = inputs[0]
    out = empty_like_layout(sample)
    second, third = (empty_like_layout(sample) if wanted else None for wanted in (return_prediction, return_corrected))
    sampler_step_out(*inputs, out, second, third)
    return out, *(sample.new_empty(0) if t is None else t for t in (second, third))


def sampler_step_out(
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
    out: Tensor,
    prediction: Tensor | None,
    corrected: Tensor | None,
) -> None:
    operands = Operands("sampler_step", sample)
    columns = len(COLUMNS) + len(history) * (1 if corrected is None else 2)
    if table.dim() != 2 or table.shape[1] < columns or table.device != sample.device:
        operands.fail(
            f"table must be [steps, >= {columns}] on {sample.device}, got {tuple(table.shape)} on {table.device}"
        )
    if not 0 <= step < table.shape[0]:
        operands.fail(f"step must be in [0, {table.shape[0]}), got {step}")
    if (mask is None) != (known is None):
        operands.fail("mask and known come together")
    seeds, threshold = operands.indices("seeds", seeds), operands.sized("threshold", threshold, sample.shape[0])
    inputs = [
        operands.like(name, t)
        for name, t in (("sample", sample), ("model_output", model_output), ("uncond", uncond), ("noise", noise),
                        ("variance", variance), ("mask", mask), ("known", known), ("known_noise", known_noise))
    ]  # fmt: skip
    past = tuple([operands.like(f"history[{k}]", h) for k, h in enumerate(history)]) or None
    written = (("out", out), ("prediction", prediction), ("corrected", corrected))
    results = [operands.like(name, t) for name, t in written]  # copies, where an output has other strides
    if sample.numel() == 0:
        return
    table = table if table.stride(1) == 1 else table.contiguous()
    channels = sample.shape[1] if sample.dim() > 1 else 1
    pixels = math.prod(sample.shape[2:])
    size = sample.numel() if seeds is None and threshold is None else channels * pixels
    tiles = triton.cdiv(size, BLOCK)
    with on_device(sample):
        launch(
            sampler_step_kernel, sample.numel() // size * tiles, *inputs[:3], past, *inputs[3:], threshold, table, seeds,
            *results, low_word(step), table.stride(0), size, tiles, channels, pixels,
            CHANNELS_LAST=is_channels_last(sample), BLOCK=BLOCK, ACC=accumulator(sample), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    for given, result in zip((out, prediction, corrected), results, strict=True):
        if given is not None and result is not None and result is not given:
            given.copy_(result)
