"""`gated_activation`: half of the channels gated by the sigmoid of the other half, with a condition added before."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import GATED_ACTIVATIONS
from ..reference._layout import opmath_dtype
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32

_CODE = {name: code for code, name in enumerate(GATED_ACTIVATIONS)}


def gated_activation(input: Tensor, condition: Tensor | None = None, *, activation: str = "tanh") -> Tensor:
    r"""The gated unit of PixelCNN, WaveNet and what came of them, with the condition before it.

    .. math:: output = act(a + c_a) \cdot \sigma(b + c_b), \quad (a, b) = input, \; (c_a, c_b) = condition

    both halves along the channels, which are read where they are. Kept for the backward are the inputs alone.

    Args:
        input: [N, 2 C, *spatial], C >= 1, any strides; float64, float32, bfloat16 or float16.
        condition: [N, 2 C], one a channel, or [N, 2 C, *spatial], where a spatial size may be 1; any of the four dtypes.
        activation: ``"tanh"`` (Gated PixelCNN, WaveNet, DiffWave) or ``"identity"`` (PixelCNN++, PixelSNAIL).

    Arithmetic is in float32 (float64 for float64 input).

    Returns:
        [N, C, *spatial] in the dtype of ``input``; channels-last if ``input`` is, else contiguous. Differentiable once in both
        tensors; the gradient of a condition a channel is summed in float32 (float64).

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, or ``activation`` is not known; the message names the argument.

    Sources: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" and "WaveNet", 2016; Salimans et al.,
    "PixelCNN++", 2017.
    """
    code = _CODE.get(activation)
    if code is None:
        fail("gated_activation", f"activation must be one of {GATED_ACTIVATIONS}, got {activation!r}")
    check_floating("gated_activation", "input", input)
    if input.dim() < 2 or input.shape[1] % 2 or input.shape[1] < 2:
        fail("gated_activation", f"input must be [N, 2 C, *spatial] with C >= 1, got {shape_of(input)}")
    if condition is not None:
        condition = _fitted(condition, input)
    function = _differentiable if _dispatch.needs_grad(input, condition) else _forward
    if foreign(input, condition):
        function = in_float32("gated_activation", function, input.dtype)
    output: Tensor = function(input, condition, code)
    return output


def _fitted(condition: Tensor, input: Tensor) -> Tensor:
    """``condition`` as [N, 2 C], or [N, 2 C, *spatial] that broadcasts over ``input``."""
    check_floating("gated_activation", "condition", condition)
    if condition.device != input.device:
        fail(
            "gated_activation",
            f"condition must be on the device of input ({input.device}), got {condition.device}",
        )
    shape, wanted = condition.shape, input.shape
    if shape == wanted[:2]:
        return condition
    sizes = zip(shape, wanted, strict=False)
    if len(shape) != len(wanted) or shape[:2] != wanted[:2] or any(n not in (1, size) for n, size in sizes):
        fail(
            "gated_activation",
            "condition must be [N, 2 C], or [N, 2 C, *spatial] with the sizes of input or 1, got "
            f"{shape_of(condition)} with input of {shape_of(input)}",
        )
    return condition.flatten(1) if all(n == 1 for n in shape[2:]) else condition


def _spread(condition: Tensor | None, input: Tensor) -> Tensor | None:
    """``condition`` as the raw ops take it: [N, 2 C], or of the shape of ``input``."""
    if condition is None or condition.dim() == 2 or condition.shape == input.shape:
        return condition
    return condition.expand(input.shape)


def _forward(input: Tensor, condition: Tensor | None, code: int) -> Any:
    return torch.ops.fastgen.gated_activation_fwd.default(input, _spread(condition, input), code)


def _differentiable(*args: Any) -> Any:
    return apply(_GatedActivation, *args)


class _GatedActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, condition, ctx.activation = inputs
        ctx.save_for_backward(input, condition)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, condition = ctx.saved_tensors
        in_input, in_condition = torch.ops.fastgen.gated_activation_bwd.default(
            grad_output, input, _spread(condition, input), ctx.activation
        )
        if condition is None or not ctx.needs_input_grad[1]:
            return in_input, None, None
        if condition.dim() > 2:
            in_condition = _sum_to(in_input, condition)
        return in_input, in_condition.to(condition.dtype), None


def _sum_to(grad: Tensor, condition: Tensor) -> Tensor:
    """``grad`` summed over the dimensions in which ``condition`` has one for all. Halves are added to halves, in float32 (float64):
    in torch's own sums the order depends on the number of threads."""
    for dim in range(2, grad.dim()):
        if condition.shape[dim] == grad.shape[dim]:
            continue
        total = grad.to(opmath_dtype(grad.dtype))
        while (size := total.shape[dim]) > 1:
            first, second, rest = total.split([size // 2, size // 2, size % 2], dim)
            total = torch.cat([first + second, rest], dim) if size % 2 else first + second
        grad = total if size else total.sum(dim, keepdim=True)
    return grad
