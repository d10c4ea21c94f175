"""`squeeze`: blocks of neighbouring pixels as channels, and back, in one copy."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import SQUEEZE_ORDERS
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32


def squeeze(input: Tensor, factor: int = 2, *, inverse: bool = False, order: str = "channel_major") -> Tensor:
    r"""Blocks of f x f pixels as channels: [N, C, H, W] to [N, C f^2, H / f, W / f]; a permutation, so its log-determinant is 0.

    The pixel (i, j) of a block of channel c becomes channel

    ==================  =========================================================================================
    ``order``           channel
    ==================  =========================================================================================
    ``channel_major``   c f^2 + i f + j: ``F.pixel_unshuffle``; nflows, normflows, Glow and its ports, FrEIA
    ``space_major``     (i f + j) C + c: TensorFlow's ``space_to_depth``; FrEIA's legacy i-RevNet
    ``checkerboard``    k C + c with k = 0, 2, 3, 1 at (0, 0), (0, 1), (1, 0), (1, 1): the first half of the channels is one
                        diagonal of each block, the second the other; RealNVP, before it splits; f = 2
    ==================  =========================================================================================

    Args:
        input: [N, C, H, W], any strides; float64, float32, bfloat16 or float16.
        factor: f; divides H and W, its square C for the inverse.
        inverse: channels back into pixels.
        order: one of the three.

    Returns:
        A tensor of the dtype of ``input``, channels-last if that is, else contiguous. Its backward is the other direction.

    Raises:
        TypeError: ``input`` is no tensor, or not of a floating-point dtype.
        ValueError: ``input`` is no image or ``factor`` does not divide it, or ``order`` is not known or has another factor.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", 2017, section 3.6.
    """
    check_floating("squeeze", "input", input)
    if order not in SQUEEZE_ORDERS:
        fail("squeeze", f"order must be one of {SQUEEZE_ORDERS}, got {order!r}")
    if input.dim() != 4:
        fail("squeeze", f"input must be [N, C, H, W], got {shape_of(input)}")
    if factor < 1:
        fail("squeeze", f"factor must be positive, got {factor}")
    if order == "checkerboard" and factor != 2:
        fail("squeeze", f"factor must be 2 where order is 'checkerboard', got {factor}")
    _, c, h, w = input.shape
    if inverse and c % factor**2:
        fail("squeeze", f"factor squared must divide the channels of input, got factor={factor} and {shape_of(input)}")
    if not inverse and (h % factor or w % factor):
        fail("squeeze", f"factor must divide height and width of input, got factor={factor} and {shape_of(input)}")
    function = _differentiable if _dispatch.needs_grad(input) else _forward
    if foreign(input):
        function = in_float32("squeeze", function, input.dtype)
    output: Tensor = function(input, factor, SQUEEZE_ORDERS.index(order), inverse)
    return output


_forward: Any = torch.ops.fastgen.squeeze.default


def _differentiable(*args: Any) -> Any:
    return apply(_Squeeze, *args)


class _Squeeze(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.fastgen.squeeze.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, ctx.order, ctx.inverse = inputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad = squeeze(grad_output, ctx.factor, inverse=not ctx.inverse, order=SQUEEZE_ORDERS[ctx.order])
        return grad, None, None, None
