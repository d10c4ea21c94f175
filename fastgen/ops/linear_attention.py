"""`linear_attention`: attention whose cost grows with the number of positions, not with its square, over the pixels of an image."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import autocast_active, in_autocast_dtype


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""Linear attention with a softmax over the features of each query and one over the positions of each feature of the keys.

    .. math:: output = scale \cdot C^T \mathrm{softmax}_D(query), \quad C = \mathrm{softmax}_S(key)\,value^T

    Args:
        query: [N, H, D, L]; float64, float32, bfloat16 or float16.
        key: [N, H, D, S].
        value: [N, H, E, S].
        memory_key, memory_value: [H, D, M] and [H, E, M], further keys and values before those of every sample; taken to the dtype
            of ``query``.
        scale: 1 / sqrt(D) unless given.

    Any strides are read in place: slices of a convolution's output [N, 3 H D, L], channels-last too.
    Sums and both softmaxes are in float32 (float64 for float64 input). Under autocast the arguments are cast as those of attention.

    Returns:
        [N, H, E, L] in the dtype of ``query``, dense, with the dimensions in memory in the order of those of ``query``.
        Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor or of another dtype.
        ValueError: a shape does not fit, or one memory is given without the other.

    Sources: Shen et al., "Efficient Attention: Attention with Linear Complexities", 2021; denoising-diffusion-pytorch.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check_argument(name, t, 4, "[N, H, D, L]", query)
    n, heads, depth, _ = query.shape
    if key.shape[:3] != query.shape[:3]:
        fail("linear_attention", f"key must be [N, H, D, S] = {tuple(query.shape[:3])} and S, got {shape_of(key)}")
    if value.shape[:2] != query.shape[:2] or value.shape[3] != key.shape[3]:
        wanted = f"[N, H, E, S] with N = {n}, H = {heads} and S = {key.shape[3]}"
        fail("linear_attention", f"value must be {wanted}, got {shape_of(value)}")
    if (memory_key is None) != (memory_value is None):
        fail("linear_attention", "memory_key and memory_value must be given together")
    if memory_key is not None and memory_value is not None:
        _check_argument("memory_key", memory_key, 3, "[H, D, M]", query)
        _check_argument("memory_value", memory_value, 3, "[H, E, M]", query)
        if memory_key.shape[:2] != (heads, depth):
            fail(
                "linear_attention", f"memory_key must be [H, D, M] = {(heads, depth)} and M, got {shape_of(memory_key)}"
            )
        shape = (heads, value.shape[2], memory_key.shape[2])
        if memory_value.shape != shape:
            fail("linear_attention", f"memory_value must have shape {shape}, got {shape_of(memory_value)}")
    if scale is None:
        scale = 1 / math.sqrt(depth) if depth else 1.0

    if autocast_active(query.device):
        query, key, value = (in_autocast_dtype(t) for t in (query, key, value))
    tensors = (query, key, value, memory_key, memory_value)
    if foreign(*tensors):
        return in_float32("linear_attention", _call, query.dtype)(*tensors, float(scale))
    if key.dtype != query.dtype or value.dtype != query.dtype:
        dtypes = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise TypeError(f"linear_attention: query, key and value must have one dtype, got {dtypes}")
    return _call(*tensors, float(scale))


def _check_argument(name: str, t: Tensor, dims: int, shape: str, query: Tensor) -> None:
    check_floating("linear_attention", name, t)
    if t.dim() != dims:
        fail("linear_attention", f"{name} must be {shape}, got {shape_of(t)}")
    if t.device != query.device:
        fail("linear_attention", f"{name} must be on the device of query ({query.device}), got {t.device}")


def _call(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, scale: float
) -> Tensor:
    if memory_key is not None and memory_value is not None:
        memory_key, memory_value = memory_key.to(query.dtype), memory_value.to(query.dtype)
    if torch.is_grad_enabled() and _dispatch.needs_grad(query, key, value, memory_key, memory_value):
        return apply(_LinearAttention, query, key, value, memory_key, memory_value, scale)[0]
    return torch.ops.fastgen.linear_attention.default(query, key, value, memory_key, memory_value, scale)


class _LinearAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastgen.linear_attention_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        _, context, statistics = outputs
        ctx.mark_non_differentiable(context, statistics)
        ctx.set_materialize_grads(False)  # zeros for the gradients of the statistics, which nobody reads
        ctx.save_for_backward(*tensors, context, statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # the output took no part in the loss
            return (None,) * 6
        grads = torch.ops.fastgen.linear_attention_bwd.default(grad_output, *ctx.saved_tensors, ctx.scale)
        return *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)), None
