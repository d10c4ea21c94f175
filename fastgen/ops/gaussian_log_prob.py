"""`gaussian_log_prob`: the log-density of a sample under independent normals, in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import GAUSSIAN_LAYOUTS
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32


def gaussian_log_prob(
    input: Tensor, mean: Tensor | None = None, log_scale: Tensor | None = None, *, layout: str = "mean_first"
) -> Tensor:
    r"""The log-density of each sample under independent normals.

    .. math::

        \log p = \sum_i -\tfrac{1}{2}\left(\frac{x_i - m_i}{e^{s_i}}\right)^2 - s_i - \tfrac{1}{2} \log 2 \pi

    The prior of what a multi-scale flow splits off, read where it lies, in one pass over each tensor:

        gaussian_log_prob(x[:, c:], prior(x[:, :c]))      # [N, 2 C, *] of a network: the means, then the log-scales
        gaussian_log_prob(z)                              # the standard normal
        gaussian_log_prob(z, loc, log_scale)              # two tensors, or parameters [C, 1, 1] that broadcast

    Args:
        input: [N, C, *], any strides; float64, float32, bfloat16 or float16.
        mean: broadcasts to the shape of ``input``; or, without ``log_scale``, both parameters [N, 2 C, *] in ``layout``; None: 0.
        log_scale: broadcasts to the shape of ``input``; None without ``mean``: 0.
        layout: of packed parameters along dimension 1: ``"mean_first"``, ``"scale_first"`` or ``"interleaved"`` (mean and
            log-scale in turn). Their gradient is written packed.

    The parameters may have any of the four dtypes; arithmetic is in float32 (float64 for float64 input).

    Returns:
        [N] in float32 (float64 for float64 input). Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, or ``layout`` is not known; the message names the argument.
    """
    op = "gaussian_log_prob"
    if layout not in GAUSSIAN_LAYOUTS:
        fail(op, f"layout must be one of {GAUSSIAN_LAYOUTS}, got {layout!r}")
    check_floating(op, "input", input)
    if input.dim() < 2:
        fail(op, f"input must be [N, C, *], got {shape_of(input)}")
    if mean is None and log_scale is not None:
        fail(op, "log_scale needs mean beside it, got None")
    for name, param in (("mean", mean), ("log_scale", log_scale)):
        if param is None:
            continue
        check_floating(op, name, param)
        if param.device != input.device:
            fail(op, f"{name} must be on the device of input ({input.device}), got {param.device}")
    if log_scale is not None and mean is not None:
        mean, log_scale = _spread("mean", mean, input), _spread("log_scale", log_scale, input)
    elif mean is not None and mean.shape != (input.shape[0], 2 * input.shape[1], *input.shape[2:]):
        fail(
            op,
            f"mean must be [N, 2 C, *] where log_scale is not given, got {shape_of(mean)} with input of {shape_of(input)}",
        )
    function = _differentiable if _dispatch.needs_grad(input, mean, log_scale) else _forward
    if foreign(input, mean, log_scale):
        function = in_float32(op, function)
    output: Tensor = function(input, mean, log_scale, GAUSSIAN_LAYOUTS.index(layout))
    return output


def _spread(name: str, param: Tensor, input: Tensor) -> Tensor:
    """``param`` of the shape of ``input``."""
    if param.shape == input.shape:
        return param
    sizes = zip(reversed(param.shape), reversed(input.shape), strict=False)
    if param.dim() > input.dim() or any(n not in (1, size) for n, size in sizes):
        fail(
            "gaussian_log_prob",
            f"{name} must broadcast to the shape of input {tuple(input.shape)}, got {shape_of(param)}",
        )
    return param.expand(input.shape)


_forward: Any = torch.ops.fastgen.gaussian_log_prob_fwd.default


def _differentiable(*args: Any) -> Any:
    return apply(_GaussianLogProb, *args)


class _GaussianLogProb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.fastgen.gaussian_log_prob_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.layout = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, log_scale = ctx.saved_tensors
        d_input, d_mean, d_log_scale = torch.ops.fastgen.gaussian_log_prob_bwd.default(
            grad_log_prob, input, mean, log_scale, ctx.layout
        )
        return d_input, None if mean is None else d_mean, None if log_scale is None else d_log_scale, None
