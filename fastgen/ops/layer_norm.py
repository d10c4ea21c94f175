"""`layer_norm`: layer normalization with what a transformer puts around it, the residual add before and the modulation after."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_floating, check_like, fail, shape_of
from ._dtypes import foreign, in_float32


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Layer normalization, ``torch.nn.functional.layer_norm``, fused with the addition before it and the modulation after it.

    .. math:: s = gate \cdot input + residual, \qquad y = \mathrm{LN}(s) \cdot (1 + scale) + shift

    where LN subtracts the mean over the last dimensions, divides by the square root of the (biased) variance plus ``eps``,
    multiplies by ``weight`` and adds ``bias``. A transformer block needs both: ``x = x + attention(y); y = norm(x)`` is

        y, x = layer_norm(attention(y), x.shape[-1], weight, bias, residual=x)

    Args:
        input: [N, *, C], any strides; float64, float32, bfloat16 or float16.
        normalized_shape: the sizes of the last dimensions, or of the last one; their product is C below.
        weight, bias: of ``normalized_shape``.
        eps: added to the variance.
        residual: the shape of ``input``, which is added to it. Where the dtypes differ both are promoted first, as by ``+``.
        gate: [N, C], multiplies ``input`` before the addition, whatever lies between N and C (adaLN-Zero); needs ``residual``.
        scale, shift: [N, C], applied after the norm (adaLN).

    The small tensors may have any of the four dtypes; statistics and arithmetic are in float32 (float64 for float64 input). Under
    CUDA autocast float16 and bfloat16 are taken to float32 first, as torch's does.

    Returns:
        y, or with ``residual`` (y, s): both contiguous, of the shape and dtype of ``input``. Differentiable once in every tensor
        argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, or ``gate`` comes without ``residual``.

    Sources: Ba et al. 2016; Peebles and Xie 2023 (scale, shift and gate).
    """
    check_floating("layer_norm", "input", input)
    last = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    shape = input.shape
    if shape[-1:] != last and (not last or shape[-len(last) :] != last):
        fail(
            "layer_norm", f"normalized_shape must be the last sizes of input, got {last} and input of {shape_of(input)}"
        )
    if weight is not None:
        _check_param("weight", weight, last, input)
    if bias is not None:
        _check_param("bias", bias, last, input)
    if residual is not None:
        check_like("layer_norm", "residual", residual, input, "input")
    elif gate is not None:
        fail("layer_norm", "gate needs a residual, which the gated input is added to")
    # A call in inference mode costs some five microseconds in all: parameters that are not there cost one comparison.
    if gate is not None:
        _check_param("gate", gate, _per_sample(input, last), input)
    if scale is not None:
        _check_param("scale", scale, _per_sample(input, last), input)
    if shift is not None:
        _check_param("shift", shift, _per_sample(input, last), input)
    if len(last) > 1 or len(shape) == 1:
        return _over_one_dimension(input, last, weight, bias, eps, residual, gate, scale, shift)

    if input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64:
        input = input.float()
    function = _forward
    if torch.is_grad_enabled() and _dispatch.needs_grad(input, residual, gate, weight, bias, scale, shift):
        function = _differentiable
    if residual is not None and residual.dtype != input.dtype:
        function = _promoted(function)
    if foreign(input, residual, gate, weight, bias, scale, shift):
        function = in_float32("layer_norm", function, input.dtype)
    output, total = function(input, residual, gate, weight, bias, scale, shift, eps)
    return output if residual is None else (output, total)


def _per_sample(input: Tensor, last: tuple[int, ...]) -> tuple[int, int]:
    """[N, C] of ``input`` whose last dimensions make C."""
    if input.dim() <= len(last):
        fail("layer_norm", f"gate, scale and shift need input [N, *, C], got {shape_of(input)}")
    size = 1
    for n in last:
        size *= n
    return input.shape[0], size


def _check_param(name: str, param: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    check_floating("layer_norm", name, param)
    if param.shape != shape:
        fail("layer_norm", f"{name} must have shape {shape}, got {shape_of(param)} with input of {shape_of(input)}")
    if param.device != input.device:
        fail("layer_norm", f"{name} must be on the device of input ({input.device}), got {param.device}")


def _over_one_dimension(
    input: Tensor,
    last: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *per_sample: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The op with the dimensions ``last`` as one, and at least one before it."""

    def rows(t: Tensor) -> Tensor:
        t = t.flatten(-len(last))
        return t[None] if t.dim() == 1 else t

    weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    gate, scale, shift = per_sample
    flat = rows(input)
    results = layer_norm(
        flat, flat.shape[-1], weight, bias, eps, residual=None if residual is None else rows(residual), gate=gate,
        scale=scale, shift=shift,
    )  # fmt: skip
    if isinstance(results, Tensor):
        return results.reshape(input.shape)
    return results[0].reshape(input.shape), results[1].reshape(input.shape)


def _promoted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with input and residual in the dtype of their sum."""

    def call(input: Tensor, residual: Tensor, *rest: Any) -> Any:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        return function(input.to(dtype), residual.to(dtype), *rest)

    return call


_forward: Any = torch.ops.fastgen.layer_norm.default


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    return apply(_LayerNorm, *args)[:2]


class _LayerNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.fastgen.layer_norm_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        input, residual, gate, weight, bias, scale, shift, _ = inputs
        _, total, mean, rstd = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((total, mean, rstd) if residual is None else (mean, rstd)))
        ctx.save_for_backward(
            input if residual is None else total, mean, rstd, None if gate is None else input, gate, weight, bias, scale, shift
        )  # fmt: skip
        ctx.has_residual = residual is not None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        normalized, *saved = ctx.saved_tensors
        if not ctx.has_residual:
            grad_sum = None
        if grad_output is None:
            if grad_sum is None:  # the output took no part in the loss
                return (None,) * 8
            grad_output = torch.zeros_like(normalized)
        in_sum, in_branch, *in_params = torch.ops.fastgen.layer_norm_bwd.default(
            grad_output, grad_sum, normalized, *saved
        )
        _, _, _, *params = saved
        params_grads = [None if p is None else g.to(p.dtype) for p, g in zip(params, in_params, strict=True)]
        in_input = in_sum if params[0] is None else in_branch
        return in_input, in_sum if ctx.has_residual else None, *params_grads, None
