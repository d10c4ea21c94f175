"""Triton kernels of `rational_quadratic_spline`: a program owns a tile of elements of some samples, or of a part of one, and
reads all of their parameters once through their own strides, [BLOCK, BINS] a side of the box; the slopes of the two knots of
a bin are picked up where they lie. The backward computes the same again and writes every gradient once.

Channels that are not transformed are copied before, by one copy of the whole tensor: the kernels then write over it.
Log-determinants are summed in registers, and torch adds the parts of a sample up where there are several: no atomics, and
one order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import tensor_reasons
from fastgen.kernels._rational_quadratic_spline_bwd import rational_quadratic_spline_bwd
from fastgen.kernels._rational_quadratic_spline_plan import Call, box_of, element_of, even, place_of
from fastgen.kernels._spline import spline_of
from fastgen.reference._layout import empty_like_layout, opmath_dtype

__all__ = ["rational_quadratic_spline_bwd", "rational_quadratic_spline_fwd", "reasons"]

MOST_BINS = 1024


@triton.jit(do_not_specialize=["parts"])
def rational_quadratic_spline_kernel(
    x,  # like input, dense
    widths,  # [N, C', *, K] through three strides and that of their columns; heights and derivatives too
    heights,
    derivatives,
    mask,  # [C'] or None
    bounds,  # [C'] or None
    y,  # as x
    log_det,  # as x, or [N, parts]
    samples,  # N
    channels,  # C
    positions,
    elements,  # C' positions
    parts,  # programs of a sample, or of ROWS samples
    channel_step,
    position_step,  # of x
    w_sample, w_channel, w_position, w_column,
    h_sample, h_channel, h_position, h_column,
    d_sample, d_channel, d_position, d_column,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    LEAST_WIDTH: tl.constexpr, LEAST_HEIGHT: tl.constexpr, LEAST_SLOPE: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr,
    TAILS: tl.constexpr,
    INVERSE: tl.constexpr,
    REDUCE: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,  # of derivatives
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    n, element, inside = element_of(parts, samples, elements, ROWS, BLOCK)
    j, s, at, touched = place_of(n, element, inside, mask, channels, positions, channel_step, position_step)
    value = read(x, at, touched, ACC)
    left, right, bottom, top = box_of(bounds, j, inside, LEFT, RIGHT, BOTTOM, TOP, BLOCK, ACC)
    at_w = n * w_sample + j * w_channel + s * w_position
    at_h = n * h_sample + j * h_channel + s * h_position
    at_d = n * d_sample + j * d_channel + s * d_position
    result, log = spline_of(
        value, widths, at_w, w_column, heights, at_h, h_column, derivatives, at_d, d_column, inside, left, right, bottom, top,
        LEAST_WIDTH, LEAST_HEIGHT, LEAST_SLOPE, SCALE, CLIP, TAILS, INVERSE, K, COLUMNS, BINS, ACC,
    )  # fmt: skip
    tl.store(y + at, result.to(y.dtype.element_ty), mask=touched)
    if REDUCE:
        sums = tl.sum(tl.reshape(tl.where(touched, log, 0.0), [ROWS, BLOCK // ROWS]), axis=1)
        row = tl.program_id(0).to(tl.int64) // parts * ROWS + tl.arange(0, ROWS)
        tl.store(log_det + row * parts + tl.program_id(0) % parts, sums, mask=row < samples)
    else:
        tl.store(log_det + at, log, mask=touched)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    after = 2 if op.endswith("bwd") else 0
    mask, num_bins = args[after + 4], args[after + 7]
    found = [] if mask is None or mask.dtype == torch.int64 else [f"mask must be int64, got {mask.dtype}"]
    found += [] if num_bins <= MOST_BINS else [f"at most {MOST_BINS} bins fit a tile, got {num_bins}"]
    return found + tensor_reasons(a for i, a in enumerate(args) if isinstance(a, Tensor) and i != after + 4)


def rational_quadratic_spline_fwd(
    input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    call = Call("rational_quadratic_spline_fwd", input, widths, heights, derivatives, mask, *rest)
    reduce = rest[-1]
    output = empty_like_layout(input) if mask is None else empty_like_layout(input).copy_(input)
    dtype = opmath_dtype(input.dtype)
    if reduce:
        log_det = torch.empty((call.n, call.parts), dtype=dtype, device=input.device)
    else:
        log_det = empty_like_layout(input, dtype)
    if call.elements == 0 or (mask is not None and not reduce):
        log_det.zero_()
    if call.n * call.elements:
        parameters, strides = call.through(*map(even, call.given))
        with on_device(input):
            launch(
                rational_quadratic_spline_kernel, call.programs, call.input, *parameters, call.mask, call.bounds, output, log_det,
                *call.sizes, *call.steps, *strides, **call.constants,
            )  # fmt: skip
    if reduce:
        log_det = log_det.flatten() if call.parts == 1 else log_det.sum(1)
    return output, log_det
