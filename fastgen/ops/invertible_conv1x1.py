"""`invertible_conv1x1`: a square matrix over the channels, with the actnorm before it, its inverse and its log-determinant."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import transforms_active

_OP = "invertible_conv1x1"
_ORDERS = ("scale_shift", "shift_scale")
_OWN_CHANNELS = 128  # up to which one thread's elimination stays in the cache


def invertible_conv1x1(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    log_scale: bool = False,
    order: str = "scale_shift",
    inverse: bool = False,
) -> Tensor:
    r"""A convolution with a square kernel [C, C] of one pixel, and the actnorm before it in the same pass.

    .. math:: y = W (s \odot x + t) + b \quad\text{or}\quad y = W ((x + t) \odot s) + b

    One read and one write of x. The inverse of W is found in float64 and rounded once.

    Args:
        input: [N, C, *], any strides; float64, float32, bfloat16 or float16.
        weight: W, [C, C].
        scale, shift: s, or its logarithm where ``log_scale``, and t of an actnorm before the matrix, [C]; None: 1 and 0.
        bias: b, [C].
        log_scale: whether ``scale`` is log s.
        order: ``"scale_shift"`` is x s + t, ``"shift_scale"`` is (x + t) s, as :func:`actnorm` has them.
        inverse: x of y.

    The small tensors may have any of the four dtypes; arithmetic is in float32 (float64 for float64 input).

    Returns:
        A tensor of the shape and dtype of ``input``, channels-last if that is, else contiguous. Differentiable once in every
        tensor argument. For the log-determinant see :func:`invertible_conv1x1_log_det`.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, ``order`` is not known, or, on the CPU, ``weight`` is singular where its
            inverse is wanted; on a GPU, where to look would be to wait, the output is not finite then.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, section 3.2.
    """
    if order not in _ORDERS:
        fail(_OP, f"order must be one of {_ORDERS}, got {order!r}")
    _check(input, weight, scale=scale, shift=shift, bias=bias)
    if log_scale and scale is not None:
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32)).exp()
    shift_first = order == "shift_scale"
    if inverse:
        weight = inverse_of(weight)
        after = None if shift is None else -shift
        if scale is not None:
            weight = weight / scale[:, None]
            after = after if after is None or shift_first else after / scale
        scale, shift, bias = None, None if bias is None else -bias, after
    function = _differentiable if _dispatch.needs_grad(input, weight, scale, shift, bias) else _forward
    if foreign(input, weight, scale, shift, bias):
        function = in_float32(_OP, function, input.dtype)
    output: Tensor = function(input, weight, scale, shift, bias, shift_first)
    return output


def invertible_conv1x1_log_det(
    input: Tensor, weight: Tensor, scale: Tensor | None = None, *, log_scale: bool = False, inverse: bool = False
) -> Tensor:
    r"""The log-determinant of :func:`invertible_conv1x1`, from the small tensors alone.

    .. math:: positions \cdot \big(\log |\det W| + \sum_c \log |s_c|\big)

    Args:
        input: [N, C, *], of which the sizes count alone.
        weight: W, [C, C].
        scale: s, or its logarithm where ``log_scale``, [C]; None: 1.
        inverse: of the inverse, the negative.

    Returns:
        [N] in float32 (float64 for float64 input), -inf of a singular matrix; computed in float64. Differentiable once in
        ``weight`` and ``scale``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit.
    """
    _check(input, weight, scale=scale)
    if _has_own_log_det(weight, scale):
        positions = math.prod(input.shape[2:]) * (-1 if inverse else 1)
        arguments = (weight, scale, log_scale, input.shape[0], positions, input.dtype == torch.float64)
        if _dispatch.needs_grad(weight, scale):
            return apply(_LogDet, *arguments)[0]  # type: ignore[no-any-return]
        return _log_det(*arguments, False)[0]  # type: ignore[no-any-return]
    total = torch.linalg.slogdet(weight.double()).logabsdet
    if scale is not None:
        total = total + (scale.double() if log_scale else scale.double().abs().log()).sum()
    total = total * (math.prod(input.shape[2:]) * (-1 if inverse else 1))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return total.to(dtype).expand(input.shape[0])


def _has_own_log_det(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether the op has it: of a matrix as a Glow has them, which the library's many calls take longer over. The compiler and
    transforms look at plain torch."""
    small = weight.is_cpu and weight.shape[0] <= _OWN_CHANNELS and not foreign(weight, scale)
    return small and not torch.compiler.is_compiling() and not transforms_active()


def inverse_of(weight: Tensor) -> Tensor:
    """The inverse of ``weight`` [C, C], found in float64, in the dtype of ``weight`` (float32 for bfloat16 and float16).

    Raises:
        ValueError: on the CPU, where ``weight`` is singular.
    """
    result = torch.linalg.inv_ex(weight.double())
    plain = weight.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()
    if plain and result.info.any():
        fail(_OP, f"weight of {shape_of(weight)} is singular: it has no inverse")
    inverse: Tensor = result.inverse.to(torch.promote_types(weight.dtype, torch.float32))
    return inverse


def _check(input: Tensor, weight: Tensor, **params: Tensor | None) -> None:
    check_floating(_OP, "input", input)
    if input.dim() < 2:
        fail(_OP, f"input must be [N, C, *], got {shape_of(input)}")
    c = input.shape[1]
    for name, param, shape, words in (
        ("weight", weight, (c, c), "[C, C]"), *((name, p, (c,), "[C]") for name, p in params.items())
    ):  # fmt: skip
        if param is None and name != "weight":
            continue
        check_floating(_OP, name, param)  # type: ignore[arg-type]
        assert param is not None
        if param.shape != shape:
            fail(_OP, f"{name} must be {words} with C = {c}, got {shape_of(param)}")
        if param.device != input.device:
            fail(_OP, f"{name} must be on the device of input ({input.device}), got {param.device}")


_forward: Any = torch.ops.fastgen.invertible_conv1x1_fwd.default
_log_det: Any = torch.ops.fastgen.invertible_conv1x1_log_det.default


def _differentiable(*args: Any) -> Any:
    return apply(_InvertibleConv1x1, *args)


class _InvertibleConv1x1(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.fastgen.invertible_conv1x1_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.shift_first = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *small = ctx.saved_tensors
        weight, scale, shift, _ = small
        in_input, *in_small = torch.ops.fastgen.invertible_conv1x1_bwd.default(
            grad_output, input, weight, scale, shift, ctx.shift_first
        )
        grads = [None if p is None else g.to(p.dtype) for p, g in zip(small, in_small, strict=True)]
        return in_input, *grads, None


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _log_det(*args, True)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, scale, ctx.log_scale, _, ctx.positions, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], scale)
        ctx.dtype = weight.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_det: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inverse, scale = ctx.saved_tensors
        grad = grad_log_det.sum()
        in_weight = (inverse * grad).to(ctx.dtype)
        in_scale = None
        if scale is not None:
            of_log = grad * ctx.positions
            in_scale = (of_log.expand_as(scale) if ctx.log_scale else of_log / scale).to(scale.dtype)
        return in_weight, in_scale, None, None, None, None
