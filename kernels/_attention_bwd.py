"""Triton kernels of the backward of `attention`: the scores are computed again from their logsumexp (Dao et al. 2022).

delta  a program owns rows: D = sum over e of dO O
rows   a program owns rows and goes through the keys: dS = P (dO V^T - D), dQ = scale dS K
keys   a program owns keys and goes through the rows of every head they serve: dV = P^T dO, dK = scale dS^T Q

Scores are computed twice, which spares atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._attention_tiles import DELTA_TILE, make_plan, scores_of
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._tiles import INFINITY, head_of, load_tile, product, store_tile, strides_of
from fastgen.reference._layout import empty_in_order_of, opmath_dtype


@triton.jit
def delta_kernel(
    grad,  # [N, H, L, Ev]
    out,  # the same
    delta,  # [N, H, L]
    grad_strides,
    out_strides,
    heads,
    rows,
    width,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    block, n, h = program % blocks, program // blocks // heads, program // blocks % heads
    i, w = (block * BLOCK_L).to(tl.int32) + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_V)
    g = load_tile(head_of(grad, grad_strides, n, h), grad_strides, i, w, rows, width).to(ACC)
    o = load_tile(head_of(out, out_strides, n, h), out_strides, i, w, rows, width).to(ACC)
    tl.store(delta + (n * heads + h) * rows + i, tl.sum(g * o, axis=1), mask=i < rows)


@triton.jit
def gradient_of_scores(
    q, k, v, g, mask, mask_strides, logsumexp, delta, i, j, rows, keys,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights P and dS of rows i and keys j; logsumexp and delta are those of the head."""
    s = scores_of(q, k, mask, mask_strides, i, j, rows, keys, SCALE, CAUSAL, BOOLEAN, DOT, ACC)
    statistic = tl.load(logsumexp + i, mask=i < rows, other=INFINITY)
    statistic = tl.where(statistic == -INFINITY, INFINITY, statistic)  # a row without keys has no weights
    p = tl.exp(s - statistic[:, None])
    d = tl.load(delta + i, mask=i < rows, other=0.0)
    return p, p * (product(g, tl.trans(v), DOT, ACC) - d[:, None])


