"""`rms_norm`: root-mean-square normalization, of tokens or over the channels of images, with modulation and activation after it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import ACTIVATIONS
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32

_ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int] | None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    min_norm: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Root-mean-square normalization, fused with the modulation and activation after it.

    .. math::

        y = act\Big(\frac{input}{r} \cdot weight \cdot (1 + scale) + shift\Big), \qquad
        r = \max\big(\sqrt{\mathrm{mean}(input^2) + eps},\; min\_norm / \sqrt{C}\big)

    with the mean over the C elements of the last dimensions, or over the channels. Both conventions there are come out of it:

        rms_norm(x, x.shape[-1], weight, eps)                     # torch.nn.functional.rms_norm
        rms_norm(x, None, g, eps=0.0, min_norm=1e-12)             # F.normalize(x, dim=1) * g * sqrt(C), denoising-diffusion-pytorch

    Args:
        input: [N, *, C], or [N, C, *spatial] for the channels, any strides; float64, float32, bfloat16 or float16.
        normalized_shape: the sizes of the last dimensions, or of the last one; None: the channels, dimension 1.
        weight: of ``normalized_shape``; for the channels [C] or [1, C, 1, ...].
        eps: added to the mean square; None: the machine epsilon of the arithmetic (that of float32 but for float64), as in torch.
        min_norm: the least Euclidean norm that is divided by, the ``eps`` of ``torch.nn.functional.normalize``.
        scale, shift: [N, C], applied after the norm.
        activation: None or ``"silu"``.

    The small tensors may have any of the four dtypes; arithmetic is in float32 (float64 for float64 input).

    Returns:
        A tensor of the shape and dtype of ``input``; over the channels channels-last if ``input`` is, else contiguous.
        Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, ``min_norm`` is negative, or ``activation`` is not known.

    Sources: Zhang and Sennrich 2019; denoising-diffusion-pytorch (over channels).
    """
    check_floating("rms_norm", "input", input)
    code = _ACTIVATION_CODE.get(activation)
    if code is None:
        raise ValueError(f"rms_norm: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not min_norm >= 0:
        fail("rms_norm", f"min_norm must not be negative, got {min_norm}")
    shape = input.shape
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    if normalized_shape is None:
        if input.dim() < 2:
            fail("rms_norm", f"input must be [N, C, *spatial] where normalized_shape is None, got {shape_of(input)}")
        rows, channels = input, shape[1]
        sizes: tuple[int, ...] = (channels,)
        if isinstance(weight, Tensor) and weight.shape == (1, channels, *[1] * (weight.dim() - 2)):
            weight = weight.flatten()
    else:
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not sizes or shape[-len(sizes) :] != sizes:
            fail(
                "rms_norm",
                f"normalized_shape must be the last sizes of input, got {sizes} and input of {shape_of(input)}",
            )
        rows, channels = input, math.prod(sizes)
    if weight is not None:
        _check_param("weight", weight, sizes, input)
    if scale is not None:
        _check_param("scale", scale, (shape[0], channels), input)
    if shift is not None:
        _check_param("shift", shift, (shape[0], channels), input)
    if normalized_shape is not None and (len(sizes) > 1 or input.dim() == 1):
        weight, rows = None if weight is None else weight.flatten(), input.flatten(-len(sizes))
        if rows.dim() == 1:
            rows = rows[None]

    function = _forward
    if torch.is_grad_enabled() and _dispatch.needs_grad(input, weight, scale, shift):
        function = _differentiable
    if foreign(input, weight, scale, shift):
        function = in_float32("rms_norm", function, input.dtype)
    output = function(rows, normalized_shape is None, weight, scale, shift, eps, min_norm, code)
    return output if rows is input else output.reshape(shape)


def _check_param(name: str, param: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    check_floating("rms_norm", name, param)
    if param.shape != shape:
        fail("rms_norm", f"{name} must have shape {shape}, got {shape_of(param)} with input of {shape_of(input)}")
    if param.device != input.device:
        fail("rms_norm", f"{name} must be on the device of input ({input.device}), got {param.device}")


_forward: Any = torch.ops.fastgen.rms_norm.default


def _differentiable(*args: Any) -> Tensor:
    return apply(_RMSNorm, *args)[0]


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.rms_norm_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        input, ctx.over_channels, weight, scale, shift, _, ctx.min_norm, ctx.activation = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)  # zeros for the gradient of rstd, which nobody reads
        ctx.save_for_backward(input, outputs[1], weight, scale, shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # the output took no part in the loss
            return (None,) * 8
        input, rstd, *params = ctx.saved_tensors
        in_input, *in_params = torch.ops.fastgen.rms_norm_bwd.default(
            grad_output, input, rstd, ctx.over_channels, *params, ctx.min_norm, ctx.activation
        )
        grads = [None if p is None else g.to(p.dtype) for p, g in zip(params, in_params, strict=True)]
        return in_input, None, *grads, None, None, None
