"""`logistic_mixture`: the likelihood of images under mixtures of discretised logistics, and `logistic_mixture_sample`, draws of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ._autograd import apply
from ._check import check_draw, check_floating, check_seeds, fail, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import watched

COLORS = {1: 3, 3: 10}  # colors of a pixel -> parameters of a mixture


def logistic_mixture(logits: Tensor, target: Tensor, *, levels: int = 256) -> Tensor:
    r"""The negative log-likelihood of each sample, in nats, under a mixture of M logistic distributions at each pixel:

    .. math:: -\sum_{y,x} \log \sum_m \pi_m \prod_c \Big[\sigma\big(\tfrac{x_c - \mu_{mc} + h}{s_{mc}}\big) -
        \sigma\big(\tfrac{x_c - \mu_{mc} - h}{s_{mc}}\big)\Big]

    with bins of half a step h = 1 / (``levels`` - 1) to either side of a value, open at -1 and 1. In a pixel of three colors the
    means of the second and third are moved by the colors before them, :math:`\mu_{m2} + k_{m1} x_1` and
    :math:`\mu_{m3} + k_{m2} x_1 + k_{m3} x_2`.

    The logarithm of a bin is taken as :math:`\log\sigma(a) + \log\sigma(-b) + \log(1 - e^{b - a})`, which cancels nowhere: the
    number of the published code where that takes the difference (above 1e-5), and right below, where that takes the density at the
    middle of the bin instead.

    Args:
        logits: [N, 10 M, H, W] for three colors, [N, 3 M, H, W] for one, laid out as by pixel-cnn-pp: M logits of :math:`\pi`; then
            for each color M means, M logarithms of s (at least -7) and, of three colors, M numbers whose tanh is k. float64,
            float32, bfloat16 or float16 (others: float32 copies); contiguous and channels-last are read in place, and so are other
            strides on a CPU.
        target: [N, 3 or 1, H, W] in [-1, 1], any of the four dtypes. It is a constant here.
        levels: L >= 2, the number of values that a color has.

    Returns:
        [N] in float32, or float64 for float64 ``logits``; sums do not depend on the number of threads. Differentiable once, in
        ``logits``; the backward keeps the inputs and nothing else.

    Raises:
        TypeError: an argument is no tensor of a floating-point dtype.
        ValueError: a shape, a device or ``levels`` does not fit, or ``target`` requires a gradient.

    Source: Salimans et al., "PixelCNN++", ICLR 2017, section 2.1 and equations 1 and 2.
    """
    op = "logistic_mixture"
    check_floating(op, "logits", logits)
    check_floating(op, "target", target)
    if target.dim() != 4 or target.shape[1] not in COLORS:
        fail(op, f"target must be [N, C, H, W] with C 1 or 3, got {shape_of(target)}")
    _check_logits(op, logits, target.shape[1])
    if (target.shape[0], *target.shape[2:]) != (logits.shape[0], *logits.shape[2:]):
        wanted = (logits.shape[0], target.shape[1], *logits.shape[2:])
        fail(op, f"target must have shape {wanted}, that of the pixels of logits, got {shape_of(target)}")
    if target.device != logits.device:
        fail(op, f"target must be on the device of logits ({logits.device}), got {target.device}")
    refuse_gradient(op, "target", target)
    _check_levels(op, levels)
    function = _differentiable if _dispatch.needs_grad(logits) else _forward
    if foreign(logits, target):
        function = in_float32(op, function)
    return function(logits, target, levels)


def logistic_mixture_sample(
    logits: Tensor,
    *,
    seeds: Tensor | Sequence[int],
    channels: int = 3,
    element: int = 0,
    step: int = 0,
    levels: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Images from mixtures of logistics: at each pixel a mixture, then each color :math:`\mu + s\,(\log u - \log(1 - u))`, cut off at
    -1 and 1, its mean moved by the colors drawn before it.

    Position p = y W + x takes uniforms ``element`` + (C + 1) p and on of the stream (``seeds[n]``, ``step``), the first for the
    mixture: see :func:`categorical_sample`, also for what a draw depends on.

    Args:
        logits: [N, 10 M, H, W] or [N, 3 M, H, W], as :func:`logistic_mixture` takes them.
        seeds: N integers (list or int64 tensor on the device of ``logits``).
        channels: C, 3 or 1: thirty channels of ``logits`` may be either's.
        element: the place of the first position in the stream: (C + 1) (y W + x) for a pixel drawn alone.
        step: -2^31 <= step < 2^32, the number of the stream.
        levels: round each color to the nearest of so many values from -1 to 1, before the next depends on it.
        temperature: divides the logits of the mixtures and multiplies the scales; 0 gives the means of the likeliest mixture.

    Returns:
        [N, C, H, W] in the layout of ``logits``, float32, or float64 for float64 ``logits``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or a number does not fit, ``logits`` require a gradient, or are not finite somewhere. On a
            GPU, and under the compiler and the transforms of `torch.func`, such a pixel is NaN.

    Source: Salimans et al., "PixelCNN++", ICLR 2017.
    """
    op = "logistic_mixture_sample"
    check_floating(op, "logits", logits)
    if channels not in COLORS:
        fail(op, f"channels must be 1 or 3, got {channels!r}")
    _check_logits(op, logits, channels)
    refuse_gradient(op, "logits", logits)
    seeds = check_seeds(op, seeds, logits.device)
    check_draw(op, seeds, logits, element, step, temperature)
    if levels is not None:
        _check_levels(op, levels)
    function = in_float32(op, _draw) if foreign(logits) else _draw
    images = function(logits, seeds, channels, element, step, levels or 0, float(temperature))
    if logits.device.type == "cpu" and not watched() and bool(images.isnan().any()):
        n, _, y, x = images.isnan().nonzero()[0].tolist()
        fail(op, f"logits must be finite, got {logits[n, :, y, x].tolist()} at pixel [N, H, W] = {[n, y, x]}")
    return images


_forward: Any = torch.ops.fastgen.logistic_mixture_fwd.default
_backward: Any = torch.ops.fastgen.logistic_mixture_bwd.default
_draw: Any = torch.ops.fastgen.logistic_mixture_sample.default


def _check_logits(op: str, logits: Tensor, channels: int) -> None:
    each = COLORS[channels]
    if logits.dim() != 4 or logits.shape[1] < 1 or logits.shape[1] % each:
        wanted = f"[N, {each} M, H, W] for {channels} color{'s' * (channels > 1)}"
        fail(op, f"logits must be {wanted}, got {shape_of(logits)}")


def _check_levels(op: str, levels: int) -> None:
    if not (isinstance(levels, int) and 2 <= levels <= 2**16):
        fail(op, f"levels must be an integer from 2 to 65536, got {levels!r}")


def _differentiable(*args: Any) -> Tensor:
    return apply(_LogisticMixture, *args)


class _LogisticMixture(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.levels = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad, *ctx.saved_tensors, ctx.levels), None, None
