"""What `linear_attention` means, in plain torch: Shen et al., "Efficient Attention", 2021, with the softmax of each apart, as
denoising-diffusion-pytorch has it; memories are further keys and values, the same for all samples (its ``mem_kv``)."""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import copy_in_order_of, empty_in_order_of, opmath_dtype


def _with_memory(t: Tensor, memory: Tensor | None) -> Tensor:
    """[N, H, D, L] -> [N, H, D, M + L] in the dtype of the arithmetic."""
    wide = t.to(opmath_dtype(t.dtype))
    return wide if memory is None else torch.cat([memory.to(wide.dtype).expand(len(t), -1, -1, -1), wide], -1)


def linear_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (output [N, H, E, L], context [N, H, D, E], statistics of the keys over positions [N, H, 2, D]: the maximum, -inf
    without any, and the sum of exp(key - maximum))."""
    q, k, v = query.to(opmath_dtype(query.dtype)), _with_memory(key, memory_key), _with_memory(value, memory_value)
    highest = k.amax(-1) if k.shape[-1] else k.new_full(k.shape[:-1], -math.inf)
    statistics = torch.stack([highest, torch.exp(k - highest[..., None]).sum(-1)], 2)
    context = _weights(k, statistics) @ v.mT
    return copy_in_order_of(scale * (context.mT @ q.softmax(-2)), query), context, statistics


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> Tensor:
    """The output alone."""
    return linear_attention_fwd(query, key, value, memory_key, memory_value, scale)[0]


def _weights(k: Tensor, statistics: Tensor) -> Tensor:
    highest, total = statistics[..., None].unbind(2)
    return torch.exp(k - highest) / total


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
    """With S and P the softmax of queries and keys, C the context and dC = scale S dO^T: dS = scale C dO, dQ = S (dS - sum_d S dS),
    dV = dC^T P, dP = dC V, dK = P (dP - sum_e C dC)."""
    k, v = _with_memory(key, memory_key), _with_memory(value, memory_value)
    grad, features = grad_output.to(k.dtype), query.to(k.dtype).softmax(-2)
    d_features, d_context = scale * (context @ grad), scale * (features @ grad.mT)
    weights = _weights(k, statistics)
    d_query = features * (d_features - (features * d_features).sum(-2, keepdim=True))
    d_value = d_context.mT @ weights
    d_key = weights * (d_context @ v - (context * d_context).sum(-1, keepdim=True))
    memories = k.shape[-1] - key.shape[-1]

    def of_memory(d: Tensor, memory: Tensor | None) -> Tensor:
        return query.new_empty(0) if memory is None else d[..., :memories].sum(0).to(memory.dtype).contiguous()

    return (
        copy_in_order_of(d_query, query),
        copy_in_order_of(d_key[..., memories:], key),
        copy_in_order_of(d_value[..., memories:], value),
        of_memory(d_key, memory_key),
        of_memory(d_value, memory_value),
    )


def _check(
    op: str, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None
) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_main(op, name, t)
        require(op, t.dim() == 4, f"{name} must be [N, H, D, L], got shape {tuple(t.shape)}")
    n, heads, depth, _ = query.shape
    check_floats(op, query, (n, heads, depth, key.shape[3]), key=key)
    check_floats(op, query, (n, heads, value.shape[2], key.shape[3]), value=value)
    given = (memory_key is None) == (memory_value is None)
    require(op, given, "memory_key and memory_value must be given together")
    if memory_key is not None:
        require(op, memory_key.dim() == 3, f"memory_key must be [H, D, M], got shape {tuple(memory_key.shape)}")
        memories = memory_key.shape[2]
        check_floats(op, query, (heads, depth, memories), memory_key=memory_key)
        check_floats(op, query, (heads, value.shape[2], memories), memory_value=memory_value)
    others = {"key": key, "value": value, "memory_key": memory_key, "memory_value": memory_value}
    for name, other in others.items():
        require(op, other is None or other.dtype == query.dtype, f"{name} must have the dtype of query")


def linear_attention_check(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> None:
    _check("linear_attention", query, key, value, memory_key, memory_value)


linear_attention_fwd_check = linear_attention_check


def linear_attention_bwd_check(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    context: Tensor,
    statistics: Tensor,
    scale: float,
) -> None:
    op = "linear_attention_bwd"
    _check(op, query, key, value, memory_key, memory_value)
    (n, heads, depth, length), width = query.shape, value.shape[2]
    check_floats(op, query, (n, heads, width, length), grad_output=grad_output)
    check_floats(op, query, (n, heads, depth, width), context=context)
    check_floats(op, query, (n, heads, 2, depth), statistics=statistics)
    opmath = opmath_dtype(query.dtype)
    for name, t, dtype in (
        ("grad_output", grad_output, query.dtype), ("context", context, opmath), ("statistics", statistics, opmath)
    ):  # fmt: skip
        require(op, t.dtype == dtype, f"{name} must be {dtype}, got {t.dtype}")


def linear_attention_fwd_fake(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, depth, length = query.shape
    opmath, width = opmath_dtype(query.dtype), value.shape[2]
    return (
        empty_in_order_of(query, (n, heads, width, length)),
        query.new_empty((n, heads, depth, width), dtype=opmath),
        query.new_empty((n, heads, 2, depth), dtype=opmath),
    )


def linear_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> Tensor:
    return linear_attention_fwd_fake(query, key, value, memory_key, memory_value, scale)[0]


def linear_attention_bwd_fake(
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
    grads = [empty_in_order_of(t, t.shape) for t in (query, key, value)]
    memories = [query.new_empty(0 if m is None else m.shape) for m in (memory_key, memory_value)]
    return grads[0], grads[1], grads[2], memories[0], memories[1]
