"""What `attention` means, in plain torch: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1; heads of keys shared by
several of queries as in Ainslie et al., "GQA", 2023. The backward recomputes the scores from their logsumexp (Dao et al. 2022)."""

import math

import torch
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import copy_in_order_of, empty_in_order_of, opmath_dtype


def _scores(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """scale query key^T + mask [N, H, L, S] of heads that are as many in both."""
    scores = scale * (query @ key.mT)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """exp(scores - logsumexp), 0 in rows that see no key."""
    return torch.exp(scores - logsumexp.masked_fill(logsumexp == -math.inf, 0)[..., None])


def _shared(t: Tensor, heads: int) -> Tensor:
    """[N, Hk, S, E] -> [N, H, S, E], each head given to H / Hk neighbours; in the dtype of the arithmetic."""
    wide = t.to(opmath_dtype(t.dtype))
    return wide if t.shape[1] == heads else wide.repeat_interleave(heads // t.shape[1], dim=1)


def _summed(t: Tensor, heads: int) -> Tensor:
    """[N, H, S, E] -> [N, Hk, S, E]: the gradient of :func:`_shared`."""
    return t if t.shape[1] == heads else t.unflatten(1, (heads, -1)).sum(2)


def attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (output [N, H, L, Ev], logsumexp of the scores [N, H, L] in fp32, or fp64 for fp64 input, -inf without keys)."""
    heads = query.shape[1]
    q, k, v = (_shared(t, heads) for t in (query, key, value))
    scores = _scores(q, k, attn_mask, is_causal, scale)
    logsumexp = torch.logsumexp(scores, -1)
    return copy_in_order_of(_weights(scores, logsumexp) @ v, query), logsumexp


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The output alone."""
    return attention_fwd(query, key, value, attn_mask, is_causal, scale)[0]


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
    """With P the weights and D_i = sum_e dO_ie O_ie: dV = P^T dO, dS = P (dO V^T - D), dQ = scale dS K, dK = scale dS^T Q."""
    heads, kv_heads = query.shape[1], key.shape[1]
    q, k, v, grad, out = (_shared(t, heads) for t in (query, key, value, grad_output, output))
    weights = _weights(_scores(q, k, attn_mask, is_causal, scale), logsumexp)
    d_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    d_key, d_value = (_summed(t, kv_heads) for t in (scale * (d_scores.mT @ q), weights.mT @ grad))
    return (
        copy_in_order_of(scale * (d_scores @ k), query),
        copy_in_order_of(d_key, key),
        copy_in_order_of(d_value, value),
        d_scores if wants_scores else d_scores.new_empty(0),
    )


def _check(op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_main(op, name, t, dims=4)
        require(op, t.dim() == 4, f"{name} must be [N, H, L, E], got shape {tuple(t.shape)}")
        require(op, t.dtype == query.dtype, f"{name} must have the dtype of query, got {t.dtype}")
    n, heads, rows, depth = query.shape
    kv_heads, keys = key.shape[1:3]
    check_floats(op, query, (n, kv_heads, keys, depth), key=key)
    check_floats(op, query, (n, kv_heads, keys, value.shape[3]), value=value)
    divides = heads % kv_heads == 0 if kv_heads >= 1 else heads == 0
    require(op, divides, f"the heads of key must divide those of query, got {kv_heads} and {heads}")
    if attn_mask is not None:
        fits = tuple(attn_mask.shape) == (n, heads, rows, keys) and attn_mask.device == query.device
        require(op, fits, f"attn_mask must be {(n, heads, rows, keys)} on {query.device}, got {tuple(attn_mask.shape)}")
        known = attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
        require(op, known, f"attn_mask must be boolean or floating-point, got {attn_mask.dtype}")


def attention_check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> None:
    _check("attention", query, key, value, attn_mask)


attention_fwd_check = attention_check


def attention_bwd_check(
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
) -> None:
    _check("attention_bwd", query, key, value, attn_mask)
    check_floats("attention_bwd", query, (*query.shape[:3], value.shape[3]), grad_output=grad_output, output=output)
    check_floats("attention_bwd", query, tuple(query.shape[:3]), logsumexp=logsumexp)
    for name, t, dtype in (
        ("grad_output", grad_output, query.dtype),
        ("output", output, query.dtype),
        ("logsumexp", logsumexp, opmath_dtype(query.dtype)),
    ):
        require("attention_bwd", t.dtype == dtype, f"{name} must be {dtype}, got {t.dtype}")


def attention_fwd_fake(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    return output, query.new_empty(query.shape[:3], dtype=opmath_dtype(query.dtype))


def attention_fake(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    return attention_fwd_fake(query, key, value, attn_mask, is_causal, scale)[0]


def attention_bwd_fake(
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
    grads = [empty_in_order_of(t, t.shape) for t in (query, key, value)]
    d_scores = logsumexp.new_empty((*query.shape[:3], key.shape[2]) if wants_scores else 0)
    return grads[0], grads[1], grads[2], d_scores
