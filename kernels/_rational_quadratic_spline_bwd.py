"""The Triton kernel of the backward of `rational_quadratic_spline`: it computes the forward again from the input and the
parameters, and writes every gradient once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._elements import read
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._rational_quadratic_spline_plan import Call, along, box_of, element_of, even, place_of
from fastgen.kernels._spline import (
    at_bin,
    bins_of,
    clamp_to,
    index_of,
    parts_of,
    slope_at,
    theta_of,
    through_softmax,
)
from fastgen.reference._layout import empty_in_order_of, empty_like_layout


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


def rational_quadratic_spline_bwd(
    grad_output: Tensor, grad_log_det: Tensor, input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None,
    mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *how, wants_parameters = rest
    call = Call("rational_quadratic_spline_bwd", input, widths, heights, derivatives, mask, *how)
    grad = call.operands.like("grad_output", grad_output)
    if how[-1]:
        grad_log = call.operands.sized("grad_log_det", grad_log_det, call.n)
    else:
        grad_log = call.operands.like("grad_log_det", grad_log_det)
    d_input = empty_like_layout(input) if mask is None else empty_like_layout(input).copy_(grad)
    empty = widths.new_empty(0)
    of_given = [empty_in_order_of(t, t.shape) if wants_parameters else empty.clone() for t in call.given]
    if call.n * call.elements:
        parameters, strides = call.through(*map(even, call.given))
        written, d_strides = [None] * 3, [0] * 12
        kept = [t if along(t) != -1 else t.new_empty(t.shape) for t in of_given] if wants_parameters else []
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
