"""Triton kernels of `diffusion_loss`: partial sums, their end, and the gradient; the target lives in registers alone.

A program owns BLOCK elements of one sample in the memory order of the model's output and reads each operand that the target
names once. The forward leaves one sum a program, and a second kernel adds those of a sample in an order that depends on their
number alone; no atomics, so the same call gives the same bits. Everything follows from the residual r = model - target: see
`fastgen/reference/diffusion_loss.py`. With a table of the bound the second half of the model's channels, v, lies `run` elements
behind the first: a whole sample of x0 apart, or C where channels lie innermost.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import PREDICTION_TYPES, VLB_COLUMNS
from fastgen.kernels._elements import EPSILON, SAMPLE, VELOCITY, entry, read, target_of
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.reference._layout import empty_like_layout, is_channels_last, opmath_dtype

__all__ = ["diffusion_loss_bwd", "diffusion_loss_fwd", "reasons"]

BLOCK = 1024  # eight elements a thread over 128 threads
FINISH_BLOCK = 1024  # sums that the second kernel reads at a time

_COLUMNS = tl.constexpr(len(VLB_COLUMNS))
_MEAN = tl.constexpr(VLB_COLUMNS.index("mean"))
_INVERSE_DEVIATION = tl.constexpr(VLB_COLUMNS.index("inverse_deviation"))
_RANGE = tl.constexpr(VLB_COLUMNS.index("log_variance_range"))


@triton.jit
def locate(n, element, first, size, run, HYBRID: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the prediction of ``element`` (``first`` is the program's first one) of sample n stands in the model's output."""
    if INTERLEAVED:  # [pixels, 2, C]
        local = (first % run).to(tl.int32) + tl.arange(0, BLOCK)
        pixel = first // run + local // run
        return 2 * n * size + element + pixel * run
    elif HYBRID:
        return 2 * n * size + element
    else:
        return n * size + element


@triton.jit
def residual(model, x0, noise, at_model, at, mask, alpha, sigma, PREDICTION: tl.constexpr, ACC: tl.constexpr):
    m = read(model, at_model, mask, ACC)
    if PREDICTION == EPSILON:
        return m - read(noise, at, mask, ACC)
    elif PREDICTION == SAMPLE:
        return m - read(x0, at, mask, ACC)
    else:
        return m - target_of(read(x0, at, mask, ACC), read(noise, at, mask, ACC), alpha, sigma, PREDICTION)


@triton.jit
def gaussian(vlb_table, timestep, steps, alpha, sigma, PREDICTION: tl.constexpr, ACC: tl.constexpr):
    """(by how much of r the mean is off, one over the deviation of the posterior, half of what v adds to its log variance)."""
    mean = entry(vlb_table + _MEAN, timestep, steps, ACC, _COLUMNS)
    if PREDICTION == EPSILON:
        mean = -mean * sigma / alpha
    elif PREDICTION == VELOCITY:
        mean = -mean * sigma / (alpha * alpha + sigma * sigma)
    elif PREDICTION != SAMPLE:
        mean = -mean * sigma / (alpha + sigma)
    inverse_deviation = entry(vlb_table + _INVERSE_DEVIATION, timestep, steps, ACC, _COLUMNS)
    return mean, inverse_deviation, entry(vlb_table + _RANGE, timestep, steps, ACC, _COLUMNS) * 0.5


@triton.jit
def divergence(r, v, mean, inverse_deviation, half_range):
    """The divergence of two Gaussians, in nats, and its derivative by v."""
    u = tl.fma(half_range, v, half_range)
    d = mean * inverse_deviation * r
    d = d * d
    e = tl.exp(-u)
    return 0.5 * tl.fma(e, d, (u - 1.0) + e), 0.5 * half_range * (1.0 - tl.fma(e, d, e))


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def likelihood(x0, r, v, mean, inverse_deviation, half_range):
    """-log of the probability of x0's bin, in nats, and its derivative by v; the cdf (1 + tanh y) / 2 is logistic(2 y)."""
    inverse = inverse_deviation * tl.exp(-0.5 * tl.fma(half_range, v, half_range))
    p = inverse * (1.0 / 255.0 - mean * r)
    q = inverse * (-1.0 / 255.0 - mean * r)
    scale: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    a = scale * (p + 0.044715 * p * p * p)
    b = scale * (q + 0.044715 * q * q * q)
    a_slope = (-0.5 * scale) * half_range * p * (1.0 + 0.134145 * p * p)
    b_slope = (-0.5 * scale) * half_range * q * (1.0 + 0.134145 * q * q)
    inside = logistic(a) * logistic(-b) * (1.0 - tl.exp(b - a))  # logistic(a) - logistic(b), not cancelled
    inside_slope = logistic(a) * logistic(-a) * a_slope - logistic(b) * logistic(-b) * b_slope
    low = x0 < -0.999
    high = x0 > 0.999
    probability = tl.where(low, logistic(a), tl.where(high, logistic(-b), inside))
    slope = tl.where(low, logistic(-a) * a_slope, tl.where(high, -logistic(b) * b_slope, inside_slope / inside))
    least = probability * 0.0 + 1e-12  # a literal beside a tensor takes its precision; alone it would be fp32
    cut = probability < least  # a NaN is not
    return -tl.log(tl.where(cut, least, probability)), tl.where(cut, 0.0, -slope)


