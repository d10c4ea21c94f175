"""Monotone rational-quadratic splines as Triton device functions: a tile of elements beside their bins, [BLOCK, BINS], and
one element a lane once its bin is found. The formulas are those of `fastgen/reference/_spline.py`; numbers of the call are
constants of the kernel, in which a float64 kernel loses no digit.
"""

import triton
import triton.language as tl

from fastgen.kernels._elements import read


@triton.jit
def bins_of(
    parameters, at, stride, inside, low, high, LEAST: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
    BINS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Along one side of the box: (raw numbers, their softmax, sizes, where each bin begins), all [BLOCK, BINS]; CLIP is 1 /
    -log m of zuko's soft clip, or 0."""
    k = tl.arange(0, BINS)[None, :]
    there = k < K
    raw = read(parameters, at[:, None] + k * stride, inside[:, None] & there, ACC) * SCALE
    exponent = raw / (1.0 + tl.abs(raw) * (2.0 * CLIP)) if CLIP > 0 else raw
    exponent = tl.where(there, exponent, float("-inf"))
    power = tl.exp(exponent - tl.max(exponent, axis=1)[:, None])
    share = power / tl.sum(power, axis=1)[:, None]
    size = tl.where(there, (high - low)[:, None] * (share * (1.0 - K * LEAST) + LEAST), 0.0)
    return raw, share, size, low[:, None] + (tl.cumsum(size, axis=1) - size)


@triton.jit
def index_of(begin, x, K: tl.constexpr, BINS: tl.constexpr):
    """The last bin that begins at or before x; a NaN stays in the first."""
    k = tl.arange(0, BINS)[None, :]
    return tl.sum(((begin <= x[:, None]) & (k > 0) & (k < K)).to(tl.int32), axis=1)


@triton.jit
def at_bin(values, index, BINS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BINS)[None, :] == index[:, None], values, 0.0), axis=1)


@triton.jit
def log_of_one_and(t):
    """log(1 + t) for t in [0, 1], relative to itself."""
    if t.dtype == tl.float64:
        u = 1.0 + t
        return tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:  # 2 atanh(s), minimax in s^2
        s = t / (t + 2.0)
        z = s * s
        p = ((2.686754891e-1 * z + 2.823395600e-1) * z + 4.000767086e-1) * z + 6.666663967e-1
        return p * z * s + (s + s)


@triton.jit
def slope_of(raw, LEAST: tl.constexpr, CLIP: tl.constexpr):
    """A slope at a knot, and its own derivative by the number that it comes of."""
    if CLIP > 0:
        shrink = 1.0 / (1.0 + tl.abs(raw) * CLIP)
        value = tl.exp(raw * shrink)
        return value, value * shrink * shrink
    else:
        t = tl.exp(-tl.abs(raw))
        near = 1.0 / (1.0 + t)
        value = LEAST + tl.where(raw < 0.0, 0.0, raw) + log_of_one_and(t)
        return value, tl.where(raw > 0.0, near, t * near)


