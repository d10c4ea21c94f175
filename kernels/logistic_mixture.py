"""Triton kernels of `logistic_mixture`: partial sums of the likelihood, their end, the gradient; and draws.

A program owns BLOCK pixels of one sample and goes through the mixtures one by one, its running sums of exponentials in registers.
The forward leaves one sum a program, which a second kernel adds in an order that depends on their number alone; no atomics, so the
same call gives the same bits. The backward goes through the mixtures twice, for the sums and for the gradient, which it writes
once; the second time its parameters come from the cache.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._logistic_mixture import add_exponential, bins_of, color, joint, tanh_parts
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.kernels._philox import low_word
from fastgen.kernels._sampling import uniform_at
from fastgen.reference._layout import dense_strides, empty_like_layout, is_channels_last, opmath_dtype

__all__ = ["logistic_mixture_bwd", "logistic_mixture_fwd", "logistic_mixture_sample", "reasons"]

BLOCK = 256  # two pixels a thread over 128 threads; one of float64, whose gradient of three colors would spill
FINISH_BLOCK = 1024  # sums that the second kernel reads at a time
EACH = {1: 3, 3: 10}  # colors of a pixel -> parameters of a mixture


@triton.jit
def logistic_mixture_kernel(
    logits,  # [N, 10 M or 3 M, P]
    target,  # [N, 3 or 1, P]
    partials,  # [N, tiles]
    mixtures,  # M
    pixels,  # P
    tiles,  # programs a sample
    channel_stride,
    pixel_stride,
    target_channel_stride,
    target_pixel_stride,
    levels,
    CHANNELS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)  # divided in 32 bits: a division of 64 is a subroutine and has a stack
    n, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    stride = n * 0 + channel_stride  # 64 bits
    at = n * EACH * mixtures * pixels + pixel * pixel_stride
    at_target = n * CHANNELS * pixels + pixel * target_pixel_stride
    x0 = read(target, at_target, mask, ACC)
    x1 = x0
    x2 = x0
    if CHANNELS == 3:
        x1 = read(target, at_target + target_channel_stride, mask, ACC)
        x2 = read(target, at_target + 2 * target_channel_stride, mask, ACC)
    half, edge, log_width = bins_of(levels, ACC)
    top = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    top_joint = tl.full((BLOCK,), float("-inf"), ACC)
    total_joint = tl.zeros((BLOCK,), ACC)
    for m in range(mixtures):
        logit, both = joint(logits, at, mixtures, m, stride, mask, x0, x1, x2, half, edge, log_width, CHANNELS, ACC)
        top, total = add_exponential(top, total, logit)
        top_joint, total_joint = add_exponential(top_joint, total_joint, both)
    loss = (top - top_joint) + (tl.log(total) - tl.log(total_joint))
    tl.store(partials + program, tl.sum(tl.where(mask, loss, 0.0)))


@triton.jit
def logistic_mixture_finish_kernel(
    partials,  # [N, tiles]
    losses,  # [N]
    tiles,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(partials + n * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(losses + n, tl.sum(total))


@triton.jit
def logistic_mixture_bwd_kernel(
    grad,  # [N], the gradient of the losses
    logits,  # these as in the forward
    target,
    grad_logits,  # like logits
    mixtures,
    pixels,
    tiles,
    channel_stride,
    pixel_stride,
    target_channel_stride,
    target_pixel_stride,
    levels,
    CHANNELS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)  # divided in 32 bits: a division of 64 is a subroutine and has a stack
    n, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    stride = n * 0 + channel_stride
    at = n * EACH * mixtures * pixels + pixel * pixel_stride
    at_target = n * CHANNELS * pixels + pixel * target_pixel_stride
    x0 = read(target, at_target, mask, ACC)
    x1 = x0
    x2 = x0
    if CHANNELS == 3:
        x1 = read(target, at_target + target_channel_stride, mask, ACC)
        x2 = read(target, at_target + 2 * target_channel_stride, mask, ACC)
    factor = tl.load(grad + n).to(ACC)
    half, edge, log_width = bins_of(levels, ACC)
    top = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    top_joint = tl.full((BLOCK,), float("-inf"), ACC)
    total_joint = tl.zeros((BLOCK,), ACC)
    for m in range(mixtures):
        logit, both = joint(logits, at, mixtures, m, stride, mask, x0, x1, x2, half, edge, log_width, CHANNELS, ACC)
        top, total = add_exponential(top, total, logit)
        top_joint, total_joint = add_exponential(top_joint, total_joint, both)
    share = factor / total
    weight = factor / total_joint
    out = grad_logits.dtype.element_ty
    for m in range(mixtures):
        logit = read(logits, at + m * stride, mask, ACC)
        log_prob, by_mean, by_scale = color(
            logits, at, mixtures, mixtures, m, stride, mask, x0, 0.0, half, edge, log_width, ACC
        )
        if CHANNELS == 3:
            k0, slope0 = tanh_parts(read(logits, at + (3 * mixtures + m) * stride, mask, ACC))
            k1, slope1 = tanh_parts(read(logits, at + (6 * mixtures + m) * stride, mask, ACC))
            k2, slope2 = tanh_parts(read(logits, at + (9 * mixtures + m) * stride, mask, ACC))
            green, green_mean, green_scale = color(
                logits, at, 4 * mixtures, mixtures, m, stride, mask, x1, k0 * x0, half, edge, log_width, ACC
            )
            blue, blue_mean, blue_scale = color(
                logits, at, 7 * mixtures, mixtures, m, stride, mask, x2, k1 * x0 + k2 * x1, half, edge, log_width, ACC
            )
            log_prob = log_prob + green + blue
        w = weight * tl.exp(logit + log_prob - top_joint)
        tl.store(grad_logits + at + m * stride, (share * tl.exp(logit - top) - w).to(out), mask=mask)
        to = grad_logits + at + (mixtures + m) * stride  # from row to row of the first color on
        row = mixtures * stride
        tl.store(to, (w * by_mean).to(out), mask=mask)
        tl.store(to + row, (w * by_scale).to(out), mask=mask)
        if CHANNELS == 3:
            tl.store(to + 2 * row, (w * green_mean * x0 * slope0).to(out), mask=mask)
            tl.store(to + 3 * row, (w * green_mean).to(out), mask=mask)
            tl.store(to + 4 * row, (w * green_scale).to(out), mask=mask)
            tl.store(to + 5 * row, (w * blue_mean * x0 * slope1).to(out), mask=mask)
            tl.store(to + 6 * row, (w * blue_mean).to(out), mask=mask)
            tl.store(to + 7 * row, (w * blue_scale).to(out), mask=mask)
            tl.store(to + 8 * row, (w * blue_mean * x1 * slope2).to(out), mask=mask)


@triton.jit
def drawn_color(
    logits, at, first, mixtures, stride, mask, moved, u, temperature, levels, GREEDY: tl.constexpr, ACC: tl.constexpr
):
    """A color from the logistic whose mean stands at row ``first`` and the logarithm of its scale ``mixtures`` rows on."""
    x = read(logits, at + first * stride, mask, ACC) + moved
    if not GREEDY:
        log_scale = read(logits, at + (first + mixtures) * stride, mask, ACC)
        spread = tl.cast(temperature, ACC) * tl.exp(tl.where(log_scale < -7.0, -7.0, log_scale))
        u = u.to(ACC)
        x += spread * (tl.log(u) - tl.log(1.0 - u))  # 1 - u is exact
    x = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))
    if levels is not None:
        steps = tl.cast(levels - 1, ACC) + 0.0 * x
        k = tl.floor((x + 1.0) * 0.5 * steps + 0.5)
        if tl.float64 == ACC:
            x = (2.0 * k - steps) / steps
        else:
            x = tl.div_rn(2.0 * k - steps, steps)
    return x


@triton.jit(do_not_specialize=["element", "step"])
def logistic_mixture_sample_kernel(
    logits,  # [N, 10 M or 3 M, P]
    seeds,  # [N] int64
    images,  # [N, 3 or 1, P]
    mixtures,  # M
    pixels,  # P
    tiles,  # programs a sample
    channel_stride,
    pixel_stride,
    image_channel_stride,
    image_pixel_stride,
    element,
    step,  # int32, the low word of the step
    levels,  # None: not rounded
    temperature,
    CHANNELS: tl.constexpr,
    EACH: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)  # divided in 32 bits: a division of 64 is a subroutine and has a stack
    n, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    stride = n * 0 + channel_stride
    at = n * EACH * mixtures * pixels + pixel * pixel_stride
    seed = tl.load(seeds + n)
    place = element + pixel * (CHANNELS + 1)
    not_finite = tl.zeros((BLOCK,), tl.int32)
    for row in range(EACH * mixtures):
        v = read(logits, at + row * stride, mask, ACC)
        not_finite = not_finite | (v - v != 0.0).to(tl.int32)
    top = read(logits, at, mask, ACC)
    chosen = tl.zeros((BLOCK,), tl.int32)  # the first of the largest
    for m in range(mixtures):
        logit = read(logits, at + m * stride, mask, ACC)
        chosen = tl.where(logit > top, m, chosen)
        top = tl.where(logit > top, logit, top)
    if not GREEDY:
        total = tl.zeros((BLOCK,), ACC)
        for m in range(mixtures):
            total += tl.exp((read(logits, at + m * stride, mask, ACC) - top) / tl.cast(temperature, ACC))
        wanted = uniform_at(place, step, seed).to(ACC) * total
        passed = tl.zeros((BLOCK,), ACC)
        found = tl.full((BLOCK,), -1, tl.int32)
        for m in range(mixtures):
            each = tl.exp((read(logits, at + m * stride, mask, ACC) - top) / tl.cast(temperature, ACC))
            passed += each
            found = tl.where((found < 0) & (passed > wanted), m, found)
            chosen = tl.where(each > 0.0, m, chosen)  # the last of any weight, where rounding leaves none
        chosen = tl.where(found < 0, chosen, found)
    first = at + chosen * stride
    u = uniform_at(place + 1, step, seed)
    x0 = drawn_color(logits, first, mixtures, mixtures, stride, mask, 0.0, u, temperature, levels, GREEDY, ACC)
    x1 = x0
    x2 = x0
    if CHANNELS == 3:
        k0, _ = tanh_parts(read(logits, first + 3 * mixtures * stride, mask, ACC))
        k1, _ = tanh_parts(read(logits, first + 6 * mixtures * stride, mask, ACC))
        k2, _ = tanh_parts(read(logits, first + 9 * mixtures * stride, mask, ACC))
        u = uniform_at(place + 2, step, seed)
        moved = k0 * x0
        row = 4 * mixtures
        x1 = drawn_color(logits, first, row, mixtures, stride, mask, moved, u, temperature, levels, GREEDY, ACC)
        u = uniform_at(place + 3, step, seed)
        moved = k1 * x0 + k2 * x1
        row = 7 * mixtures
        x2 = drawn_color(logits, first, row, mixtures, stride, mask, moved, u, temperature, levels, GREEDY, ACC)
    to = images + n * CHANNELS * pixels + pixel * image_pixel_stride
    tl.store(to, tl.where(not_finite != 0, float("nan"), x0), mask=mask)
    if CHANNELS == 3:
        tl.store(to + image_channel_stride, tl.where(not_finite != 0, float("nan"), x1), mask=mask)
        tl.store(to + 2 * image_channel_stride, tl.where(not_finite != 0, float("nan"), x2), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    if op == "logistic_mixture_sample":
        logits, seeds, *_ = args
        found = [] if seeds.dtype == torch.int64 else [f"seeds must be int64, got {seeds.dtype}"]
        return tensor_reasons((logits,)) + found
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


def _mixtures(operands: Operands, logits: Tensor, channels: int) -> int:
    """M of ``logits`` for so many colors, every dimension of theirs as it should be."""
    if channels not in EACH:
        operands.fail(f"channels must be 1 or 3, got {channels}")
    each = EACH[channels]
    if logits.dim() != 4 or logits.shape[1] < 1 or logits.shape[1] % each:
        operands.fail(f"logits of {channels} colors must have {each} channels a mixture, got {tuple(logits.shape)}")
    return logits.shape[1] // each


def _steps(t: Tensor, channels: int, pixels: int) -> tuple[int, int]:
    """From channel to channel and from pixel to pixel of a dense copy of ``t``."""
    return (1, channels) if is_channels_last(t) else (pixels, 1)


def _likelihood(
    op: str, logits: Tensor, target: Tensor, levels: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], dict[str, Any]]:
    """(tensors, numbers, constants) that forward and backward share; the third number is of programs a sample."""
    operands = Operands(op, logits)
    if target.dim() != 4:
        operands.fail(f"target must be [N, 1 or 3, H, W], got {tuple(target.shape)}")
    channels = target.shape[1]
    mixtures = _mixtures(operands, logits, channels)
    operands.check("target", target, (logits.shape[0], channels, *logits.shape[2:]))
    if levels < 2:
        operands.fail(f"levels must be at least 2, got {levels}")
    pixels = math.prod(logits.shape[2:])
    strides = (*_steps(logits, logits.shape[1], pixels), *_steps(target, channels, pixels))
    block = BLOCK // 2 if logits.dtype == torch.float64 else BLOCK
    numbers = (mixtures, pixels, triton.cdiv(pixels, block), *strides, levels)
    constants = {
        "CHANNELS": channels, "EACH": EACH[channels], "BLOCK": block, "ACC": accumulator(logits), "num_warps": 4,
        "enable_fp_fusion": False,
    }  # fmt: skip
    return (dense(logits, logits), dense(target, target)), numbers, constants


def logistic_mixture_fwd(logits: Tensor, target: Tensor, levels: int) -> Tensor:
    tensors, numbers, constants = _likelihood("logistic_mixture_fwd", logits, target, levels)
    n, tiles, dtype = logits.shape[0], numbers[2], opmath_dtype(logits.dtype)
    losses = torch.zeros(n, dtype=dtype, device=logits.device)
    if n * tiles == 0:
        return losses
    partials = torch.empty(n * tiles, dtype=dtype, device=logits.device)
    with on_device(logits):
        launch(logistic_mixture_kernel, n * tiles, *tensors, partials, *numbers, **constants)
        launch(
            logistic_mixture_finish_kernel, n, partials, losses, tiles, BLOCK=FINISH_BLOCK, ACC=constants["ACC"],
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return losses


def logistic_mixture_bwd(grad: Tensor, logits: Tensor, target: Tensor, levels: int) -> Tensor:
    tensors, numbers, constants = _likelihood("logistic_mixture_bwd", logits, target, levels)
    n, tiles = logits.shape[0], numbers[2]
    grad = Operands("logistic_mixture_bwd", logits).sized("grad", grad, n)
    out = empty_like_layout(logits)
    if n * tiles:
        with on_device(logits):
            launch(logistic_mixture_bwd_kernel, n * tiles, grad, *tensors, out, *numbers, **constants)
    return out


def logistic_mixture_sample(
    logits: Tensor, seeds: Tensor, channels: int, element: int, step: int, levels: int, temperature: float
) -> Tensor:
    operands = Operands("logistic_mixture_sample", logits)
    mixtures = _mixtures(operands, logits, channels)
    if element < 0:
        operands.fail(f"element must not be negative, got {element}")
    if not 0 <= temperature < math.inf:
        operands.fail(f"temperature must be finite and not negative, got {temperature}")
    if not (levels == 0 or levels >= 2):
        operands.fail(f"levels must be 0 or at least 2, got {levels}")
    seeds = operands.indices("seeds", seeds)
    n, pixels = logits.shape[0], math.prod(logits.shape[2:])
    shape = (n, channels, *logits.shape[2:])
    last = is_channels_last(logits)
    images = torch.empty_strided(
        shape, dense_strides(shape, last), dtype=opmath_dtype(logits.dtype), device=logits.device
    )
    tiles = triton.cdiv(pixels, BLOCK)
    if n * tiles:
        strides = (*_steps(logits, logits.shape[1], pixels), *((1, channels) if last else (pixels, 1)))
        with on_device(logits):
            launch(
                logistic_mixture_sample_kernel, n * tiles, dense(logits, logits), seeds, images, mixtures, pixels,
                tiles, *strides, element, low_word(step), levels or None, float(temperature), CHANNELS=channels,
                EACH=EACH[channels], GREEDY=temperature == 0, BLOCK=BLOCK, ACC=accumulator(logits), num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return images
