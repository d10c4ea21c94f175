"""Triton kernels of `linear_attention`, forward; the backward is in `_linear_attention_bwd`.

gather   a program owns a chunk of positions of one head, or the memories of it, and leaves maximum and sum of each feature of the
         keys, and a context
merge    a program owns a head, and puts the parts of its chunks together in order
output   a program owns a tile of positions of one head: softmax of the queries, product with the context

Chunks depend on the shape alone and nothing is added atomically: two runs give the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._linear_attention_bwd import linear_attention_bwd
from fastgen.kernels._linear_attention_plan import MOST_CHANNELS, Plan, make_plan, softmax_of_features
from fastgen.kernels._operands import tensor_reasons
from fastgen.kernels._tiles import INFINITY, head_of, load_tile, product, store_tile, strides_of
from fastgen.reference._layout import empty_in_order_of

__all__ = ["linear_attention", "linear_attention_bwd", "linear_attention_fwd", "reasons"]


@triton.jit
def gather_kernel(
    key,  # [N, H, D, S]
    value,  # [N, H, E, S]
    highest,  # [N, H, chunks, D], maxima of the keys
    total,  # [N, H, chunks, D], sums of exponentials
    context,  # [N, H, chunks, D, E]
    key_strides,
    value_strides,
    heads,
    positions,  # S
    chunk,  # of positions
    depth,
    width,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    chunks = tl.cdiv(positions, chunk)
    program = tl.program_id(0).to(tl.int64)
    n, h = program // chunks // heads, program // chunks % heads
    k_head, v_head = head_of(key, key_strides, n, h), head_of(value, value_strides, n, h)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    high = tl.full([BLOCK_D], -INFINITY, ACC)
    sums = tl.zeros([BLOCK_D], dtype=ACC)
    acc = tl.zeros([BLOCK_D, BLOCK_E], dtype=ACC)
    first = (program % chunks * chunk).to(tl.int32)
    last = tl.minimum(positions, first + chunk)
    for start in range(first, last, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        k = load_tile(k_head, key_strides, d, j, depth, last).to(ACC)
        v = load_tile(v_head, value_strides, e, j, width, last)
        k = tl.where((j < last)[None, :], k, -INFINITY)
        above = tl.maximum(high, tl.max(k, axis=1))
        safe = tl.where(above == -INFINITY, 0.0, above)  # no key so far: every exponential is 0
        p = tl.exp(k - safe[:, None])
        factor = tl.exp(high - safe)
        sums = sums * factor + tl.sum(p, axis=1)
        acc = acc * factor[:, None] + product(p, tl.trans(v), DOT, ACC)
        high = above
    tl.store(highest + program * depth + d, high, mask=d < depth)
    tl.store(total + program * depth + d, sums, mask=d < depth)
    at = program * depth * width + d[:, None] * width + e[None, :]
    tl.store(context + at, acc, mask=(d < depth)[:, None] & (e < width)[None, :])


@triton.jit
def add_part(high, sums, acc, highest, total, context, part, d, e, depth, width):
    """What is there so far and one part, over the larger of both maxima."""
    rows, tile = d < depth, (d < depth)[:, None] & (e < width)[None, :]
    h = tl.load(highest + part * depth + d, mask=rows, other=-INFINITY)
    s = tl.load(total + part * depth + d, mask=rows, other=0.0)
    c = tl.load(context + part * depth * width + d[:, None] * width + e[None, :], mask=tile, other=0.0)
    above = tl.maximum(high, h)
    safe = tl.where(above == -INFINITY, 0.0, above)
    before, now = tl.exp(high - safe), tl.exp(h - safe)
    return above, sums * before + s * now, acc * before[:, None] + c * now[:, None]


@triton.jit
def merge_kernel(
    highest,  # [N, H, chunks, D]
    total,
    parts,  # [N, H, chunks, D, E]
    memory_highest,  # [H, D] or None
    memory_total,
    memory_parts,  # [H, D, E] or None
    context,  # [N, H, D, E]
    statistics,  # [N, H, 2, D], maxima and sums
    heads,
    chunks,
    depth,
    width,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    high = tl.full([BLOCK_D], -INFINITY, ACC)
    sums = tl.zeros([BLOCK_D], dtype=ACC)
    acc = tl.zeros([BLOCK_D, BLOCK_E], dtype=ACC)
    if memory_parts is not None:
        high, sums, acc = add_part(
            high, sums, acc, memory_highest, memory_total, memory_parts, head % heads, d, e, depth, width
        )
    for part in range(head * chunks, head * chunks + chunks):
        high, sums, acc = add_part(high, sums, acc, highest, total, parts, part, d, e, depth, width)
    tl.store(statistics + head * 2 * depth + d, high, mask=d < depth)
    tl.store(statistics + (head * 2 + 1) * depth + d, sums, mask=d < depth)
    at = head * depth * width + d[:, None] * width + e[None, :]
    tl.store(context + at, acc / sums[:, None], mask=(d < depth)[:, None] & (e < width)[None, :])


@triton.jit
def output_kernel(
    query,  # [N, H, D, L]
    context,  # [N, H, D, E]
    out,  # [N, H, E, L]
    query_strides,
    context_strides,
    out_strides,
    heads,
    length,
    depth,
    width,
    SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles = tl.cdiv(length, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    n, h = program // tiles // heads, program // tiles % heads
    j = (program % tiles * BLOCK_L).to(tl.int32) + tl.arange(0, BLOCK_L)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = load_tile(head_of(query, query_strides, n, h), query_strides, d, j, depth, length).to(ACC)
    c = load_tile(head_of(context, context_strides, n, h), context_strides, d, e, depth, width)
    s = softmax_of_features(q, d, depth)
    y = product(tl.trans(c), s, DOT, ACC) * tl.full([1, 1], SCALE, ACC)
    store_tile(head_of(out, out_strides, n, h), out_strides, e, j, width, length, y)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    given = max((t.shape[2] for t in tensors[:4] if t.dim() == 4), default=0)
    found = tensor_reasons(tensors)
    if given > MOST_CHANNELS:
        found.append(f"up to {MOST_CHANNELS} channels a head fit the registers of a program of {op}, got {given}")
    return found


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> Tensor:
    return _forward("linear_attention", query, key, value, memory_key, memory_value, scale)[0]


def linear_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward("linear_attention_fwd", query, key, value, memory_key, memory_value, scale)


def _gather(plan: Plan, key: Tensor, value: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums [N, H, chunks, D] and contexts [N, H, chunks, D, E] of the chunks of keys [N, H, D, S]."""
    n, heads, depth, positions = key.shape
    chunks = triton.cdiv(positions, chunk)

    def empty(*shape: int) -> Tensor:
        return torch.empty((n, heads, chunks, *shape), dtype=plan.opmath, device=key.device)

    parts = empty(depth), empty(depth), empty(depth, value.shape[2])
    if parts[0].numel():
        launch(
            gather_kernel, n * heads * chunks, key, value, *parts, strides_of(key), strides_of(value), heads, positions, chunk,
            depth, value.shape[2], **plan.tile, **plan.options,
        )  # fmt: skip
    return parts


