"""What draws pixels, in plain torch: uniforms of one seed a sample, categorical levels and mixtures of discretised logistics.

The mixtures are those of Salimans et al., "PixelCNN++", ICLR 2017, laid out as pclucas14/pixel-cnn-pp lays them out. Kernels say
the same in `csrc/common/sampling.h` and `kernels/_sampling.py`.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._layout import opmath_dtype
from ._philox import philox_4x32

MASK = 0xFFFFFFFF
UNIFORMS = 1  # the fourth word of the counter, which is 0 for normals
LEAST_LOG_SCALE = -7.0
EDGE = 1e-3  # values nearer than this (and half a step) to -1 or 1 lie in the open bins there
SERIES = 1e-3  # below it 1 - exp(-d) is a series in d, which may be less than any normal number


def uniforms(seeds: Tensor, element: int, step: int, size: int) -> Tensor:
    """Uniforms ``element`` to ``element + size`` of the streams (seeds[n], step), [N, size] in float32.

    Element e is word e % 4 of the Philox block e // 4: u = (r // 2^9 + 1/2) / 2^23, which float32 holds exactly and which is never
    0 or 1 (24 bits of r and a half would be rounded).
    """
    first = element // 4
    block = torch.arange((element + size + 3) // 4 - first, device=seeds.device)[None] + first  # [1, B]
    key = seeds.to(torch.int64)[:, None]  # [N, 1]
    counter = (
        block & MASK, (block >> 32) & MASK, torch.full_like(block, step & MASK), torch.full_like(block, UNIFORMS)
    )  # fmt: skip
    words = torch.stack(philox_4x32(torch.broadcast_tensors(*counter), (key & MASK, (key >> 32) & MASK)), dim=-1)
    drawn = words.reshape(seeds.shape[0], 4 * block.shape[1])[:, element % 4 : element % 4 + size]
    return (((drawn >> 9).double() + 0.5) * 2.0**-23).to(torch.float32)


def log_prob_categorical(logits: Tensor, level: Tensor) -> Tensor:
    """The logarithm of the probability of ``level`` [*] under ``logits`` [*, K]; NaN where the largest is not finite."""
    largest = logits.amax(-1)
    chosen = torch.gather(logits, -1, level[..., None])[..., 0]
    return torch.where(largest.isfinite(), chosen - torch.logsumexp(logits, -1), math.nan)


def draw_categorical(logits: Tensor, temperature: float, top_k: int, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """(levels [*] int64, the logarithms of their probabilities under ``logits`` [*, K] as they are), by uniforms ``u`` [*].

    The first level whose cumulative probability exceeds u, of softmax(logits / temperature) over the ``top_k`` largest levels (0:
    all) and of those the most probable that hold ``top_p`` (1: all); of equal levels the first counts as the larger. Temperature 0
    takes the largest. -1 and NaN where the largest is not finite.
    """
    logits = logits.to(opmath_dtype(logits.dtype))
    count, largest = logits.shape[-1], logits.amax(-1, keepdim=True)
    if temperature > 0:
        weights = torch.exp((logits - largest) / temperature).double()
        if 0 < top_k < count or top_p < 1:
            order = torch.argsort(logits, dim=-1, descending=True, stable=True)
            ordered = torch.gather(weights, -1, order)
            if 0 < top_k < count:
                ordered[..., top_k:] = 0
            if top_p < 1:
                before = ordered.cumsum(-1) - ordered  # what the larger ones hold
                first = torch.arange(count, device=logits.device) == 0
                kept = first | (before < top_p * ordered.sum(-1, keepdim=True))
                ordered = torch.where(kept, ordered, 0.0)
            weights = torch.zeros_like(weights).scatter(-1, order, ordered)
        cumulative = weights.cumsum(-1)
        passed = (cumulative > u[..., None].double() * weights.sum(-1, keepdim=True)) & (weights > 0)
        last = (count - 1) - (weights > 0).flip(-1).int().argmax(-1)
        drawn = torch.where(passed.any(-1), passed.int().argmax(-1), last)
    else:
        drawn = (logits == largest).int().argmax(-1)
    drawn = torch.where(largest[..., 0].isfinite(), drawn, -1)
    return drawn, log_prob_categorical(logits, drawn.clamp_min(0))


def split_mixture(parameters: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logits [*, M], means [*, C, M], log scales [*, C, M] as they are, coefficients [*, 3, M] or None) of [*, 10 M] for three
    colors, [*, 3 M] for one."""
    kinds = 3 if channels == 3 else 2
    mixtures = parameters.shape[-1] // (1 + channels * kinds)
    logits, rest = parameters[..., :mixtures], parameters[..., mixtures:]
    rest = rest.reshape(*rest.shape[:-1], channels, kinds, mixtures)
    coefficients = torch.tanh(rest[..., 2, :]) if kinds == 3 else None
    return logits, rest[..., 0, :], rest[..., 1, :], coefficients


def coupled_means(means: Tensor, coefficients: Tensor | None, values: Tensor) -> Tensor:
    """The means [*, C, M] of the colors of ``values`` [*, C], each moved by the colors before it."""
    if coefficients is None:
        return means
    red, green = values[..., 0, None], values[..., 1, None]
    first, second, third = coefficients.unbind(-2)
    moved = (torch.zeros_like(first), first * red, second * red + third * green)
    return means + torch.stack(moved, dim=-2)


def nearest_level(x: Tensor, levels: int) -> Tensor:
    """The nearest of the ``levels`` values 2 k / (levels - 1) - 1, rounded once."""
    steps = levels - 1
    return (2 * torch.round((x + 1) * 0.5 * steps) - steps) / steps


