"""The instructions of a program as Triton device functions: each for the places [x0, x1) of row y of image n."""

import triton
import triton.language as tl

from fastgen.kernels._incremental_plan import INSTRUCTION, OPERAND, PHASE
from fastgen.kernels._incremental_values import (
    activated,
    masked,
    nearest_even,
    number,
    parameter_or,
    place,
    read,
    read_channels,
)  # fmt: skip

I_WIDTH, I_OUTPUT, I_CHANNELS, I_ACTIVATION, I_GATE, I_GATED_BY, I_BIAS, I_UPSCALE = (
    tl.constexpr(INSTRUCTION.index(name))
    for name in ("width", "output", "channels", "activation", "gate", "gated_by", "bias", "upscale")
)
I_PHASES, I_ADDENDS, I_ADDEND_COUNT, I_WEIGHT, I_EPS = (
    tl.constexpr(INSTRUCTION.index(name)) for name in ("phases", "addends", "addend_count", "weight", "eps")
)
I_HEADS, I_SCALE, I_STRICT, I_KEYS, I_VALUES, I_LEVELS = (
    tl.constexpr(INSTRUCTION.index(name)) for name in ("heads", "scale", "strict", "keys", "values", "levels")
)
PHASES_APART = tl.constexpr(len(PHASE))
P_TOTAL, P_PANEL, P_SEGMENTS, P_COUNT = (tl.constexpr(PHASE.index(name)) for name in PHASE)
OPERANDS_APART = tl.constexpr(len(OPERAND))
O_SCALE, O_CHANNELS, O_STRIDE, O_LENGTH, O_OFFSET, O_COLUMN = (
    tl.constexpr(OPERAND.index(name)) for name in ("scale", "channels", "stride", "length", "offset", "column")
)
PANEL = tl.constexpr(16)


@triton.jit
def phase_of(table, i, y, x):
    """The phase of the outputs at (y, x)."""
    u = number(i + I_UPSCALE)
    return table + tl.load(i + I_PHASES) + (y % u * u + x % u) * PHASES_APART