# The length of a table chooses no code: without the list Triton would compile again for 1 and for multiples of 16 of it.
@triton.jit(do_not_specialize=["steps"])
def diffusion_loss_kernel(
    model,  # [N, C, *], or [N, 2 C, *] with a table of the bound
    x0,  # [N, C, *] in the same memory order, or None where it is not read
    noise,  # likewise
    t,  # [N] int64
    alphas,  # [T]
    sigmas,  # [T]
    weights,  # [T] or None
    vlb_table,  # [T, 3] or None
    partials,  # [N, tiles]
    steps,  # T
    size,  # elements of a sample of x0
    tiles,  # programs a sample
    run,  # elements between a prediction and its v
    bound_weight,  # lambda / ln 2, in two numbers of fp32 whose sum it is: Triton takes a Python float as one
    bound_weight_rest,
    PREDICTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at = n * size + element
    HYBRID: tl.constexpr = vlb_table is not None
    at_model = locate(n, element, tile * BLOCK, size, run, HYBRID, INTERLEAVED, BLOCK)
    timestep = tl.load(t + n)
    alpha = entry(alphas, timestep, steps, ACC)
    sigma = entry(sigmas, timestep, steps, ACC)
    r = residual(model, x0, noise, at_model, at, mask, alpha, sigma, PREDICTION, ACC)
    if weights is not None:
        term = entry(weights, timestep, steps, ACC) * (r * r)
    else:  # a timestep out of range shows, also where the target takes nothing of it
        term = tl.where((timestep >= 0) & (timestep < steps), r * r, alpha)
    if vlb_table is not None:
        v = read(model, at_model + run, mask, ACC)
        mean, inverse_deviation, half_range = gaussian(vlb_table, timestep, steps, alpha, sigma, PREDICTION, ACC)
        if timestep == 0:
            bound, _ = likelihood(read(x0, at, mask, ACC), r, v, mean, inverse_deviation, half_range)
        else:
            bound, _ = divergence(r, v, mean, inverse_deviation, half_range)
        term += bound * (tl.cast(bound_weight, ACC) + tl.cast(bound_weight_rest, ACC))
    tl.store(partials + program, tl.sum(tl.where(mask, term, 0.0)))


@triton.jit
def diffusion_loss_finish_kernel(
    partials,  # [N, tiles]
    losses,  # [N]
    tiles,
    size,  # elements of a sample
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(partials + n * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(losses + n, tl.sum(total) / tl.cast(size, ACC))


@triton.jit(do_not_specialize=["steps"])
def diffusion_loss_bwd_kernel(
    grad,  # [N], the gradient of the losses
    model,  # these as in the forward
    x0,
    noise,
    t,
    alphas,
    sigmas,
    weights,
    vlb_table,
    grad_model,  # like model
    steps,
    size,
    tiles,
    run,
    bound_weight,
    bound_weight_rest,
    PREDICTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at = n * size + element
    HYBRID: tl.constexpr = vlb_table is not None
    at_model = locate(n, element, tile * BLOCK, size, run, HYBRID, INTERLEAVED, BLOCK)
    timestep = tl.load(t + n)
    alpha = entry(alphas, timestep, steps, ACC)
    sigma = entry(sigmas, timestep, steps, ACC)
    r = residual(model, x0, noise, at_model, at, mask, alpha, sigma, PREDICTION, ACC)
    factor = tl.load(grad + n).to(ACC) / tl.cast(size, ACC)
    if weights is not None:
        weighted = factor * entry(weights, timestep, steps, ACC)
    else:
        weighted = tl.where((timestep >= 0) & (timestep < steps), factor, alpha)
    by_model = (2.0 * weighted) * r
    if vlb_table is not None:
        v = read(model, at_model + run, mask, ACC)
        mean, inverse_deviation, half_range = gaussian(vlb_table, timestep, steps, alpha, sigma, PREDICTION, ACC)
        if timestep == 0:
            _, by_v = likelihood(read(x0, at, mask, ACC), r, v, mean, inverse_deviation, half_range)
        else:
            _, by_v = divergence(r, v, mean, inverse_deviation, half_range)
        by_v = (factor * (tl.cast(bound_weight, ACC) + tl.cast(bound_weight_rest, ACC))) * by_v
        tl.store(grad_model + at_model + run, by_v.to(grad_model.dtype.element_ty), mask=mask)
    tl.store(grad_model + at_model, by_model.to(grad_model.dtype.element_ty), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    if op == "diffusion_loss_bwd":
        grad, *args = args
        return tensor_reasons((grad,)) + reasons("diffusion_loss_fwd", *args)
    model_output, x0, noise, _, alphas, sigmas, weights, vlb_table, *_ = args
    return tensor_reasons((model_output, x0, noise, alphas, sigmas, weights, vlb_table))


@dataclass(frozen=True)
class Call:
    """What both launches take: the tensors, the numbers after them, and the constants."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    size: int  # elements of a sample of x0
    tiles: int  # programs a sample


def _describe(
    op: str,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> Call:
    operands, steps, hybrid = Operands(op, x0), alphas.numel(), vlb_table is not None
    operands.code("prediction", prediction, PREDICTION_TYPES)
    name = PREDICTION_TYPES[prediction]
    if hybrid and x0.dim() < 2:
        operands.fail(f"x0 must be [N, C, *] with a vlb_table, got {tuple(x0.shape)}")
    size = math.prod(x0.shape[1:])
    interleaved = hybrid and is_channels_last(model_output)
    shape = (x0.shape[0], 2 * x0.shape[1], *x0.shape[2:]) if hybrid else x0.shape
    operands.check("model_output", model_output, shape)
    like = model_output[:, : x0.shape[1]] if hybrid else model_output  # the memory order of x0 and noise beside it
    operands.check("noise", noise, x0.shape)
    tensors = (
        dense(model_output, model_output), operands.like("x0", x0, like) if name != "epsilon" or hybrid else None,
        operands.like("noise", noise, like) if name != "sample" else None,
        operands.indices("t", t), operands.sized("alphas", alphas, steps), operands.sized("sigmas", sigmas, steps),
        operands.sized("weights", weights, steps), operands.sized("vlb_table", vlb_table, steps, len(VLB_COLUMNS)),
    )  # fmt: skip
    constants = {
        "PREDICTION": prediction, "INTERLEAVED": interleaved, "BLOCK": BLOCK, "ACC": accumulator(model_output),
        "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    tiles, run = triton.cdiv(size, BLOCK), x0.shape[1] if interleaved else size
    return Call(tensors, (steps, size, tiles, run, *_two_floats(vlb_weight / math.log(2))), constants, size, tiles)


def _two_floats(value: float) -> tuple[float, float]:
    """Two numbers of fp32 with the sum ``value``, to 48 bits."""
    high = ctypes.c_float(value).value
    return high, value - high if math.isfinite(high) else 0.0


def diffusion_loss_fwd(*args: Any) -> Tensor:
    model_output, x0 = args[:2]
    dtype = opmath_dtype(model_output.dtype)
    call = _describe("diffusion_loss_fwd", *args)
    losses = torch.empty(x0.shape[0], dtype=dtype, device=model_output.device)
    if x0.numel() == 0:
        return losses.fill_(math.nan)  # the mean of nothing
    partials = torch.empty(x0.shape[0] * call.tiles, dtype=dtype, device=model_output.device)
    with on_device(model_output):
        launch(
            diffusion_loss_kernel, x0.shape[0] * call.tiles, *call.tensors, partials, *call.numbers, **call.constants
        )
        launch(
            diffusion_loss_finish_kernel, x0.shape[0], partials, losses, call.tiles, call.size, BLOCK=FINISH_BLOCK,
            ACC=call.constants["ACC"], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return losses


def diffusion_loss_bwd(grad: Tensor, *args: Any) -> Tensor:
    model_output, x0 = args[:2]
    call = _describe("diffusion_loss_bwd", *args)
    grad = Operands("diffusion_loss_bwd", x0).sized("grad", grad, x0.shape[0])
    out = empty_like_layout(model_output)
    if x0.numel():
        with on_device(model_output):
            launch(
                diffusion_loss_bwd_kernel, x0.shape[0] * call.tiles, grad, *call.tensors, out, *call.numbers,
                **call.constants,
            )  # fmt: skip
    return out