def draw_logistic_mixture(parameters: Tensor, channels: int, levels: int, temperature: float, u: Tensor) -> Tensor:
    """Pixels [*, C] in [-1, 1] from ``parameters`` [*, 10 M or 3 M] and uniforms ``u`` [*, 1 + C]: the mixture, then each color.

    ``levels`` 0: not rounded. NaN where a parameter is not finite.
    """
    parameters = parameters.to(opmath_dtype(parameters.dtype))
    logits, means, log_scales, coefficients = split_mixture(parameters, channels)
    finite = parameters.isfinite().all(-1)
    m = draw_categorical(logits, temperature, 0, 1.0, u[..., 0])[0].clamp_min(0)
    chosen = m[..., None, None]

    def of_mixture(t: Tensor) -> Tensor:
        return torch.gather(t, -1, chosen.expand(*t.shape[:-1], 1))[..., 0]

    means, log_scales = of_mixture(means), of_mixture(log_scales).clamp_min(LEAST_LOG_SCALE)
    uniform = u[..., 1:].to(parameters.dtype)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    spread = temperature * torch.exp(log_scales) * noise if temperature > 0 else torch.zeros_like(means)
    factors = torch.zeros_like(means) if coefficients is None else of_mixture(coefficients)
    values: list[Tensor] = []
    for c in range(channels):
        mean = means[..., c]
        if c == 1:
            mean = mean + factors[..., 0] * values[0]
        if c == 2:
            mean = mean + factors[..., 1] * values[0] + factors[..., 2] * values[1]
        x = (mean + spread[..., c]).clamp(-1, 1)
        values.append(nearest_level(x, levels) if levels > 0 else x)
    return torch.where(finite[..., None], torch.stack(values, dim=-1), math.nan)


def log_bins(values: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """The logarithm of the probability that logistic distributions give the bins of ``values``: half a step to either side, open at
    the ends.

    With the edges at a and b scales from the mean, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): logarithms
    that are all negative, so nothing cancels. The port takes log(sigmoid(a) - sigmoid(b)) where that exceeds 1e-5, the same number,
    and below it the density at the middle times the width of the bin, which is close where a bin is narrower than a scale.
    """
    half = 1 / (levels - 1)
    inverse, edge = torch.exp(-log_scales), 1 - min(half, EDGE)
    a, b, width = (values - means + half) * inverse, (values - means - half) * inverse, 2 * half * inverse
    below, above = logsigmoid(a), logsigmoid(-b)
    narrow = width < SERIES
    wide = torch.where(narrow, 1.0, width)  # a gradient through the branch not taken must not be NaN
    inside = torch.where(
        narrow, math.log(2 * half) - log_scales - width / 2 + width * width / 24, torch.log(-torch.expm1(-wide))
    )
    return torch.where(values < -edge, below, torch.where(values > edge, above, below + above + inside))


def log_bins_bwd(values: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The derivatives of :func:`log_bins` by ``means`` and ``log_scales``."""
    half = 1 / (levels - 1)
    inverse, edge = torch.exp(-log_scales), 1 - min(half, EDGE)
    a, b, width = (values - means + half) * inverse, (values - means - half) * inverse, 2 * half * inverse
    lowest, highest = values < -edge, values > edge
    from_a = torch.where(highest, 0.0, torch.sigmoid(-a))
    from_b = torch.where(lowest, 0.0, torch.sigmoid(b))
    series = 1 - width / 2 + width * width / 12
    from_width = torch.where(width < SERIES, series, width / torch.expm1(torch.where(width < SERIES, 1.0, width)))
    from_width = torch.where(lowest | highest, 0.0, from_width)
    return -inverse * (from_a - from_b), -(a * from_a - b * from_b + from_width)


def log_prob_logistic_mixture(parameters: Tensor, values: Tensor, levels: int) -> Tensor:
    """The logarithm of the probability [*] of pixels ``values`` [*, C] under ``parameters`` [*, 10 M or 3 M]."""
    logits, means, log_scales, coefficients = split_mixture(parameters, values.shape[-1])
    means = coupled_means(means, coefficients, values)
    bins = log_bins(values[..., None], means, log_scales.clamp_min(LEAST_LOG_SCALE), levels)  # [*, C, M]
    return torch.logsumexp(logits + bins.sum(-2), -1) - torch.logsumexp(logits, -1)


def log_prob_logistic_mixture_bwd(parameters: Tensor, values: Tensor, levels: int) -> Tensor:
    """The derivatives of :func:`log_prob_logistic_mixture` by ``parameters``, in their shape."""
    logits, means, raw_scales, coefficients = split_mixture(parameters, values.shape[-1])
    means = coupled_means(means, coefficients, values)
    log_scales = raw_scales.clamp_min(LEAST_LOG_SCALE)
    bins = log_bins(values[..., None], means, log_scales, levels)
    weights = torch.softmax(logits + bins.sum(-2), -1)
    by_mean, by_scale = log_bins_bwd(values[..., None], means, log_scales, levels)
    parts = [by_mean, torch.where(raw_scales < LEAST_LOG_SCALE, 0.0, by_scale)]
    if coefficients is not None:
        red, green = values[..., 0, None], values[..., 1, None]
        moved = (by_mean[..., 1, :] * red, by_mean[..., 2, :] * red, by_mean[..., 2, :] * green)
        parts.append(torch.stack(moved, dim=-2) * (1 - coefficients * coefficients))
    inner = torch.stack(parts, dim=-2) * weights[..., None, None, :]  # [*, C, kinds, M]
    return torch.cat([weights - torch.softmax(logits, -1), inner.flatten(-3)], dim=-1)