@triton.jit
def weights_at(weights, phase, segment, k, o, ACC: tl.constexpr):
    """[k, o] of a segment's weights."""
    total = tl.load(phase + P_TOTAL)
    row = (tl.load(segment + O_OFFSET) + k) * PANEL
    at = tl.load(phase + P_PANEL) * PANEL + row[:, None] + ((o // PANEL) * total * PANEL + o % PANEL)[None, :]
    return weights + at


@triton.jit
def sums_of_a_place(
    table, state, weights, i, y, x, n, o, channels, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, ACC: tl.constexpr
):
    """The sums [BLOCK_O] of all segments at one place."""
    u = number(i + I_UPSCALE)
    phase = phase_of(table, i, y, x)
    first = table + tl.load(phase + P_SEGMENTS)
    acc = tl.zeros([BLOCK_K, BLOCK_O], dtype=ACC)
    for s in range(0, number(phase + P_COUNT)):
        segment = first + s * OPERANDS_APART
        stride, length = number(segment + O_STRIDE), number(segment + O_LENGTH)
        at, inside = place(segment, stride * (y // u), n, stride * (x // u))
        if inside:
            for begin in range(0, length, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                values = tl.load(state + at + k, mask=k < length, other=0.0)
                mask = (k < length)[:, None] & (o < channels)[None, :]
                w = tl.load(weights_at(weights, phase, segment, k, o, ACC), mask=mask, other=0.0).to(ACC)
                acc += values[:, None] * w
    return tl.sum(acc, axis=0)


@triton.jit
def sums_of_a_tile(
    table, state, weights, i, y, x, n, o, channels, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The same of BLOCK_M places of a row from x on, as far apart as the phases are many."""
    u = number(i + I_UPSCALE)
    phase = phase_of(table, i, y, x)
    first = table + tl.load(phase + P_SEGMENTS)
    columns = tl.arange(0, BLOCK_M).to(tl.int64)
    there = x + u * columns < width
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=ACC)
    for s in range(0, number(phase + P_COUNT)):
        segment = first + s * OPERANDS_APART
        stride, length = number(segment + O_STRIDE), number(segment + O_LENGTH)
        at, inside = place(segment, stride * (y // u), n, stride * (x // u))
        apart = stride * tl.load(segment + O_COLUMN)
        if inside:
            for begin in range(0, length, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                kept = k < length
                values = tl.load(
                    state + at + (columns * apart)[:, None] + k[None, :], mask=there[:, None] & kept[None, :], other=0.0
                )
                mask = kept[:, None] & (o < channels)[None, :]
                w = tl.load(weights_at(weights, phase, segment, k, o, ACC), mask=mask, other=0.0).to(ACC)
                acc = tl.dot(values, w, acc, input_precision="ieee")
    return acc


@triton.jit
def combine_rows(
    table, state, weights, i, y, n, channels, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The bare sums of a whole row, into the output."""
    u = number(i + I_UPSCALE)
    output = table + tl.load(i + I_OUTPUT)
    column = tl.load(output + O_COLUMN)
    tiles = tl.cdiv(tl.cdiv(width, u), BLOCK_M)
    for t in range(0, u * tiles):
        x = t % u + t // u * (u * BLOCK_M)
        at, _ = place(output, y, n, x)
        columns = tl.arange(0, BLOCK_M).to(tl.int64)
        for begin in range(0, channels, BLOCK_O):
            o = begin + tl.arange(0, BLOCK_O)
            sums = sums_of_a_tile(table, state, weights, i, y, x, n, o, channels, width, BLOCK_M, BLOCK_K, BLOCK_O, ACC)
            mask = (x + u * columns < width)[:, None] & (o < channels)[None, :]
            tl.store(state + at + (u * columns * column)[:, None] + o[None, :], sums, mask=mask)


@triton.jit
def combine(
    table, state, weights, parameters, constants, i, y, x0, x1, n, m, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """activation(sums + bias + addends), times gate(operand) where there is one, for the places [x0, x1) of row y."""
    channels, bias = number(i + I_CHANNELS), tl.load(i + I_BIAS)
    output, addends = table + tl.load(i + I_OUTPUT), table + tl.load(i + I_ADDENDS)
    gated_by = tl.load(i + I_GATED_BY)
    whole = DOT & (m == 0) & (x1 > x0) & (tl.load(table + tl.load(i + I_PHASES) + P_COUNT) > 0)
    if DOT:
        if whole:
            combine_rows(table, state, weights, i, y, n, channels, x1, BLOCK_M, 16, BLOCK_O, ACC)
            tl.debug_barrier()
    for x in range(x0, x1):
        at, _ = place(output, y, n, x)
        for begin in range(0, channels, BLOCK_O):
            o = begin + tl.arange(0, BLOCK_O)
            mask = o < channels
            if whole:
                z = tl.load(state + at + o, mask=mask, other=0.0)
            else:
                z = sums_of_a_place(table, state, weights, i, y, x, n, o, channels, BLOCK_K, BLOCK_O, ACC)
            z += tl.load(parameters + bias + o, mask=masked(mask, bias >= 0), other=0.0)
            for a in range(0, number(i + I_ADDEND_COUNT)):
                addend = addends + a * OPERANDS_APART
                scale = parameter_or(parameters, tl.load(addend + O_SCALE), 1.0)
                z += scale * read_channels(state, constants, addend, y, n, x, o, mask)
            z = activated(z, number(i + I_ACTIVATION), ACC)
            if gated_by > 0:
                gate = read_channels(state, constants, table + gated_by, y, n, x, o, mask)
                z *= activated(gate, number(i + I_GATE), ACC)
            tl.store(state + at + o, z, mask=mask)


@triton.jit
def layer_norm(table, state, parameters, constants, i, y, x0, x1, n, BLOCK: tl.constexpr, ACC: tl.constexpr):
    channels, weight, bias = number(i + I_CHANNELS), tl.load(i + I_WEIGHT), tl.load(i + I_BIAS)
    source, output = table + tl.load(i + I_ADDENDS), table + tl.load(i + I_OUTPUT)
    eps = tl.load(parameters + tl.load(i + I_EPS))
    for x in range(x0, x1):
        at, _ = place(output, y, n, x)
        total = tl.zeros([BLOCK], dtype=ACC)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            total += read_channels(state, constants, source, y, n, x, c, c < channels)
        mean = tl.sum(total) / channels.to(ACC)
        squares = tl.zeros([BLOCK], dtype=ACC)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            away = read_channels(state, constants, source, y, n, x, c, c < channels) - mean
            squares += tl.where(c < channels, away * away, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(squares) / channels.to(ACC) + eps)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            mask = c < channels
            z = (read_channels(state, constants, source, y, n, x, c, mask) - mean) * rstd
            z *= tl.load(parameters + weight + c, mask=masked(mask, weight >= 0), other=1.0)
            z += tl.load(parameters + bias + c, mask=masked(mask, bias >= 0), other=0.0)
            tl.store(state + at + c, z, mask=mask)


@triton.jit
def attention(
    table,
    state,
    parameters,
    constants,
    i,
    y,
    x0,
    x1,
    n,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """Head by head, BLOCK_P positions at once, their softmax from the largest score so far."""
    width, heads = number(i + I_WIDTH), number(i + I_HEADS)
    keys, values = number(i + I_KEYS), number(i + I_VALUES)
    query = table + tl.load(i + I_ADDENDS)
    key, value = query + OPERANDS_APART, query + 2 * OPERANDS_APART
    scale = tl.load(parameters + tl.load(i + I_SCALE))
    e = tl.arange(0, BLOCK_E)
    for x in range(x0, x1):
        count = y * width + x + 1 - number(i + I_STRICT)
        at, _ = place(table + tl.load(i + I_OUTPUT), y, n, x)
        for h in range(0, heads):
            q = read_channels(state, constants, query, y, n, x, h * keys + e, e < keys) * scale
            largest = tl.full([1], -float("inf"), ACC)
            total = tl.zeros([1], dtype=ACC)
            acc = tl.zeros([BLOCK_E], dtype=ACC)
            for begin in range(0, count, BLOCK_P):
                p = begin + tl.arange(0, BLOCK_P)
                there = p < count
                k_at, _of_key = place(key, p // width, n, p % width)
                k = read(
                    state, constants, key, (k_at + h * keys)[:, None] + e[None, :], there[:, None] & (e < keys)[None, :]
                )
                scores = tl.where(there, tl.sum(k * q[None, :], axis=1), -float("inf"))
                above = tl.maximum(largest, tl.max(scores, axis=0))
                part = tl.exp(scores - above)
                factor = tl.exp(largest - above)
                v_at, _of_value = place(value, p // width, n, p % width)
                v = read(
                    state,
                    constants,
                    value,
                    (v_at + h * values)[:, None] + e[None, :],
                    there[:, None] & (e < values)[None, :],
                )
                total = total * factor + tl.sum(part, axis=0)
                acc = acc * factor + tl.sum(v * part[:, None], axis=0)
                largest = above
            total = tl.where(total == 0.0, 1.0, total)
            tl.store(state + at + h * values + e, acc / total, mask=e < values)


@triton.jit
def embedding(table, state, parameters, constants, i, y, x0, x1, n, BLOCK: tl.constexpr):
    levels, width, first = number(i + I_LEVELS), number(i + I_VALUES), tl.load(i + I_WEIGHT)
    source, output = table + tl.load(i + I_ADDENDS), table + tl.load(i + I_OUTPUT)
    for x in range(x0, x1):
        at, _ = place(output, y, n, x)
        for c in range(0, number(source + O_CHANNELS)):
            value = read_channels(state, constants, source, y, n, x, c, c >= 0)
            value = nearest_even(value)
            last = (levels - 1).to(value.dtype)
            level = tl.where(value > 0, tl.where(value < last, value, last), 0.0).to(tl.int64)  # of a NaN the first
            for begin in range(0, width, BLOCK):
                w = begin + tl.arange(0, BLOCK)
                found = tl.load(parameters + first + level * width + w, mask=w < width, other=0.0)
                tl.store(state + at + c * width + w, found, mask=w < width)
