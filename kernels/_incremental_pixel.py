"""A pixel's colors drawn and written, as Triton device functions: into the image, and into the state, where the network reads them."""

import triton
import triton.language as tl

from fastgen._schema import DRAWS
from fastgen.kernels._incremental_draw import draw_color, draw_level, log_prob_level, log_prob_mixture
from fastgen.kernels._sampling import uniform_at

BERNOULLI = tl.constexpr(DRAWS.index("bernoulli"))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def keep_logits(
    logits, values, n, pixel, size, channels, colors, first, last, level_stride, color_stride, BLOCK: tl.constexpr
):
    """Those of the colors [first, last), the last's too what is no color's; where the colors have no turns, all."""
    for begin in range(0, channels, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        by_level, by_color = tl.maximum(level_stride, 1), tl.maximum(color_stride, 1)
        owner = tl.where(color_stride <= level_stride, o % by_level // by_color, o // by_color)
        owner = tl.minimum(owner, colors - 1)
        mask = (o < channels) & (owner >= first) & (owner < last)
        tl.store(logits + (n * channels + o) * size + pixel, tl.load(values + o, mask=mask, other=0.0), mask=mask)


@triton.jit
def draw_levels(
    values, to, image, known, levels, level_count, seed, options, out, log_prob, n, pixel, size, colors, first, last, count,
    level_stride, color_stride, top_k, step, KIND: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The colors [first, last), each by itself; ``values`` are the pixel's logits, ``to`` its place in the state."""
    k = tl.arange(0, BLOCK).to(tl.int64)
    temperature, top_p = tl.load(options), tl.load(options + 1)
    total = tl.load(log_prob + n * size + pixel, mask=first > 0, other=0.0)
    for c in range(first, last):
        at, color = values + c * color_stride, (n * colors + c) * size + pixel
        if KIND == BERNOULLI:
            z = tl.load(at + k * 0, mask=k == 1, other=0.0)
        else:
            z = tl.load(at + k * level_stride, mask=k < count, other=0.0)
        z = tl.where(k < count, z, -INFINITY)
        u = tl.sum(uniforms(pixel * colors + c, step, seed, 1)).to(ACC)
        level, bad = draw_level(z, k, count, at, level_stride, u, temperature, top_k, top_p, CUT)
        value = tl.where(bad, float("nan"), tl.load(levels + level))
        if known is not None:
            given, own = tl.load(known + color) != 0, tl.load(image + color)
            options_of = tl.load(levels + k, mask=(k < count) & (k < level_count), other=INFINITY)
            distance = tl.abs(options_of - own)
            nearest = tl.min(tl.where(distance == tl.min(distance), k, count))
            level = tl.where(given, tl.where(nearest < count, nearest, 0), level)
            value = tl.where(given, own, value)
        total += log_prob_level(z, k, level)
        tl.store(out + color, value)
        tl.store(to + c, value)
    tl.store(log_prob + n * size + pixel, total)


@triton.jit
def draw_mixture(
    values, to, image, known, seed, options, out, log_prob, n, pixel, size, count, rounded, step, COLORS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All colors together, or as given where all of them are known."""
    k = tl.arange(0, BLOCK).to(tl.int64)
    temperature = tl.load(options)
    z = tl.load(values + k, mask=k < count, other=-INFINITY)
    u = uniforms(pixel * (COLORS + 1), step, seed, COLORS + 1).to(ACC)
    m, bad = draw_level(z, k, count, values, 1, chosen(u, 0), temperature, 0, 1.0, False)
    red = draw_color(values, m, 0, count, 0.0, 0.0, chosen(u, 1), temperature, rounded, COLORS, ACC)
    green, blue = red, red
    if COLORS == 3:
        green = draw_color(values, m, 1, count, red, 0.0, chosen(u, 2), temperature, rounded, COLORS, ACC)
        blue = draw_color(values, m, 2, count, red, green, chosen(u, 3), temperature, rounded, COLORS, ACC)
    parameters = count * (10 if COLORS == 3 else 3)
    for begin in range(0, parameters, BLOCK):
        found = tl.load(values + begin + k, mask=begin + k < parameters, other=0.0)
        bad = bad | (tl.sum((found - found != 0.0).to(tl.int32)) > 0)
    red, green, blue = (
        tl.where(bad, float("nan"), red),
        tl.where(bad, float("nan"), green),
        tl.where(bad, float("nan"), blue),
    )
    first = n * COLORS * size + pixel
    if known is not None:
        given = tl.load(known + first) != 0
        for c in tl.static_range(1, COLORS):
            given = given & (tl.load(known + first + c * size) != 0)
        red = tl.where(given, tl.load(image + first), red)
        if COLORS == 3:
            green = tl.where(given, tl.load(image + first + size), green)
            blue = tl.where(given, tl.load(image + first + 2 * size), blue)
    levels = tl.where(rounded > 0, rounded, 256)
    total = log_prob_mixture(values, k, count, red, green, blue, levels, COLORS, ACC)
    for c in tl.static_range(COLORS):
        value = red if c == 0 else green if c == 1 else blue
        tl.store(out + first + c * size, value)
        tl.store(to + c, value)
    tl.store(log_prob + n * size + pixel, tl.where(bad, float("nan"), total))


@triton.jit
def uniforms(element, step, seed, SIZE: tl.constexpr):
    """``SIZE`` uniforms from ``element`` on in a block of four, the others 0."""
    lane = tl.arange(0, 4)
    return tl.where(lane < SIZE, uniform_at(element + lane, step, seed), 0.0)


@triton.jit
def chosen(u, which: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 4) == which, u, 0.0))