@triton.jit
def slope_at(
    parameters, at, stride, inside, knot, TAILS: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, LEAST: tl.constexpr,
    CLIP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`slope_of` at a knot from 0 to K: 1 at the ends of linear tails, at the last knot of circular ones that of the first."""
    if TAILS == 1:
        column = tl.where(knot == K, 0, knot)
    elif COLUMNS == K - 1:
        column = knot - 1
    else:
        column = knot
    free = inside & (knot > 0) & (knot < K) if TAILS == 0 else inside
    value, slope = slope_of(read(parameters, at + column * stride, free, ACC), LEAST, CLIP)
    if TAILS == 0:
        end = (knot == 0) | (knot == K)
        return tl.where(end, 1.0, value), tl.where(end, 0.0, slope)
    else:
        return value, slope


@triton.jit
def clamp_to(x, low, high):
    """x within [low, high]; a NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def theta_of(x, begin, size, s, first, last, INVERSE: tl.constexpr):
    """(theta, 1 - theta) of a place in a bin, along x, or along y where INVERSE: the root of a quadratic whose discriminant
    is a sum of squares, from the end of the bin to which it does not cancel."""
    u = clamp_to((x - begin) / size, 0.0, 1.0)
    v = 1.0 - u
    if not INVERSE:
        return u, v
    else:
        difference = first * v - last * u
        root = tl.sqrt(difference * difference + 4.0 * s * s * u * v)
        falling = difference < 0.0
        small = 2.0 * s * tl.where(falling, v, u)
        near = small / (small + (tl.abs(difference) + root))
        return tl.where(falling, 1.0 - near, near), tl.where(falling, near, 1.0 - near)


@triton.jit
def parts_of(theta, rest, s, first, last):
    """(1 / denominator, (y - y_k) / height, numerator of the derivative)"""
    between = theta * rest
    inverse = 1.0 / (s * (1.0 - 2.0 * between) + (first + last) * between)
    u = theta * (s * theta + first * rest) * inverse
    return inverse, u, last * theta * theta + 2.0 * s * between + first * rest * rest


@triton.jit
def spline_of(
    value, widths, at_w, w_column, heights, at_h, h_column, derivatives, at_d, d_column, inside, left, right, bottom, top,
    LEAST_WIDTH: tl.constexpr, LEAST_HEIGHT: tl.constexpr, LEAST_SLOPE: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr,
    TAILS: tl.constexpr, INVERSE: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(output, log-determinant) of elements, one a lane, whose parameters begin at ``at_*`` where ``inside``."""
    _raw, _share, width, x_k = bins_of(
        widths, at_w, w_column, inside, left, right, LEAST_WIDTH, SCALE, CLIP, K, BINS, ACC
    )
    _raw, _share, height, y_k = bins_of(
        heights, at_h, h_column, inside, bottom, top, LEAST_HEIGHT, SCALE, CLIP, K, BINS, ACC
    )
    low = bottom if INVERSE else left
    high = top if INVERSE else right
    outside = (value < low) | (value > high)
    where = clamp_to(value, low, high)
    index = index_of(y_k if INVERSE else x_k, where, K, BINS)
    first, _slope = slope_at(derivatives, at_d, d_column, inside, index, TAILS, K, COLUMNS, LEAST_SLOPE, CLIP, ACC)
    last, _slope = slope_at(derivatives, at_d, d_column, inside, index + 1, TAILS, K, COLUMNS, LEAST_SLOPE, CLIP, ACC)
    w = at_bin(width, index, BINS)
    h = at_bin(height, index, BINS)
    x_0 = at_bin(x_k, index, BINS)
    y_0 = at_bin(y_k, index, BINS)
    slope = h / w
    theta, rest = theta_of(where, y_0 if INVERSE else x_0, h if INVERSE else w, slope, first, last, INVERSE)
    inverse_den, u, numerator = parts_of(theta, rest, slope, first, last)
    ratio = slope * inverse_den
    log = tl.log(numerator * ratio * ratio)
    if INVERSE:
        result = clamp_to(x_0 + w * theta, left, right)
        log = -log
    else:
        result = clamp_to(y_0 + h * u, bottom, top)
    if TAILS == 2:
        end = tl.where(value > high, right if INVERSE else top, left if INVERSE else bottom)
        return tl.where(outside, end, result), tl.where(outside, float("-inf"), log)
    else:
        return tl.where(outside, value, result), tl.where(outside, 0.0, log)


@triton.jit
def through_softmax(
    raw, share, index, first, last, span, outside, LEAST: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The gradient of unnormalized numbers, from those of the knots at either end of the bin; the ends of the box are fixed."""
    k = tl.arange(0, BINS)[None, :]
    first = tl.where(index == 0, 0.0, first)
    last = tl.where(index == K - 1, 0.0, last)
    by_share = tl.where(k < index[:, None], first[:, None], 0.0) + tl.where(k <= index[:, None], last[:, None], 0.0)
    by_share *= (span * (1.0 - K * LEAST))[:, None]
    grad = share * (by_share - tl.sum(tl.where(k <= index[:, None], share * by_share, 0.0), axis=1)[:, None]) * SCALE
    if CLIP > 0:
        shrink = 1.0 / (1.0 + tl.abs(raw) * (2.0 * CLIP))
        grad *= shrink * shrink
    return tl.where(outside[:, None], 0.0, grad)
