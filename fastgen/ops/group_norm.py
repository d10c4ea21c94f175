"""`group_norm`: group normalization with everything a U-Net puts around it, in one pass over memory."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import ACTIVATIONS
from ._autograd import apply
from ._check import check_skip, fail, shape_of
from ._dtypes import foreign, in_float32

_ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Group normalization, fused with the bias before it and the modulation and activation after it.

    .. math:: y = act\big(\mathrm{GN}(input + channel\_bias) \cdot (1 + scale) + shift\big)

    where GN subtracts the mean of each of ``num_groups`` groups of channels, divides by the square root of its (biased)
    variance plus ``eps``, multiplies by ``weight`` and adds ``bias``.

    Args:
        input: [N, C, *spatial] with 0 to 3 spatial dimensions, any strides; float64, float32, bfloat16 or float16.
        num_groups: divides C.
        weight, bias: [C].
        eps: added to the variance.
        skip: [N, C', *spatial], a second input: what is normalised is ``cat([input, skip], 1)``, which nobody makes; C is then the
            channels of both, here and below.
        channel_bias: [N, C], added to the input before the statistics (the time embedding of a ResBlock).
        scale, shift: [N, C], applied after the norm (adaptive group normalization).
        activation: None or ``"silu"``.

    The small tensors may have any of the four dtypes; statistics and arithmetic are in float32 (float64 for float64 input).
    Under CUDA autocast the output of a float16 or bfloat16 input is float32, as that of ``torch.nn.functional.group_norm``,
    without a float32 copy of the input; under CPU autocast it has the input's dtype. Two inputs of different dtypes are taken in
    the wider one, as ``cat`` takes them; one that lies in another order than ``input`` is copied.

    Returns:
        A tensor of the shape and (but for CUDA autocast) dtype of ``input``, or of both in one, channels-last if ``input`` is, else
        contiguous. Differentiable once in every tensor argument; the gradients of two inputs are slices of one tensor.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape does not fit, ``num_groups`` does not divide C, or ``activation`` is not known.

    Sources: Wu and He 2018 (group normalization); Dhariwal and Nichol 2021, section 4 (scale and shift).
    """
    code = _ACTIVATION_CODE.get(activation)
    if code is None:
        raise ValueError(f"group_norm: activation must be one of {ACTIVATIONS}, got {activation!r}")
    shape: Sequence[int] = input.shape if isinstance(input, Tensor) else ()
    if skip is not None:
        input, skip = check_skip("group_norm", input, skip)
        shape = (shape[0], shape[1] + skip.shape[1], *shape[2:])
    if not 2 <= len(shape) <= 5 or num_groups < 1 or shape[1] % num_groups or not input.is_floating_point():
        _refuse_input(input, num_groups, shape)
    n, c = shape[0], shape[1]
    # A call in inference mode costs some five microseconds in all: parameters that are not there cost one comparison.
    if weight is not None:
        _check_param("weight", weight, (c,), input)
    if bias is not None:
        _check_param("bias", bias, (c,), input)
    if channel_bias is not None:
        _check_param("channel_bias", channel_bias, (n, c), input)
    if scale is not None:
        _check_param("scale", scale, (n, c), input)
    if shift is not None:
        _check_param("shift", shift, (n, c), input)

    wide = input.is_cuda and torch.is_autocast_enabled("cuda")
    function = _forward_wide if wide else _forward
    if torch.is_grad_enabled() and _dispatch.needs_grad(input, skip, weight, bias, channel_bias, scale, shift):
        function = _differentiable_wide if wide else _differentiable
    if foreign(input, skip, weight, bias, channel_bias, scale, shift):
        function = in_float32("group_norm", function, torch.float32 if wide else input.dtype)
    return function(input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, code)


_forward: Any = torch.ops.fastgen.group_norm.default


def _forward_wide(*args: Any) -> Tensor:
    return torch.ops.fastgen.group_norm_wide_fwd.default(*args)[0]


def _differentiable(*args: Any) -> Tensor:
    return apply(_GroupNorm, *args, False)[0]


def _differentiable_wide(*args: Any) -> Tensor:
    return apply(_GroupNorm, *args, True)[0]


def _refuse_input(input: Tensor, num_groups: int, shape: Sequence[int]) -> NoReturn:
    if not isinstance(input, Tensor):
        raise TypeError(f"group_norm: input must be a tensor, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"group_norm: input must have a floating-point dtype, got {input.dtype}")
    if not 2 <= input.dim() <= 5:
        fail("group_norm", f"input must be [N, C, *spatial] with 0 to 3 spatial dimensions, got {shape_of(input)}")
    given = f"num_groups={num_groups} and input of shape {tuple(shape)}"
    fail("group_norm", f"num_groups must divide channels, got {given}")


def _check_param(name: str, param: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"group_norm: {name} must be a tensor or None, got {type(param).__name__}")
    if not param.is_floating_point():
        raise TypeError(f"group_norm: {name} must have a floating-point dtype, got {param.dtype}")
    if param.shape != shape:
        fail("group_norm", f"{name} must have shape {shape}, got {shape_of(param)} with input of {shape_of(input)}")
    if param.device != input.device:
        fail("group_norm", f"{name} must be on the device of input ({input.device}), got {param.device}")


class _GroupNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        skip: Tensor | None,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        activation: int,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.fastgen.group_norm_wide_fwd if wide else torch.ops.fastgen.group_norm_fwd
        return op.default(input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, skip, ctx.num_groups, weight, bias, channel_bias, scale, shift, _, ctx.activation, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # zeros for the gradients of mean and rstd, which nobody reads
        ctx.save_for_backward(input, skip, mean, rstd, weight, bias, channel_bias, scale, shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # the output took no part in the loss
            return (None,) * 11
        input, skip, mean, rstd, *params = ctx.saved_tensors
        grads = torch.ops.fastgen.group_norm_bwd.default(
            grad_output, input, skip, mean, rstd, ctx.num_groups, *params, ctx.activation
        )
        params_grads = [None if p is None else g.to(p.dtype) for p, g in zip(params, grads[1:], strict=True)]
        seam = input.shape[1]
        in_input, in_skip = (grads[0], None) if skip is None else (grads[0][:, :seam], grads[0][:, seam:])
        return in_input, in_skip, None, *params_grads, None, None, None