@triton.jit
def rows_kernel(
    query,  # [N, H, L, E], all tensors through strides
    key,  # [N, Hk, S, E]
    value,  # [N, Hk, S, Ev]
    mask,  # [N, H, L, S] or None
    grad,  # [N, H, L, Ev]
    logsumexp,  # [N, H, L]
    delta,  # [N, H, L]
    d_query,  # [N, H, L, E]
    d_scores,  # [N, H, L, S] or None
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    grad_strides,
    d_query_strides,
    d_scores_strides,
    heads,
    group,  # heads of queries for one of keys
    rows,
    keys,
    depth,
    width,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    block, n, h = program % blocks, program // blocks // heads, program // blocks % heads
    k_head = head_of(key, key_strides, n, h // group)
    v_head = head_of(value, value_strides, n, h // group)
    mask_head = mask
    if mask is not None:
        mask_head = head_of(mask, mask_strides, n, h)
    of_rows = (n * heads + h) * rows
    i = (block * BLOCK_L).to(tl.int32) + tl.arange(0, BLOCK_L)
    e, w = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    q = load_tile(head_of(query, query_strides, n, h), query_strides, i, e, rows, depth)
    g = load_tile(head_of(grad, grad_strides, n, h), grad_strides, i, w, rows, width)
    acc = tl.zeros([BLOCK_L, BLOCK_E], dtype=ACC)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, (block * BLOCK_L).to(tl.int32) + BLOCK_L)
    for start in range(0, last, BLOCK_S):
        j = start + tl.arange(0, BLOCK_S)
        k = load_tile(k_head, key_strides, j, e, keys, depth)
        v = load_tile(v_head, value_strides, j, w, keys, width)
        _p, ds = gradient_of_scores(
            q, k, v, g, mask_head, mask_strides, logsumexp + of_rows, delta + of_rows, i, j, rows, keys,
            SCALE, CAUSAL, BOOLEAN, DOT, ACC,
        )  # fmt: skip
        if d_scores is not None:
            store_tile(head_of(d_scores, d_scores_strides, n, h), d_scores_strides, i, j, rows, keys, ds)
        acc += product(ds, k, DOT, ACC)
    scaled = acc * tl.full([1, 1], SCALE, ACC)
    store_tile(head_of(d_query, d_query_strides, n, h), d_query_strides, i, e, rows, depth, scaled)


@triton.jit
def keys_kernel(
    query,  # [N, H, L, E], all tensors through strides
    key,  # [N, Hk, S, E]
    value,  # [N, Hk, S, Ev]
    mask,  # [N, H, L, S] or None
    grad,  # [N, H, L, Ev]
    logsumexp,  # [N, H, L]
    delta,  # [N, H, L]
    d_key,  # [N, Hk, S, E]
    d_value,  # [N, Hk, S, Ev]
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    grad_strides,
    d_key_strides,
    d_value_strides,
    heads,
    group,  # heads of queries for one of keys
    rows,
    keys,
    depth,
    width,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(keys, BLOCK_S)
    program = tl.program_id(0).to(tl.int64)
    kv_heads = heads // group
    block, n, kv = program % blocks, program // blocks // kv_heads, program // blocks % kv_heads
    first_key = (block * BLOCK_S).to(tl.int32)
    j = first_key + tl.arange(0, BLOCK_S)
    e, w = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    k = load_tile(head_of(key, key_strides, n, kv), key_strides, j, e, keys, depth)
    v = load_tile(head_of(value, value_strides, n, kv), value_strides, j, w, keys, width)
    dk = tl.zeros([BLOCK_S, BLOCK_E], dtype=ACC)
    dv = tl.zeros([BLOCK_S, BLOCK_V], dtype=ACC)
    first_row = 0
    if CAUSAL:
        first_row = first_key // BLOCK_L * BLOCK_L
    for member in range(0, group):
        h = kv * group + member
        q_head = head_of(query, query_strides, n, h)
        g_head = head_of(grad, grad_strides, n, h)
        mask_head = mask
        if mask is not None:
            mask_head = head_of(mask, mask_strides, n, h)
        of_rows = (n * heads + h) * rows
        for start in range(first_row, rows, BLOCK_L):
            i = start + tl.arange(0, BLOCK_L)
            q = load_tile(q_head, query_strides, i, e, rows, depth)
            g = load_tile(g_head, grad_strides, i, w, rows, width)
            p, ds = gradient_of_scores(
                q, k, v, g, mask_head, mask_strides, logsumexp + of_rows, delta + of_rows, i, j, rows, keys,
                SCALE, CAUSAL, BOOLEAN, DOT, ACC,
            )  # fmt: skip
            dv += product(tl.trans(p), g, DOT, ACC)
            dk += product(tl.trans(ds), q, DOT, ACC)
    scaled = dk * tl.full([1, 1], SCALE, ACC)
    store_tile(head_of(d_key, d_key_strides, n, kv), d_key_strides, j, e, keys, depth, scaled)
    store_tile(head_of(d_value, d_value_strides, n, kv), d_value_strides, j, w, keys, width, dv)


def attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    wants_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, operands = make_plan("attention_bwd", query, key, value, attn_mask, is_causal, scale)
    n, heads, rows, _ = query.shape
    kv_heads, keys, width = value.shape[1:]
    opmath = opmath_dtype(query.dtype)
    if output.dim() != 4 or output.shape[3] != width:
        operands.fail(f"output must be [N, H, L, Ev] with Ev of value, {width}, got {tuple(output.shape)}")
    for name, t, dtype in (("grad_output", grad_output, query.dtype), ("output", output, query.dtype)):
        operands.check(name, t, (n, heads, rows, width))
        if t.dtype != dtype:
            operands.fail(f"{name} must be {dtype}, got {t.dtype}")
    if logsumexp.dtype != opmath:
        operands.fail(f"logsumexp must be {opmath}, got {logsumexp.dtype}")
    statistics = operands.sized("logsumexp", logsumexp, n, heads, rows)
    d_query, d_key, d_value = (empty_in_order_of(t, t.shape) for t in (query, key, value))
    d_scores = torch.empty((n, heads, rows, keys) if wants_scores else (0,), dtype=opmath, device=query.device)
    if min(n, heads, rows, keys) == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_(), d_scores
    if is_causal:
        d_scores.zero_()  # what a row does not see is not visited
    delta = torch.empty((n, heads, rows), dtype=opmath, device=query.device)
    inputs = (query, key, value, plan.mask, grad_output, statistics, delta)
    strides = (*plan.strides, strides_of(grad_output))
    tile, key_tile = plan.options, plan.tile_of_keys()
    if attn_mask is not None:  # a tile of it is held beside the others
        tile = tile | {"BLOCK_L": min(tile["BLOCK_L"], 32), "BLOCK_S": min(tile["BLOCK_S"], 32)}
    scores = d_scores if wants_scores else None
    delta_rows, warps = DELTA_TILE
    with on_device(query):
        launch(
            delta_kernel, triton.cdiv(rows, delta_rows) * n * heads, grad_output, output, delta, strides_of(grad_output),
            strides_of(output), heads, rows, width, BLOCK_L=delta_rows, BLOCK_V=tile["BLOCK_V"], ACC=tile["ACC"], num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        launch(
            rows_kernel, triton.cdiv(rows, tile["BLOCK_L"]) * n * heads, *inputs, d_query, scores, *strides, strides_of(d_query),
            strides_of(scores), *plan.sizes, **tile,
        )  # fmt: skip
        launch(
            keys_kernel, triton.cdiv(keys, key_tile["BLOCK_S"]) * n * kv_heads, *inputs, d_key, d_value, *strides,
            strides_of(d_key), strides_of(d_value), *plan.sizes, **key_tile,
        )  # fmt: skip
    return d_query, d_key, d_value, d_scores
