"""`concat_elu`: ELU of a tensor and of its negative, side by side along the channels."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_main, fail, shape_of
from ._dtypes import foreign, in_float32


def concat_elu(input: Tensor, dim: int = 1) -> Tensor:
    r"""Concatenated ELU, the nonlinearity of PixelCNN++.

    .. math:: output = \mathrm{elu}([x, -x]), \quad \mathrm{elu}(x) = x \text{ where } x > 0, \; e^x - 1 \text{ elsewhere}

    One read of x; both halves take one exponential, without cancellation near 0. Kept for the backward is the input alone.

    Args:
        input: any shape but a scalar, any strides; float64, float32, bfloat16 or float16.
        dim: the dimension that is doubled.

    Arithmetic is in float32 (float64 for float64 input).

    Returns:
        A tensor of the dtype of ``input`` with twice its size at ``dim``; with ``dim`` 1 channels-last if ``input`` is, else
        contiguous. Differentiable once.

    Raises:
        TypeError: ``input`` is no tensor, or not of a floating-point dtype.
        ValueError: ``input`` is a scalar, or has no dimension ``dim``.

    Sources: Salimans et al., "PixelCNN++", 2017; Shang et al. 2016 (concatenated ReLU); Clevert et al. 2016 (ELU).
    """
    check_main("concat_elu", "input", input)
    dims = input.dim()
    if not -dims <= dim < dims:
        fail("concat_elu", f"dim must be in [{-dims}, {dims}), got {dim} with input of {shape_of(input)}")
    dim %= dims
    function = _differentiable if _dispatch.needs_grad(input) else _forward
    if foreign(input):
        function = in_float32("concat_elu", function, input.dtype)
    if dim == 1:
        output: Tensor = function(input)
    elif dim == 0:
        output = function(input[None])[0]
    else:
        output = function(input.flatten(0, dim - 1)).unflatten(0, input.shape[:dim])
    return output


_forward: Any = torch.ops.fastgen.concat_elu_fwd.default


def _differentiable(input: Tensor) -> Any:
    return apply(_ConcatELU, input)


class _ConcatELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.ops.fastgen.concat_elu_fwd.default(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        return torch.ops.fastgen.concat_elu_bwd.default(grad_output, input)
