"""The likelihood of a pixel under mixtures of discretised logistics, as Triton device functions, each lane a pixel.

The formulas are those of `fastgen/reference/_sampling.py`; log(1 - exp(-d)) of narrow bins is taken as a series, since a GPU's
exponential is no expm1.
"""

import triton
import triton.language as tl

from fastgen.kernels._elements import read


@triton.jit
def tanh_parts(x):
    """tanh(x) and its derivative."""
    t = tl.exp(-2.0 * tl.abs(x))
    below = 1.0 / (1.0 + t)
    value = (1.0 - t) * below
    return tl.where(x < 0.0, -value, value), 4.0 * t * below * below


@triton.jit
def log_bin(x, mean, raw_scale, half, edge, log_width):
    """The log-probability of the bin of ``x``, and the negative of its derivatives by the mean and the logarithm of the scale."""
    log_scale = tl.where(raw_scale < -7.0, -7.0, raw_scale)
    inverse = tl.exp(-log_scale)
    a = (x - mean + half) * inverse
    b = (x - mean - half) * inverse
    width = 2.0 * half * inverse
    small_a = tl.exp(-tl.abs(a))
    small_b = tl.exp(-tl.abs(b))
    under_a = 1.0 + small_a
    under_b = 1.0 + small_b
    lowest = x < -edge
    highest = x > edge
    narrow = width < 0.5
    # log(1 - exp(-d)) = log d - d / 2 + log(sinh(d / 2) / (d / 2)), whose series ends at (d / 2)^12
    shrunk = tl.exp(-width)
    z = 0.25 * width * width
    series = z * (1.6666666666666667e-1 - z * (5.5555555555555556e-3 - z * (3.5273368606701940e-4 - z * (
        2.6455026455026455e-5 - z * (2.1377799155576933e-6 - z * 1.8036754014764430e-7)))))  # fmt: skip
    inside = tl.where(narrow, 1.0, 1.0 - shrunk)
    extra = tl.where(narrow, log_width - log_scale - 0.5 * width + series, 0.0)
    fraction = tl.where(lowest, 1.0 / under_a, tl.where(highest, 1.0 / under_b, inside / (under_a * under_b)))
    linear_a = tl.where(highest | (a > 0.0), 0.0, a)
    linear_b = tl.where(lowest | (b < 0.0), 0.0, -b)
    log_prob = linear_a + linear_b + tl.log(fraction) + tl.where(lowest | highest, 0.0, extra)

    slope = z * (3.3333333333333333e-1 - z * (2.2222222222222222e-2 - z * (2.1164021164021164e-3 - z * (
        2.1164021164021164e-4 - z * (2.1377799155576933e-5 - z * 2.1644104817717316e-6)))))  # fmt: skip
    from_a = tl.where(highest, 0.0, tl.where(a < 0.0, 1.0, small_a) / under_a)
    from_b = tl.where(lowest, 0.0, tl.where(b < 0.0, small_b, 1.0) / under_b)
    from_width = tl.where(narrow, 1.0 - 0.5 * width + slope, width * shrunk / tl.where(narrow, 1.0, 1.0 - shrunk))
    from_width = tl.where(lowest | highest, 0.0, from_width)
    by_scale = tl.where(raw_scale < -7.0, 0.0, a * from_a - b * from_b + from_width)
    return log_prob, inverse * (from_a - from_b), by_scale


@triton.jit
def color(logits, at, first, mixtures, m, stride, mask, x, moved, half, edge, log_width, ACC: tl.constexpr):
    """`log_bin` of the color whose parameters begin at row ``first``, its mean moved by ``moved``."""
    mean = read(logits, at + (first + m) * stride, mask, ACC) + moved
    return log_bin(x, mean, read(logits, at + (first + mixtures + m) * stride, mask, ACC), half, edge, log_width)


@triton.jit
def bins_of(levels, ACC: tl.constexpr):
    """Half the width of a bin, where the open bins begin, and the logarithm of the width."""
    half = 1.0 / tl.cast(levels - 1, ACC)
    least = half * 0.0 + 1e-3
    return half, 1.0 - tl.where(half < least, half, least), tl.log(2.0 * half)


@triton.jit
def add_exponential(top, total, x):
    """(top, total) of a sum of exponentials total * exp(top), with exp(x) added."""
    higher = tl.where(x > top, x, top)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - safe) + tl.exp(x - safe)


@triton.jit
def joint(
    logits, at, mixtures, m, stride, mask, x0, x1, x2, half, edge, log_width, CHANNELS: tl.constexpr, ACC: tl.constexpr
):
    """(logit, logit + log-probability of all colors) of mixture m."""
    logit = read(logits, at + m * stride, mask, ACC)
    total, _, _ = color(logits, at, mixtures, mixtures, m, stride, mask, x0, 0.0, half, edge, log_width, ACC)
    if CHANNELS == 3:
        k0, _ = tanh_parts(read(logits, at + (3 * mixtures + m) * stride, mask, ACC))
        k1, _ = tanh_parts(read(logits, at + (6 * mixtures + m) * stride, mask, ACC))
        k2, _ = tanh_parts(read(logits, at + (9 * mixtures + m) * stride, mask, ACC))
        moved = k0 * x0
        green, _, _ = color(logits, at, 4 * mixtures, mixtures, m, stride, mask, x1, moved, half, edge, log_width, ACC)
        moved = k1 * x0 + k2 * x1
        blue, _, _ = color(logits, at, 7 * mixtures, mixtures, m, stride, mask, x2, moved, half, edge, log_width, ACC)
        total = total + green + blue
    return logit, logit + total
