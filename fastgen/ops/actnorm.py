"""`actnorm`: a scale and a shift a channel with their log-determinant, and the statistics that initialise them."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32

_ORDERS = ("scale_shift", "shift_scale")


def actnorm(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    log_scale: bool = False,
    order: str = "scale_shift",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Activation normalization: a scale s and a shift t a channel, and the log-determinant of the map.

    .. math::

        y = x s + t \quad\text{or}\quad y = (x + t) s, \qquad \log\left|\det\frac{\partial y}{\partial x}\right| =
        positions \cdot \sum_c \log |s_c|

    with the number of positions of an image, one of a vector. One read and one write of x. The conventions there are:

        actnorm(x, log_scale, shift, log_scale=True)                        # nflows; normflows with its two names
        actnorm(x, scale, loc, order="shift_scale")                         # Glow ports: (x + bias) * scale
        actnorm(x, log_scale, bias, log_scale=True, order="shift_scale")    # (x + bias) * exp(logs)

    Args:
        input: [N, C, *], any strides; float64, float32, bfloat16 or float16.
        scale: [C], not 0; its logarithm where ``log_scale``.
        shift: [C].
        log_scale: whether ``scale`` is log s.
        order: ``"scale_shift"`` is x s + t, ``"shift_scale"`` is (x + t) s; the inverse undoes the same form.
        inverse: x of y, and the log-determinant of the inverse, the negative.

    The small tensors may have any of the four dtypes; arithmetic is in float32 (float64 for float64 input).

    Returns:
        (output, log_det): the former of the shape and dtype of ``input``, channels-last if that is, else contiguous; the latter
        [N] in float32 (float64 for float64 input). Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, or ``order`` is not known; the message names the argument.
        RuntimeError: on the CPU, a scale is 0; on a GPU, where to look would be to wait, its log-determinant is infinite.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, section 3.1.
    """
    if order not in _ORDERS:
        fail("actnorm", f"order must be one of {_ORDERS}, got {order!r}")
    check_floating("actnorm", "input", input)
    if input.dim() < 2:
        fail("actnorm", f"input must be [N, C, *], got {shape_of(input)}")
    for name, param in (("scale", scale), ("shift", shift)):
        check_floating("actnorm", name, param)
        if param.shape != input.shape[1:2]:
            fail("actnorm", f"{name} must be [C] with C = {input.shape[1]}, got {shape_of(param)}")
        if param.device != input.device:
            fail("actnorm", f"{name} must be on the device of input ({input.device}), got {param.device}")
    function = _differentiable if _dispatch.needs_grad(input, scale, shift) else _forward
    if foreign(input, scale, shift):
        function = _rounded(in_float32("actnorm", function), input.dtype)
    output: tuple[Tensor, Tensor] = function(input, scale, shift, log_scale, order == "shift_scale", inverse)
    return output


def actnorm_statistics(input: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each channel over samples and positions, for the initialisation of :func:`actnorm`.

    One read of the input, merged block by block (Chan, Golub and LeVeque 1979), so that a mean of 1e4 costs no digit of a
    deviation of 1. With them ``scale = 1 / (deviation + eps)`` and ``shift = -mean * scale`` give each channel mean 0 and
    deviation 1.

    Args:
        input: [N, C, *], any strides; float64, float32, bfloat16 or float16.
        correction: 1 divides by the number of elements less one, as ``torch.std`` does, 0 by their number.

    Returns:
        (mean, deviation), each [C] in float32 (float64 for float64 input); NaN of no element, or of a deviation of one with
        ``correction`` 1. There is no gradient in them.

    Raises:
        TypeError: ``input`` is no tensor, or not of a floating-point dtype.
        ValueError: ``input`` is not [N, C, *], or ``correction`` neither 0 nor 1.
    """
    check_floating("actnorm_statistics", "input", input)
    if input.dim() < 2:
        fail("actnorm_statistics", f"input must be [N, C, *], got {shape_of(input)}")
    if correction not in (0, 1):
        fail("actnorm_statistics", f"correction must be 0 or 1, got {correction}")
    function: Any = torch.ops.fastgen.actnorm_statistics.default
    if foreign(input):
        function = in_float32("actnorm_statistics", function)
    mean, deviation = function(input.detach(), correction)
    return mean, deviation


def _rounded(function: Any, dtype: torch.dtype) -> Any:
    """``function`` with its output, but not its log-determinant, in ``dtype``."""

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        output, log_det = function(*args)
        return output.to(dtype), log_det

    return call


_forward: Any = torch.ops.fastgen.actnorm_fwd.default


def _differentiable(*args: Any) -> Any:
    return apply(_ActNorm, *args)


class _ActNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.actnorm_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.log_scale, ctx.shift_first, ctx.inverse = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        input, scale, shift = ctx.saved_tensors
        if grad_output is None:  # the loss takes the log-determinant alone
            grad_output = torch.zeros_like(input)
        d_input, d_scale, d_shift = torch.ops.fastgen.actnorm_bwd.default(
            grad_output, grad_log_det, input, scale, shift, ctx.log_scale, ctx.shift_first, ctx.inverse
        )
        return d_input, d_scale.to(scale.dtype), d_shift.to(shift.dtype), None, None, None
