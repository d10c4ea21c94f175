"""`attention`: scaled dot-product attention that reads queries, keys and values wherever they lie."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import autocast_active, in_autocast_dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""Scaled dot-product attention, ``torch.nn.functional.scaled_dot_product_attention`` without dropout.

    .. math:: output = \mathrm{softmax}(scale \cdot query\,key^T + mask)\,value

    Args:
        query: [N, H, L, E]; float64, float32, bfloat16 or float16.
        key: [N, Hk, S, E]; Hk divides H, and each head of keys serves H / Hk neighbouring heads of queries.
        value: [N, Hk, S, Ev].
        attn_mask: broadcasts to [N, H, L, S]; boolean, True where a row may look at a key, or a number that is added to the score.
        is_causal: row i looks at keys 0 to i alone; not together with ``attn_mask``.
        scale: 1 / sqrt(E) unless given.

    Any strides are read in place: [N, L, H, E] transposed, slices of packed queries, keys and values, with the head dimension
    innermost or not. The statistics of the softmax are in float32 (float64 for float64 input). A row that may look at no key
    gives 0. Under autocast the arguments are cast as those of torch's function.

    Returns:
        [N, H, L, Ev] in the dtype of ``query``, dense, with the dimensions in memory in the order of those of ``query``: where that
        is [N, L, H, E] in memory, so is the output. Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor or of another dtype.
        ValueError: a shape does not fit, or ``attn_mask`` is given with ``is_causal``.

    Sources: Vaswani et al. 2017; Dao et al. 2022 (in blocks, without the matrix of scores); Ainslie et al. 2023 (shared heads).
    """
    _check_argument("query", query, query)
    _check_argument("key", key, query)
    _check_argument("value", value, query)
    n, heads, rows, depth = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if key.shape[0] != n or key.shape[3] != depth or (heads % kv_heads if kv_heads else heads):
        fail(
            "attention",
            f"key must be [N, Hk, S, E] with N = {n}, E = {depth} and Hk a divisor of {heads}, got {shape_of(key)}",
        )
    if value.shape[:3] != key.shape[:3]:
        fail("attention", f"value must be [N, Hk, S, Ev] = {tuple(key.shape[:3])} and Ev, got {shape_of(value)}")
    if attn_mask is not None:
        if is_causal:
            fail("attention", "attn_mask must not be given where is_causal is True")
        attn_mask = _expanded(attn_mask, query, (n, heads, rows, keys))
    if scale is None:
        scale = 1 / math.sqrt(depth) if depth else 1.0

    if autocast_active(query.device):
        query, key, value = (in_autocast_dtype(t) for t in (query, key, value))
        attn_mask = None if attn_mask is None else in_autocast_dtype(attn_mask)
    function = _forward
    if torch.is_grad_enabled() and _dispatch.needs_grad(query, key, value, attn_mask):
        function = _differentiable
    if foreign(query, key, value) or (attn_mask is not None and attn_mask.dtype != torch.bool and foreign(attn_mask)):
        function = in_float32("attention", function, query.dtype)
    elif key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(
            f"attention: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    return function(query, key, value, attn_mask, is_causal, float(scale))


_forward: Any = torch.ops.fastgen.attention.default


def _differentiable(*args: Any) -> Tensor:
    return apply(_Attention, *args)[0]


def _check_argument(name: str, t: Tensor, query: Tensor) -> None:
    check_floating("attention", name, t)
    if t.dim() != 4:
        fail("attention", f"{name} must be [N, H, L, E], got {shape_of(t)}")
    if t.device != query.device:
        fail("attention", f"{name} must be on the device of query ({query.device}), got {t.device}")


def _expanded(mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``mask`` as a view [N, H, L, S]."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention: attn_mask must be a boolean or floating-point tensor, got {got}")
    if mask.device != query.device:
        fail("attention", f"attn_mask must be on the device of query ({query.device}), got {mask.device}")
    if mask.dim() > 4 or any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False)):
        fail("attention", f"attn_mask must broadcast to {shape}, got {shape_of(mask)}")
    return mask.expand(shape)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.attention_fwd.default(query, key, value, attn_mask, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        query, key, value, attn_mask, ctx.is_causal, ctx.scale = inputs
        output, logsumexp = outputs
        ctx.mark_non_differentiable(logsumexp)
        ctx.set_materialize_grads(False)  # zeros for the gradient of logsumexp, which nobody reads
        ctx.save_for_backward(query, key, value, output, logsumexp, attn_mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # the output took no part in the loss
            return (None,) * 6
        *tensors, attn_mask = ctx.saved_tensors
        wants_scores = ctx.needs_input_grad[3]
        *grads, d_scores = torch.ops.fastgen.attention_bwd.default(
            grad_output, *tensors, attn_mask, ctx.is_causal, ctx.scale, wants_scores
        )
        return *grads, d_scores.to(attn_mask.dtype) if wants_scores else None, None, None