def _forward(op: str, query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan, _ = make_plan(op, query, *args)
    n, heads, depth, length = query.shape
    width = plan.value.shape[2]
    output = empty_in_order_of(query, (n, heads, width, length))
    context = torch.empty((n, heads, depth, width), dtype=plan.opmath, device=query.device)
    statistics = torch.empty((n, heads, 2, depth), dtype=plan.opmath, device=query.device)
    with on_device(query):
        parts = _gather(plan, plan.key, plan.value, plan.chunk)
        memories: tuple[Tensor | None, ...] = (None, None, None)
        if plan.memory_key is not None and plan.memory_value is not None and plan.memory_key.shape[2]:
            memories = _gather(plan, plan.memory_key[None], plan.memory_value[None], plan.memory_key.shape[2])
        if plan.key.shape[3] == 0 and memories[0] is None:
            context.zero_()
            statistics[:, :, 0].fill_(-float("inf"))
            statistics[:, :, 1].zero_()
        elif statistics.numel():
            launch(
                merge_kernel, n * heads, *parts, *memories, context, statistics, heads, parts[0].shape[2], depth, width,
                **plan.blocks, **plan.options,
            )  # fmt: skip
        if output.numel():
            launch(
                output_kernel, n * heads * triton.cdiv(length, plan.tile["BLOCK_L"]), query, context, output, strides_of(query),
                strides_of(context), strides_of(output), heads, length, depth, width, SCALE=plan.scale, **plan.tile,
                **plan.options,
            )  # fmt: skip
    return output, context, statistics
