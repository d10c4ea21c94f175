"""Triton kernels of `attention`, forward; the backward is in `_attention_bwd`, tiles in `_attention_tiles`.

A program owns BLOCK_L query rows of one head and goes through the keys tile by tile, keeping maximum, sum and output of each row
(Dao et al. 2022). Up to SHORT_KEYS keys are one tile: nothing is rescaled.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._attention_bwd import attention_bwd
from fastgen.kernels._attention_tiles import SHORT_KEYS, make_plan, scores_of, tiles_of
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import tensor_reasons
from fastgen.kernels._tiles import INFINITY, head_of, load_tile, product, store_tile, strides_of
from fastgen.reference._layout import empty_in_order_of, opmath_dtype

__all__ = ["attention", "attention_bwd", "attention_fwd", "reasons"]


@triton.jit
def forward_kernel(
    query,  # [N, H, L, E], all tensors through strides
    key,  # [N, Hk, S, E]
    value,  # [N, Hk, S, Ev]
    mask,  # [N, H, L, S] or None
    out,  # [N, H, L, Ev]
    logsumexp,  # [N, H, L] or None
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    out_strides,
    heads,
    group,  # heads of queries for one of keys
    rows,
    keys,
    depth,
    width,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    SHORT: tl.constexpr,
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
    i = (block * BLOCK_L).to(tl.int32) + tl.arange(0, BLOCK_L)
    e, w = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    q = load_tile(head_of(query, query_strides, n, h), query_strides, i, e, rows, depth)
    if SHORT:
        j = tl.arange(0, BLOCK_S)
        k = load_tile(k_head, key_strides, j, e, keys, depth)
        v = load_tile(v_head, value_strides, j, w, keys, width)
        s = scores_of(q, k, mask_head, mask_strides, i, j, rows, keys, SCALE, CAUSAL, BOOLEAN, DOT, ACC)
        highest = tl.max(s, axis=1)
        highest = tl.where(highest == -INFINITY, 0.0, highest)
        p = tl.exp(s - highest[:, None])
        total = tl.sum(p, axis=1)
        acc = product(p, v, DOT, ACC)
    else:
        highest = tl.full([BLOCK_L], -INFINITY, ACC)
        total = tl.zeros([BLOCK_L], dtype=ACC)
        acc = tl.zeros([BLOCK_L, BLOCK_V], dtype=ACC)
        last = keys
        if CAUSAL:
            last = tl.minimum(keys, (block * BLOCK_L).to(tl.int32) + BLOCK_L)
        for start in range(0, last, BLOCK_S):
            j = start + tl.arange(0, BLOCK_S)
            k = load_tile(k_head, key_strides, j, e, keys, depth)
            v = load_tile(v_head, value_strides, j, w, keys, width)
            s = scores_of(q, k, mask_head, mask_strides, i, j, rows, keys, SCALE, CAUSAL, BOOLEAN, DOT, ACC)
            above = tl.maximum(highest, tl.max(s, axis=1))
            safe = tl.where(above == -INFINITY, 0.0, above)  # no key so far: every exponential is 0
            p = tl.exp(s - safe[:, None])
            factor = tl.exp(highest - safe)
            total = total * factor + tl.sum(p, axis=1)
            acc = acc * factor[:, None] + product(p, v, DOT, ACC)
            highest = above
        highest = tl.where(highest == -INFINITY, 0.0, highest)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    store_tile(head_of(out, out_strides, n, h), out_strides, i, w, rows, width, acc * inverse[:, None])
    if logsumexp is not None:
        tl.store(logsumexp + (n * heads + h) * rows + i, highest + tl.log(total), mask=i < rows)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    found = tensor_reasons(t for t in tensors if t.dtype != torch.bool)
    backward = op == "attention_bwd"
    query, key, value = tensors[1:4] if backward else tensors[:3]
    largest = max(tiles_of(query.dtype, of_keys=backward))
    given = max((t.shape[-1] for t in (query, key, value) if t.dim() > 0), default=0)
    if given > largest:
        found.append(
            f"head dimensions up to {largest} fit the registers of a program of {op} in {query.dtype}, got {given}"
        )
    return found


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    return _forward("attention", False, query, key, value, attn_mask, is_causal, scale)[0]


def attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, logsumexp = _forward("attention_fwd", True, query, key, value, attn_mask, is_causal, scale)
    assert logsumexp is not None
    return output, logsumexp


def _forward(op: str, wants_logsumexp: bool, query: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    plan, _ = make_plan(op, query, *args)
    n, heads, rows, _ = query.shape
    keys = plan.key.shape[2]
    output = empty_in_order_of(query, (n, heads, rows, plan.value.shape[3]))
    logsumexp = None
    if wants_logsumexp:
        logsumexp = torch.empty((n, heads, rows), dtype=opmath_dtype(query.dtype), device=query.device)
    if keys == 0:
        return output.zero_(), None if logsumexp is None else logsumexp.fill_(-float("inf"))
    if keys <= SHORT_KEYS and plan.options["BLOCK_S"] >= 64:  # of smaller tiles a larger one would not fit
        plan.options["BLOCK_S"] = max(triton.next_power_of_2(keys), 16)
    if output.numel() > 0 or (logsumexp is not None and logsumexp.numel() > 0):
        with on_device(query):
            launch(
                forward_kernel, triton.cdiv(rows, plan.options["BLOCK_L"]) * n * heads, query, plan.key, plan.value, plan.mask,
                output, logsumexp, *plan.strides, strides_of(output), *plan.sizes,
                SHORT=keys <= plan.options["BLOCK_S"], **plan.options,
            )  # fmt: skip
    return output, logsumexp
