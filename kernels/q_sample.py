"""Triton kernels of `q_sample`: a program owns BLOCK elements of one sample in memory order, reads each operand once and writes
x_t and the target, or in the backward the gradients of x0 and noise. The coefficients are read once a program from the tables
at the sample's timestep; a timestep out of range makes NaN and reads nothing."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import PREDICTION_TYPES
from fastgen.kernels._elements import EPSILON, SAMPLE, VELOCITY, draw, entry, read, target_of
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons
from fastgen.kernels._philox import low_word
from fastgen.reference._layout import empty_like_layout, is_channels_last

__all__ = ["q_sample_bwd", "q_sample_fwd", "reasons"]

BLOCK = 512  # four elements a thread over 128 threads: one vector of fp32 of each operand, one Philox block


# A step is another number every call, and the others only choose what is read: without the list Triton would compile again for
# 1 and for multiples of 16 of each.
@triton.jit(do_not_specialize=["steps", "step", "channels", "pixels"])
def q_sample_kernel(
    x0,  # [N, *], operands in its memory order, each of its own dtype
    noise,  # or None
    seeds,  # [N] int64 or None
    t,  # [N] int64
    alphas,  # [T]
    sigmas,  # [T]
    x_t,
    target,  # or None
    steps,  # T
    step,
    size,  # elements of a sample
    tiles,  # programs a sample
    channels,
    pixels,
    TARGET: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at = n * size + element
    timestep = tl.load(t + n)
    alpha = entry(alphas, timestep, steps, ACC)
    sigma = entry(sigmas, timestep, steps, ACC)
    x = read(x0, at, mask, ACC)
    if seeds is not None:
        z = draw(seeds, n, tile, step, channels, pixels, CHANNELS_LAST, BLOCK).to(ACC)
    else:
        z = read(noise, at, mask, ACC)
    tl.store(x_t + at, tl.fma(alpha, x, sigma * z).to(x_t.dtype.element_ty), mask=mask)
    if target is not None:
        value = target_of(x, z, alpha, sigma, TARGET)
        tl.store(target + at, value.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps"])
def q_sample_bwd_kernel(
    grad,  # [N, *], the gradient of x_t, or None
    grad_target,  # or None
    t,  # [N] int64
    alphas,  # [T]
    sigmas,  # [T]
    grad_x0,  # or None
    grad_noise,  # or None
    steps,  # T
    size,  # elements of a sample
    tiles,  # programs a sample
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at = n * size + element
    timestep = tl.load(t + n)
    alpha = entry(alphas, timestep, steps, ACC)
    sigma = entry(sigmas, timestep, steps, ACC)
    in_x0 = tl.zeros((BLOCK,), dtype=ACC)
    in_noise = tl.zeros((BLOCK,), dtype=ACC)
    if grad is not None:
        g = read(grad, at, mask, ACC)
        in_x0 = alpha * g
        in_noise = sigma * g
    if grad_target is not None:
        h = read(grad_target, at, mask, ACC)
        if TARGET == SAMPLE:
            in_x0 += h
        elif TARGET == EPSILON:
            in_noise += h
        elif TARGET == VELOCITY:
            in_x0 = tl.fma(-sigma, h, in_x0)
            in_noise = tl.fma(alpha, h, in_noise)
        else:
            in_x0 -= h
            in_noise += h
    if grad_x0 is not None:
        tl.store(grad_x0 + at, in_x0.to(grad_x0.dtype.element_ty), mask=mask)
    if grad_noise is not None:
        tl.store(grad_noise + at, in_noise.to(grad_noise.dtype.element_ty), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    if op == "q_sample_bwd":
        grad, grad_target, _, alphas, sigmas, *_ = args
        return tensor_reasons((grad, grad_target, alphas, sigmas))
    x0, _, alphas, sigmas, noise, *_ = args
    return tensor_reasons((x0, alphas, sigmas, noise))


def q_sample_fwd(
    x0: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    target: int,
) -> tuple[Tensor, Tensor]:
    operands = Operands("q_sample_fwd", x0)
    if (noise is None) == (seeds is None):
        operands.fail("give either noise or seeds")
    operands.code("target", target, PREDICTION_TYPES, least=-1)
    steps = alphas.numel()
    x0, noise, seeds, t = (
        operands.like("x0", x0), operands.like("noise", noise), operands.indices("seeds", seeds), operands.indices("t", t)
    )  # fmt: skip
    alphas, sigmas = operands.sized("alphas", alphas, steps), operands.sized("sigmas", sigmas, steps)
    x_t = empty_like_layout(x0)
    second = empty_like_layout(x0) if target >= 0 else None
    if x0.numel():
        channels = x0.shape[1] if x0.dim() > 1 else 1
        pixels = math.prod(x0.shape[2:])
        tiles = triton.cdiv(channels * pixels, BLOCK)
        with on_device(x0):
            launch(
                q_sample_kernel, x0.shape[0] * tiles, x0, noise, seeds, t, alphas, sigmas, x_t, second, steps,
                low_word(step), channels * pixels, tiles, channels, pixels, TARGET=target,
                CHANNELS_LAST=is_channels_last(x0), BLOCK=BLOCK, ACC=accumulator(x0), num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return x_t, x0.new_empty(0) if second is None else second


def q_sample_bwd(
    grad: Tensor | None,
    grad_target: Tensor | None,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    target: int,
    wants_x0: bool,
    wants_noise: bool,
) -> tuple[Tensor, Tensor]:
    like = grad if grad is not None else grad_target
    if like is None:
        raise ValueError("q_sample_bwd: grad or grad_target must be given")
    operands, steps = Operands("q_sample_bwd", like), alphas.numel()
    operands.code("target", target, PREDICTION_TYPES, least=-1)
    grad, grad_target = operands.like("grad", grad), operands.like("grad_target", grad_target)
    t = operands.indices("t", t)
    alphas, sigmas = operands.sized("alphas", alphas, steps), operands.sized("sigmas", sigmas, steps)
    in_x0, in_noise = (empty_like_layout(like) if wanted else None for wanted in (wants_x0, wants_noise))
    if like.numel():
        size = math.prod(like.shape[1:])
        tiles = triton.cdiv(size, BLOCK)
        with on_device(like):
            launch(
                q_sample_bwd_kernel, like.shape[0] * tiles, grad, grad_target, t, alphas, sigmas, in_x0, in_noise, steps,
                size, tiles, TARGET=target, BLOCK=BLOCK, ACC=accumulator(like), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return (
        like.new_empty(0) if in_x0 is None else in_x0,
        like.new_empty(0) if in_noise is None else in_noise,
    )
