"""Triton kernels of `gaussian_log_prob`: a program owns BLOCK elements of a sample in memory order, with mean and log-scale beside
them, and reads each once. The forward stores a sum a program; torch adds up those of a sample, in one order.

Packed parameters are [outer, 2, inner] where the input is [outer, inner]: `inner` is half of a sample, a plane, the channels of a
position or one element, as the layout of the memory and that of the parameters have it.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import GAUSSIAN_LAYOUTS
from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.reference._layout import empty_like_layout, empty_with_channels, is_channels_last, opmath_dtype

__all__ = ["gaussian_log_prob_bwd", "gaussian_log_prob_fwd", "reasons"]

BLOCK = 1024  # eight elements a thread over 128 threads: 16 bytes of bf16


@triton.jit
def places(
    sample, tiles, inner, PACKED: tl.constexpr, HALVES: tl.constexpr, SCALE_FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """(sample, offsets in the input, in mean, in log-scale, which are there) of a program."""
    program = tl.program_id(0).to(tl.int64)
    n, i = program // tiles, program % tiles * BLOCK + tl.arange(0, BLOCK)
    at = n * sample + i
    if PACKED:
        first = 2 * n * sample + i
        if not HALVES:
            first += i // inner * inner
        if SCALE_FIRST:
            return n, at, first + inner, first, i < sample
        else:
            return n, at, first, first + inner, i < sample
    else:
        return n, at, at, at, i < sample


@triton.jit
def log_prob_kernel(
    x,  # [N, sample]
    mean,  # [N, sample], [N, 2 sample] with the log-scale, or None
    log_scale,  # [N, sample], mean where packed, or None
    out,  # [N, tiles]
    sample,  # elements
    tiles,
    inner,
    PACKED: tl.constexpr,
    HALVES: tl.constexpr,  # inner is sample
    SCALE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    _, at, of_mean, of_scale, inside = places(sample, tiles, inner, PACKED, HALVES, SCALE_FIRST, BLOCK)
    u = read(x, at, inside, ACC)
    if mean is None:
        terms = -0.5 * u * u
    else:
        s = read(log_scale, of_scale, inside, ACC)
        u = (u - read(mean, of_mean, inside, ACC)) * tl.exp(-s)
        terms = -0.5 * u * u - s
    tl.store(out + tl.program_id(0).to(tl.int64), tl.sum(tl.where(inside, terms, 0.0), axis=0))


@triton.jit
def log_prob_bwd_kernel(
    grads,  # [N]
    x,  # [N, sample]
    mean,  # [N, sample], [N, 2 sample] with the log-scale, or None
    log_scale,  # [N, sample], mean where packed, or None
    dx,  # as x
    d_mean,  # as mean
    d_log_scale,  # as log_scale
    sample,  # elements
    tiles,
    inner,
    PACKED: tl.constexpr,
    HALVES: tl.constexpr,  # inner is sample
    SCALE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    n, at, of_mean, of_scale, inside = places(sample, tiles, inner, PACKED, HALVES, SCALE_FIRST, BLOCK)
    grad = tl.load(grads + n).to(ACC)
    u = read(x, at, inside, ACC)
    if mean is None:
        tl.store(dx + at, (-grad * u).to(dx.dtype.element_ty), mask=inside)
    else:
        e = tl.exp(-read(log_scale, of_scale, inside, ACC))
        u = (u - read(mean, of_mean, inside, ACC)) * e
        value = grad * u * e
        tl.store(dx + at, (-value).to(dx.dtype.element_ty), mask=inside)
        tl.store(d_mean + of_mean, value.to(d_mean.dtype.element_ty), mask=inside)
        tl.store(d_log_scale + of_scale, (grad * (u * u - 1.0)).to(d_log_scale.dtype.element_ty), mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


class _Call:
    """The operands of a call, dense in the layout of its input, and its constants."""

    def __init__(self, op: str, input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> None:
        self.operands = Operands(op, input)
        if input.dim() < 2:
            self.operands.fail(f"input must be [N, C, *], got shape {tuple(input.shape)}")
        self.operands.code("layout", layout, GAUSSIAN_LAYOUTS)
        if mean is None and log_scale is not None:
            self.operands.fail("log_scale needs mean beside it")
        self.input, self.packed = input, mean is not None and log_scale is None
        self.x = self.operands.like("input", input)
        self.like = empty_with_channels(input, 2 * input.shape[1]) if self.packed else input  # of the parameters
        self.mean = self.operands.like("mean", mean, self.like)
        self.log_scale = self.mean if self.packed else self.operands.like("log_scale", log_scale)
        self.sample = math.prod(input.shape[1:])
        self.tiles = triton.cdiv(self.sample, BLOCK)
        positions, interleaved = math.prod(input.shape[2:]), GAUSSIAN_LAYOUTS[layout] == "interleaved"
        if is_channels_last(input) or positions == 1:
            inner = 1 if interleaved else input.shape[1]
        else:
            inner = positions if interleaved else self.sample
        self.sizes = (self.sample, self.tiles, max(inner, 1))
        self.constants = {
            "PACKED": self.packed, "HALVES": inner == self.sample,
            "SCALE_FIRST": GAUSSIAN_LAYOUTS[layout] == "scale_first", "BLOCK": BLOCK, "ACC": accumulator(input),
            "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip


def gaussian_log_prob_fwd(input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int) -> Tensor:
    call = _Call("gaussian_log_prob_fwd", input, mean, log_scale, layout)
    n = input.shape[0]
    parts = torch.empty((n, call.tiles), dtype=opmath_dtype(input.dtype), device=input.device)
    if parts.numel():
        with on_device(input):
            launch(
                log_prob_kernel, n * call.tiles, call.x, call.mean, call.log_scale, parts, *call.sizes, **call.constants
            )
    return parts.sum(1) - 0.5 * math.log(2 * math.pi) * call.sample


def gaussian_log_prob_bwd(
    grad_log_prob: Tensor, input: Tensor, mean: Tensor | None, log_scale: Tensor | None, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call("gaussian_log_prob_bwd", input, mean, log_scale, layout)
    grads = call.operands.sized("grad_log_prob", grad_log_prob, input.shape[0])
    dx = empty_like_layout(input)
    none = torch.empty(0, dtype=opmath_dtype(input.dtype), device=input.device)
    d_mean = None if call.mean is None else torch.empty_like(call.mean)
    d_log_scale = d_mean if call.packed or call.log_scale is None else torch.empty_like(call.log_scale)
    if input.numel():
        with on_device(input):
            launch(
                log_prob_bwd_kernel, input.shape[0] * call.tiles, grads, call.x, call.mean, call.log_scale, dx, d_mean,
                d_log_scale, *call.sizes, **call.constants,
            )  # fmt: skip
    if mean is None or d_mean is None:
        return dx, none, none.clone()
    if log_scale is None or d_log_scale is None:
        return dx, dense(d_mean, mean), none
    return dx, dense(d_mean, mean), dense(d_log_scale, log_scale)
