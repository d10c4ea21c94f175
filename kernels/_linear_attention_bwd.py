"""Triton kernels of the backward of `linear_attention`. With S and P the softmax of queries and keys, C the context:

queries  a program owns a chunk of positions of one head: dS = scale C dO, dQ = S (dS - sum_d S dS), a part of dC = scale S dO^T
keys     a program owns a tile of positions of one head, or of its memories: dV = dC^T P, dK = P (dC V - sum_e C dC)

The parts of dC are summed in order: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._linear_attention_plan import Plan, make_plan, softmax_of_features
from fastgen.kernels._tiles import head_of, load_tile, product, store_tile, strides_of
from fastgen.reference._layout import empty_in_order_of


@triton.jit
def queries_kernel(
    query,  # [N, H, D, L]
    grad,  # [N, H, E, L]
    context,  # [N, H, D, E]
    d_query,  # [N, H, D, L]
    d_context,  # [N, H, chunks, D, E]
    query_strides,
    grad_strides,
    context_strides,
    d_query_strides,
    heads,
    length,
    chunk,  # of positions
    depth,
    width,
    SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    chunks = tl.cdiv(length, chunk)
    program = tl.program_id(0).to(tl.int64)
    n, h = program // chunks // heads, program // chunks % heads
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    scale = tl.full([1, 1], SCALE, ACC)
    c = load_tile(head_of(context, context_strides, n, h), context_strides, d, e, depth, width)
    acc = tl.zeros([BLOCK_D, BLOCK_E], dtype=ACC)
    first = (program % chunks * chunk).to(tl.int32)
    last = tl.minimum(length, first + chunk)
    for start in range(first, last, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        q = load_tile(head_of(query, query_strides, n, h), query_strides, d, j, depth, last).to(ACC)
        g = load_tile(head_of(grad, grad_strides, n, h), grad_strides, e, j, width, last)
        s = softmax_of_features(q, d, depth)
        ds = product(c, g, DOT, ACC)
        dq = s * (ds - tl.sum(s * ds, axis=0)[None, :]) * scale
        store_tile(head_of(d_query, d_query_strides, n, h), d_query_strides, d, j, depth, last, dq)
        acc += product(s, tl.trans(g), DOT, ACC)
    at = program * depth * width + d[:, None] * width + e[None, :]
    tl.store(d_context + at, acc * scale, mask=(d < depth)[:, None] & (e < width)[None, :])


@triton.jit
def keys_kernel(
    key,  # [N, H, D, S]
    value,  # [N, H, E, S]
    context,  # [N, H, D, E]
    d_context,  # the same
    statistics,  # [N, H, 2, D], maxima and sums
    d_key,  # [N, H, D, S]
    d_value,  # [N, H, E, S]
    key_strides,
    value_strides,
    context_strides,
    d_key_strides,
    d_value_strides,
    heads,
    positions,  # S
    depth,
    width,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles = tl.cdiv(positions, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    n, h = program // tiles // heads, program // tiles % heads
    j = (program % tiles * BLOCK_L).to(tl.int32) + tl.arange(0, BLOCK_L)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k = load_tile(head_of(key, key_strides, n, h), key_strides, d, j, depth, positions).to(ACC)
    v = load_tile(head_of(value, value_strides, n, h), value_strides, e, j, width, positions)
    c = load_tile(head_of(context, context_strides, n, h), context_strides, d, e, depth, width)
    dc = load_tile(head_of(d_context, context_strides, n, h), context_strides, d, e, depth, width)
    of_head = statistics + (n * heads + h) * 2 * depth + d
    highest = tl.load(of_head, mask=d < depth, other=0.0)
    total = tl.load(of_head + depth, mask=d < depth, other=1.0)
    p = tl.exp(k - highest[:, None]) / total[:, None]
    along = tl.sum(c * dc, axis=1)
    dk = p * (product(dc, v, DOT, ACC) - along[:, None])
    dv = product(tl.trans(dc), p, DOT, ACC)
    store_tile(head_of(d_key, d_key_strides, n, h), d_key_strides, d, j, depth, positions, dk)
    store_tile(head_of(d_value, d_value_strides, n, h), d_value_strides, e, j, width, positions, dv)


def linear_attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    context: Tensor,
    statistics: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan, operands = make_plan("linear_attention_bwd", query, key, value, memory_key, memory_value, scale)
    (n, heads, depth, length), width = query.shape, value.shape[2]
    operands.check("grad_output", grad_output, (n, heads, width, length))
    for name, t, dtype in (
        ("grad_output", grad_output, query.dtype), ("context", context, plan.opmath), ("statistics", statistics, plan.opmath)
    ):  # fmt: skip
        if t.dtype != dtype:
            operands.fail(f"{name} must be {dtype}, got {t.dtype}")
    context = operands.sized("context", context, n, heads, depth, width)
    statistics = operands.sized("statistics", statistics, n, heads, 2, depth)
    d_query, d_key, d_value = (empty_in_order_of(t, t.shape) for t in (query, key, value))
    chunks = triton.cdiv(length, plan.chunk)
    parts = torch.empty((n, heads, chunks, depth, width), dtype=plan.opmath, device=query.device)
    with on_device(query):
        if d_query.numel() or parts.numel():
            launch(
                queries_kernel, n * heads * chunks, query, grad_output, context, d_query, parts, strides_of(query),
                strides_of(grad_output), strides_of(context), strides_of(d_query), heads, length, plan.chunk, depth, width,
                SCALE=plan.scale, **plan.tile, **plan.options,
            )  # fmt: skip
        d_context = parts.sum(2)
        _keys(plan, key, value, context, d_context, statistics, d_key, d_value)
        memories = [torch.empty((0,), dtype=query.dtype, device=query.device)] * 2
        if memory_key is not None and memory_value is not None:
            each = [m.expand(n, -1, -1, -1) for m in (memory_key, memory_value)]
            of_each = [torch.empty(m.shape, dtype=plan.opmath, device=query.device) for m in each]
            _keys(plan, *each, context, d_context, statistics, *of_each)
            memories = [m.sum(0).to(query.dtype) for m in of_each]
    return d_query, d_key, d_value, memories[0], memories[1]


def _keys(
    plan: Plan, key: Tensor, value: Tensor, context: Tensor, d_context: Tensor, statistics: Tensor, d_key: Tensor, d_value: Tensor
) -> None:  # fmt: skip
    n, heads, depth, positions = key.shape
    tensors = (key, value, context, d_context, statistics, d_key, d_value)
    if d_key.numel() or d_value.numel():
        launch(
            keys_kernel, n * heads * triton.cdiv(positions, plan.tile["BLOCK_L"]), *tensors, strides_of(key), strides_of(value),
            strides_of(context), strides_of(d_key), strides_of(d_value), heads, positions, depth, value.shape[2], **plan.tile,
            **plan.options,
        )  # fmt: skip
