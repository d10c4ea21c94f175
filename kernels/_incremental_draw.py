"""One pixel drawn from its logits, as Triton device functions: `fastgen/reference/_sampling.py` by one program.

Levels, or components of a mixture, lie in one block of a power of two. Sums are in the type of the logits, in another order than on
the CPU: a draw differs where a uniform falls within rounding of a step, and nowhere else.
"""

import triton
import triton.language as tl

from fastgen.kernels._incremental_values import nearest_even, tanh

INFINITY = tl.constexpr(float("inf"))
LEAST_LOG_SCALE = tl.constexpr(-7.0)


@triton.jit
def draw_level(z, k, count, at, stride, u, temperature, top_k, top_p, CUT: tl.constexpr):
    """(Level, whether none can be drawn) of logits ``z`` [B], -inf from ``count`` on, which lie at ``at``, ``stride`` apart."""
    largest, bad = largest_of(z)
    weights = tl.where(k < count, exponentials(z - largest, temperature), 0.0)
    if CUT:
        rank = tl.zeros_like(k)
        before = tl.zeros_like(z)
        for j in range(0, count):
            other = tl.load(at + j * stride)
            larger = (other > z) | ((other == z) & (j < k))
            weight = tl.exp((other - largest) / temperature)
            rank += larger.to(tl.int64)
            before += tl.where(larger, weight, 0.0)
        weights = tl.where((top_k > 0) & (rank >= top_k), 0.0, weights)
        kept = (rank == 0) | (before < top_p * tl.sum(weights)) | (top_p >= 1.0)
        weights = tl.where(kept, weights, 0.0)
    total = tl.sum(weights)
    passed = (tl.cumsum(weights) > u * total) & (weights > 0)
    first = tl.min(tl.where(passed, k, count))
    last = tl.max(tl.where(weights > 0, k, 0))
    likeliest = tl.min(tl.where(z == largest, k, count))
    level = tl.where(temperature > 0, tl.where(first < count, first, last), likeliest)
    return tl.where(bad, 0, level), bad


@triton.jit
def exponentials(z, temperature):
    """exp(z / temperature), plainly 0 where fp32 has no normal number."""
    x = z / tl.where(temperature > 0, temperature, 1.0)
    e = tl.exp(x)
    if x.dtype == tl.float32:
        e = tl.where(x < -87.0, 0.0, e)
    return e


@triton.jit
def largest_of(z):
    """(The largest, 0 where that is not finite, and whether it is not)."""
    largest = tl.max(z)
    bad = (tl.sum((z != z).to(tl.int32)) > 0) | (tl.abs(largest) == INFINITY)
    return tl.where(bad, 0.0, largest), bad


@triton.jit
def log_prob_level(z, k, level):
    """The logarithm of the probability of a level."""
    largest, bad = largest_of(z)
    chosen = tl.sum(tl.where(k == level, z - largest, 0.0))
    found = chosen - tl.log(tl.sum(tl.exp(z - largest)))
    return tl.where(bad, float("nan"), found)


@triton.jit
def log_sum_exp(z):
    largest, bad = largest_of(z)
    return tl.where(bad, float("nan"), largest + tl.log(tl.sum(tl.exp(z - largest))))


@triton.jit
def log_sigmoid(z):
    return tl.where(z < 0, z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def parameter(at, index, c, which, count, COLORS: tl.constexpr):
    """Parameter ``which`` of color c of component ``index``: 0 its mean, 1 the logarithm of its scale, 2 a coefficient."""
    kinds: tl.constexpr = 3 if COLORS == 3 else 2
    return tl.load(at + (1 + which + c * kinds) * count + index, mask=index < count, other=0.0)


@triton.jit
def moved_mean(at, index, c: tl.constexpr, count, red, green, COLORS: tl.constexpr):
    """The mean of color c, given those before it."""
    mean = parameter(at, index, c, 0, count, COLORS)
    if c == 1:
        mean += tanh(parameter(at, index, 0, 2, count, COLORS)) * red
    if c == 2:
        mean += tanh(parameter(at, index, 1, 2, count, COLORS)) * red
        mean += tanh(parameter(at, index, 2, 2, count, COLORS)) * green
    return mean


@triton.jit
def draw_color(
    at, m, c: tl.constexpr, count, red, green, u, temperature, rounded, COLORS: tl.constexpr, ACC: tl.constexpr
):
    """Color c of component m by a uniform, whose complement fp32 holds exactly."""
    log_scale = parameter(at, m, c, 1, count, COLORS)
    log_scale = tl.where(log_scale < LEAST_LOG_SCALE, LEAST_LOG_SCALE, log_scale)
    x = moved_mean(at, m, c, count, red, green, COLORS)
    x += temperature * tl.exp(log_scale) * (tl.log(u) - tl.log(1.0 - u))
    x = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))
    steps = (rounded - 1).to(ACC)
    level = nearest_even((x + 1.0) * 0.5 * steps)
    return tl.where(rounded > 0, (2.0 * level - steps) / steps, x)


@triton.jit
def log_bin(value, mean, log_scale, levels, ACC: tl.constexpr):
    """The logarithm of the probability of a bin of a logistic distribution; see the reference for why it is a product."""
    log_scale = tl.where(log_scale < LEAST_LOG_SCALE, LEAST_LOG_SCALE, log_scale)
    half = 1.0 / (levels - 1).to(ACC)
    margin = tl.full(half.shape, 1e-3, ACC)
    edge = 1.0 - tl.where(half < margin, half, margin)
    inverse = tl.exp(-log_scale)
    below = log_sigmoid((value - mean + half) * inverse)
    above = log_sigmoid((mean - value + half) * inverse)
    width = 2.0 * half * inverse
    narrow = tl.log(2.0 * half) - log_scale - width * 0.5 + width * width * (1.0 / 24.0)
    wide = 1.0 - tl.exp(-width)
    if value.dtype == tl.float32:  # where that cancels
        series = width * (1.0 - width * (0.5 - width * (0.166666667 - width * (0.0416666667 - width * 0.00833333333))))
        wide = tl.where(width < 0.1, series, wide)
    inside = below + above + tl.where(width < margin, narrow, tl.log(wide))
    return tl.where(value < -edge, below, tl.where(value > edge, above, inside))


@triton.jit
def log_prob_mixture(at, k, count, red, green, blue, levels, COLORS: tl.constexpr, ACC: tl.constexpr):
    """The logarithm of the probability of the colors of a pixel."""
    z = tl.load(at + k, mask=k < count, other=-INFINITY)
    joint = z
    for c in tl.static_range(COLORS):
        value = red if c == 0 else green if c == 1 else blue
        mean = moved_mean(at, k, c, count, red, green, COLORS)
        found = log_bin(value, mean, parameter(at, k, c, 1, count, COLORS), levels, ACC)
        joint += tl.where(k < count, found, 0.0)
    return log_sum_exp(joint) - log_sum_exp(z)
