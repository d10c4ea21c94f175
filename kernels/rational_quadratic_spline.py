"""Triton kernels of `rational_quadratic_spline`: a program owns a tile of elements of some samples, or of a part of one, and
reads all of their parameters once through their own strides, [BLOCK, BINS] a side of the box; the slopes of the two knots of
a bin are picked up where they lie. The backward computes the same again and writes every gradient once.

Channels that are not transformed are copied before, by one copy of the whole tensor: the kernels then write over it.
Log-determinants are summed in registers, and torch adds the parts of a sample up where there are several: no atomics, and
one order.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import SPLINE_NUMBERS, SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons
from fastgen.kernels._spline import (
    at_bin,
    bins_of,
    clamp_to,
    index_of,
    parts_of,
    slope_at,
    spline_of,
    theta_of,
    through_softmax,
)
from fastgen.reference._layout import empty_in_order_of, empty_like_layout, is_channels_last, opmath_dtype
from fastgen.reference._spline import derivatives_of

__all__ = ["rational_quadratic_spline_bwd", "rational_quadratic_spline_fwd", "reasons"]

# Numbers of a side of the box that a program owns, half as many in float64: by registers, those of the backward live longer.
TILES = {"rational_quadratic_spline_fwd": 1024, "rational_quadratic_spline_bwd": 512}
MOST_BINS = 1024


@triton.jit
def element_of(parts, samples, elements, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, element in it, whether it is there) of each lane: ROWS samples of a program side by side, or a part of one."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    n = program // parts * ROWS + lane // (BLOCK // ROWS)
    element = program % parts * (BLOCK // ROWS) + lane % (BLOCK // ROWS)
    return n, element, (n < samples) & (element < elements)


@triton.jit
def place_of(n, element, inside, mask, channels, positions, channel_step, position_step):
    """(channel among those transformed, position, offset in a tensor like input, whether it may be touched)."""
    j = element // positions
    s = element % positions
    c = j
    if mask is not None:
        c = tl.load(mask + j, mask=inside, other=0)
        inside = inside & (c >= 0) & (c < channels)
    return j, s, n * channels * positions + c * channel_step + s * position_step, inside


@triton.jit
def box_of(
    bounds, j, inside, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    if bounds is not None:
        half = tl.load(bounds + j, mask=inside, other=1.0).to(ACC)
        return -half, half, -half, half
    else:
        zero = tl.zeros([BLOCK], dtype=ACC)
        return zero + LEFT, zero + RIGHT, zero + BOTTOM, zero + TOP


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


@triton.jit(do_not_specialize=["parts"])
def rational_quadratic_spline_bwd_kernel(
    grad,  # like input, dense
    grad_log,  # the same, or [N]
    x,
    widths,
    heights,
    derivatives,
    mask,
    bounds,
    dx,  # as x
    d_widths,  # of the strides that follow those of widths, or None
    d_heights,
    d_derivatives,
    samples,
    channels,
    positions,
    elements,
    parts,
    channel_step,
    position_step,
    w_sample, w_channel, w_position, w_column,
    h_sample, h_channel, h_position, h_column,
    d_sample, d_channel, d_position, d_column,
    dw_sample, dw_channel, dw_position, dw_column,
    dh_sample, dh_channel, dh_position, dh_column,
    dd_sample, dd_channel, dd_position, dd_column,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    LEAST_WIDTH: tl.constexpr, LEAST_HEIGHT: tl.constexpr, LEAST_SLOPE: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr,
    TAILS: tl.constexpr,
    INVERSE: tl.constexpr,
    REDUCE: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    n, element, inside = element_of(parts, samples, elements, ROWS, BLOCK)
    j, s, at, touched = place_of(n, element, inside, mask, channels, positions, channel_step, position_step)
    value = read(x, at, touched, ACC)
    g = read(grad, at, touched, ACC)
    if REDUCE:
        g_log = read(grad_log, n, inside, ACC)
    else:
        g_log = read(grad_log, at, touched, ACC)
    left, right, bottom, top = box_of(bounds, j, inside, LEFT, RIGHT, BOTTOM, TOP, BLOCK, ACC)
    at_w = n * w_sample + j * w_channel + s * w_position
    at_h = n * h_sample + j * h_channel + s * h_position
    at_d = n * d_sample + j * d_channel + s * d_position
    raw_w, share_w, width, x_k = bins_of(
        widths, at_w, w_column, inside, left, right, LEAST_WIDTH, SCALE, CLIP, K, BINS, ACC
    )
    raw_h, share_h, height, y_k = bins_of(
        heights, at_h, h_column, inside, bottom, top, LEAST_HEIGHT, SCALE, CLIP, K, BINS, ACC
    )
    low = bottom if INVERSE else left
    high = top if INVERSE else right
    outside = (value < low) | (value > high) | ~touched
    where = clamp_to(value, low, high)
    index = index_of(y_k if INVERSE else x_k, where, K, BINS)
    first, of_first = slope_at(derivatives, at_d, d_column, inside, index, TAILS, K, COLUMNS, LEAST_SLOPE, CLIP, ACC)
    last, of_last = slope_at(derivatives, at_d, d_column, inside, index + 1, TAILS, K, COLUMNS, LEAST_SLOPE, CLIP, ACC)
    w = at_bin(width, index, BINS)
    h = at_bin(height, index, BINS)
    begin = at_bin(y_k if INVERSE else x_k, index, BINS)
    slope = h / w
    theta, rest = theta_of(where, begin, h if INVERSE else w, slope, first, last, INVERSE)
    inverse_den, u, numerator = parts_of(theta, rest, slope, first, last)

    between = theta * rest
    turn = rest - theta
    inverse_num = 1.0 / numerator
    bend = first + last - 2.0 * slope
    log_theta = 2.0 * ((last * theta + slope * turn - first * rest) * inverse_num - bend * turn * inverse_den)
    u_theta = slope * numerator * inverse_den * inverse_den
    if INVERSE:
        by_u = (g * w - g_log * log_theta) / u_theta
        weight_u = -by_u
        weight_log = -g_log
        by_input = by_u / h
    else:
        weight_u = g * h
        weight_log = g_log
        by_input = (weight_u * u_theta + g_log * log_theta) / w
    tail = tl.zeros([BLOCK], dtype=ACC) if TAILS == 2 else g
    tl.store(dx + at, tl.where(outside, tail, by_input).to(dx.dtype.element_ty), mask=touched)
    if d_widths is not None:
        log_s = 2.0 * (1.0 / slope + between * inverse_num - (1.0 - 2.0 * between) * inverse_den)
        log_ends = 2.0 * between * inverse_den
        by_s = weight_u * (theta * theta - u * (1.0 - 2.0 * between)) * inverse_den + weight_log * log_s
        by_first = weight_u * between * (1.0 - u) * inverse_den + weight_log * (rest * rest * inverse_num - log_ends)
        by_last = weight_log * (theta * theta * inverse_num - log_ends) - weight_u * u * between * inverse_den
        if INVERSE:
            by_x = g
            by_y = -by_input
            by_w = g * theta - by_s * slope / w
            by_h = by_s / w - by_input * u
        else:
            by_x = -by_input
            by_y = g
            by_w = -(by_input * theta + by_s * slope / w)
            by_h = g * u + by_s / w
        k = tl.arange(0, BINS)[None, :]
        there = inside[:, None] & (k < K)
        to = (n * dw_sample + j * dw_channel + s * dw_position)[:, None] + k * dw_column
        result = through_softmax(
            raw_w, share_w, index, by_x - by_w, by_w, right - left, outside, LEAST_WIDTH, SCALE, CLIP, K, BINS
        )
        tl.store(d_widths + to, result.to(d_widths.dtype.element_ty), mask=there)
        to = (n * dh_sample + j * dh_channel + s * dh_position)[:, None] + k * dh_column
        result = through_softmax(
            raw_h, share_h, index, by_y - by_h, by_h, top - bottom, outside, LEAST_HEIGHT, SCALE, CLIP, K, BINS
        )
        tl.store(d_heights + to, result.to(d_heights.dtype.element_ty), mask=there)
        by_first = tl.where(outside, 0.0, by_first * of_first)[:, None]
        by_last = tl.where(outside, 0.0, by_last * of_last)[:, None]
        base = (n * dd_sample + j * dd_channel + s * dd_position)[:, None]
        for start in tl.static_range(0, COLUMNS, BINS):  # twice where there are K + 1 = BINS + 1
            column = start + k
            knot = column + 1 if COLUMNS == K - 1 else column
            result = tl.where(knot == index[:, None], by_first, 0.0) + tl.where(
                knot == index[:, None] + 1, by_last, 0.0
            )
            if TAILS == 1:
                wraps = (knot == 0) & (index[:, None] == K - 1)
                result = tl.where(knot == K, 0.0, result) + tl.where(wraps, by_last, 0.0)
            place = d_derivatives + base + column * dd_column
            tl.store(place, result.to(d_derivatives.dtype.element_ty), mask=inside[:, None] & (column < COLUMNS))


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    after = 2 if op.endswith("bwd") else 0
    mask, num_bins = args[after + 4], args[after + 7]
    found = [] if mask is None or mask.dtype == torch.int64 else [f"mask must be int64, got {mask.dtype}"]
    found += [] if num_bins <= MOST_BINS else [f"at most {MOST_BINS} bins fit a tile, got {num_bins}"]
    return found + tensor_reasons(a for i, a in enumerate(args) if isinstance(a, Tensor) and i != after + 4)


class _Call:
    """The operands, sizes and constants of a call."""

    def __init__(
        self, op: str, input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, mask: Tensor | None,
        bounds: Tensor | None, numbers: list[float], num_bins: int, tails: int, parametrization: int, inverse: bool, reduce: bool,
    ) -> None:  # fmt: skip
        operands = self.operands = Operands(op, input)
        if input.dim() < 2:
            operands.fail(f"input must be [N, C, *], got {tuple(input.shape)}")
        if num_bins < 1:
            operands.fail(f"num_bins must be at least 1, got {num_bins}")
        operands.code("tails", tails, SPLINE_TAILS)
        operands.code("parametrization", parametrization, SPLINE_PARAMETRIZATIONS)
        if mask is not None and (mask.dim() != 1 or mask.shape[0] > input.shape[1] or mask.dtype != torch.int64):
            operands.fail(f"mask must be int64 [C'] with C' <= {input.shape[1]}, got {mask.dtype}, {tuple(mask.shape)}")
        clip = self._check_numbers(numbers, num_bins, tails, parametrization)
        self.n, self.channels = input.shape[:2]
        self.positions = math.prod(input.shape[2:])
        chosen = self.channels if mask is None else mask.shape[0]
        self.elements = chosen * self.positions
        self.mask = operands.sized("mask", mask, chosen)
        self.bounds = operands.sized("bounds", bounds, chosen)
        self.input = operands.like("input", input)
        self.packed = heights is None
        self.bins, counts = num_bins, derivatives_of(SPLINE_TAILS[tails], num_bins)
        if (heights is None) != (derivatives is None):
            operands.fail("heights and derivatives must be given together, or neither")
        self.given = (widths,) if heights is None or derivatives is None else (widths, heights, derivatives)
        shape = (self.n, chosen, *input.shape[2:])
        columns = [t.shape[-1] if t.dim() else 0 for t in self.given]
        self.derivatives = columns[-1] - 2 * num_bins if self.packed else columns[-1]
        if self.derivatives not in counts or (not self.packed and columns[:2] != [num_bins] * 2):
            operands.fail(
                f"widths, heights and derivatives must be [*, {num_bins}] twice and [*, {counts[0]}], got {columns} columns"
            )
        for name, t, count in zip(("widths", "heights", "derivatives"), self.given, columns, strict=False):
            operands.check(name, t, (*shape, count))
            if t.dtype != widths.dtype or opmath_dtype(t.dtype) != opmath_dtype(input.dtype):
                operands.fail(
                    f"{name} must have one dtype with widths, float64 where input is: {t.dtype} with {input.dtype}"
                )
        tile = TILES[op] // 2 if input.dtype == torch.float64 else TILES[op]
        bins = max(triton.next_power_of_2(num_bins), 2)
        block = max(tile // bins, 1)
        row = min(triton.next_power_of_2(max(self.elements, 1)), block)
        self.parts = triton.cdiv(max(self.elements, 1), row)
        rows = block // row if self.parts == 1 else 1
        block = rows * row
        self.programs = triton.cdiv(self.n, rows) * self.parts
        last = is_channels_last(input)
        self.sizes = (self.n, self.channels, self.positions, self.elements, self.parts)
        self.steps = (1, self.channels) if last else (self.positions, 1)
        names = ("LEFT", "RIGHT", "BOTTOM", "TOP", "LEAST_WIDTH", "LEAST_HEIGHT", "LEAST_SLOPE", "SCALE")
        self.constants = dict(zip(names, map(float, numbers), strict=True)) | {
            "CLIP": clip, "TAILS": tails, "INVERSE": inverse, "REDUCE": reduce, "K": num_bins, "COLUMNS": self.derivatives,
            "BINS": bins, "ROWS": rows, "BLOCK": block, "ACC": accumulator(input), "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip

    def _check_numbers(self, numbers: list[float], bins: int, tails: int, parametrization: int) -> float:
        """CLIP."""
        if len(numbers) != len(SPLINE_NUMBERS):
            self.operands.fail(f"numbers must be {SPLINE_NUMBERS}, got {len(numbers)} of them")
        left, right, bottom, top, least_width, least_height, least_slope, _ = numbers
        if not (left < right and bottom < top):
            self.operands.fail(f"the box must not be empty, got {numbers[:4]}")
        if not (min(least_width, least_height) >= 0 and max(least_width, least_height) * bins <= 1):
            self.operands.fail(f"min_bin_width and min_bin_height must be in [0, 1 / num_bins], got {numbers[4:6]}")
        zuko = SPLINE_PARAMETRIZATIONS[parametrization] == "zuko"
        most = 1 if zuko or SPLINE_TAILS[tails] == "linear" else math.inf
        if not 0 < least_slope < most:
            self.operands.fail(f"min_derivative must be in (0, {most}), got {least_slope}")
        return -1 / math.log(least_slope) if zuko else 0.0

    def through(self, *given: Tensor) -> tuple[list[Tensor], list[int]]:
        """Widths, heights and derivatives, and four strides of each: of samples, channels, positions and columns."""
        if self.packed:
            k = self.bins
            given = (given[0][..., :k], given[0][..., k : 2 * k], given[0][..., 2 * k :])
        return list(given), [stride for t in given for stride in (t.stride(0), t.stride(1), _along(t), t.stride(-1))]


def _along(t: Tensor) -> int:
    """From each position of [N, C', *, columns] to the next; -1 where there is no one stride."""
    step, following = 0, -1
    for size, stride in reversed(list(zip(t.shape[2:-1], t.stride()[2:-1], strict=True))):
        if size == 1:
            continue
        step = stride if following == -1 else step
        if following not in (-1, stride):
            return -1
        following = stride * size
    return step


def _even(t: Tensor) -> Tensor:
    return t.contiguous() if _along(t) == -1 else t


def rational_quadratic_spline_fwd(
    input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    call = _Call("rational_quadratic_spline_fwd", input, widths, heights, derivatives, mask, *rest)
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
        parameters, strides = call.through(*map(_even, call.given))
        with on_device(input):
            launch(
                rational_quadratic_spline_kernel, call.programs, call.input, *parameters, call.mask, call.bounds, output, log_det,
                *call.sizes, *call.steps, *strides, **call.constants,
            )  # fmt: skip
    if reduce:
        log_det = log_det.flatten() if call.parts == 1 else log_det.sum(1)
    return output, log_det


def rational_quadratic_spline_bwd(
    grad_output: Tensor, grad_log_det: Tensor, input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None,
    mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *how, wants_parameters = rest
    call = _Call("rational_quadratic_spline_bwd", input, widths, heights, derivatives, mask, *how)
    grad = call.operands.like("grad_output", grad_output)
    if how[-1]:
        grad_log = call.operands.sized("grad_log_det", grad_log_det, call.n)
    else:
        grad_log = call.operands.like("grad_log_det", grad_log_det)
    d_input = empty_like_layout(input) if mask is None else empty_like_layout(input).copy_(grad)
    empty = widths.new_empty(0)
    of_given = [empty_in_order_of(t, t.shape) if wants_parameters else empty.clone() for t in call.given]
    if call.n * call.elements:
        parameters, strides = call.through(*map(_even, call.given))
        written, d_strides = [None] * 3, [0] * 12
        kept = [t if _along(t) != -1 else t.new_empty(t.shape) for t in of_given] if wants_parameters else []
        if wants_parameters:
            written, d_strides = call.through(*kept)  # type: ignore[assignment]
        with on_device(input):
            launch(
                rational_quadratic_spline_bwd_kernel, call.programs, grad, grad_log, call.input, *parameters, call.mask,
                call.bounds, d_input, *written, *call.sizes, *call.steps, *strides, *d_strides, **call.constants,
            )  # fmt: skip
        for of, t in zip(of_given, kept, strict=False):
            if of is not t:
                of.copy_(t)
    while len(of_given) < 3:
        of_given.append(empty.clone())
    return d_input, *of_given  # type: ignore[return-value]
