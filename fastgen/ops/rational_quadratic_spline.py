"""`rational_quadratic_spline`: the monotone splines of neural spline flows, with their log-determinant, both ways."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from ..reference._layout import opmath_dtype
from ..reference._spline import derivatives_of
from ._autograd import apply
from ._check import check_floating, fail, kind_of, shape_of
from ._dtypes import foreign, in_float32
from ._spline import check_kinds, spline_numbers

OP = "rational_quadratic_spline"


def rational_quadratic_spline(
    input: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor | None = None,
    unnormalized_derivatives: Tensor | None = None,
    *,
    num_bins: int | None = None,
    inverse: bool = False,
    tails: str | None = "linear",
    bound: float | Sequence[float] | Tensor = 1.0,
    min_bin_width: float | None = None,
    min_bin_height: float | None = None,
    min_derivative: float = 1e-3,
    parametrization: str = "nflows",
    scale: float = 1.0,
    mask: Tensor | None = None,
    reduce: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""A monotone rational-quadratic spline of K bins at every element, and the logarithm of its derivative.

    .. math:: y = y_k + h \frac{s \theta^2 + d_k \theta (1 - \theta)}{s + (d_k + d_{k+1} - 2 s) \theta (1 - \theta)}, \quad
        \theta = \frac{x - x_k}{w}, \; s = \frac{h}{w}

    in the bin of width w and height h that begins at :math:`(x_k, y_k)`, with slopes :math:`d_k` and :math:`d_{k+1}` at its
    ends. The inverse solves the quadratic for :math:`\theta` in a form whose discriminant is a sum of squares.

    ``"nflows"`` (also normflows'): widths and heights are softmax(u) of the box, raised to the least bin; d = ``min_derivative`` +
    softplus(v). ``"zuko"``: u is softly clipped before, u / (1 + abs(2 u / log m)), and d = exp(v / (1 + abs(v / log m))) with m =
    ``min_derivative``. In both, u is multiplied by ``scale`` first: nflows' layers divide by the root of their hidden features.

    Outside the box:
        ``tails="linear"``: the identity, and the slopes at both ends are 1. ``"circular"``: the identity, and one slope for
        both ends (Rezende et al. 2020). ``None``: nothing has density there, so the map is constant: the output is the
        nearer end of the box, the log-determinant -inf and all gradients 0; nothing raises, which would wait for a GPU.

    Args:
        input: [N, C, *spatial] or [N], any strides; float64, float32, bfloat16 or float16.
        unnormalized_widths: [N, C', *spatial, K] with C' = C or the length of ``mask``; or packed with heights and
            derivatives, [N, C', *spatial, P]: P = 3 K - 1 for linear tails, 3 K for circular ones, 3 K + 1 for none. Any strides,
            read in place: a view of the output of a convolution [N, C' P, H, W] as well. Any dtype of the four.
        unnormalized_heights: as widths.
        unnormalized_derivatives: [..., K - 1], [..., K] or [..., K + 1]; with K + 1 the ends that ``tails`` fixes are not read.
        num_bins: K, where it shall be checked.
        inverse: x of y, and the log-determinant of the inverse.
        bound: the box: B of [-B, B] both ways; (left, right, bottom, top); or a tensor [C'], one B a channel that is transformed.
        min_bin_width, min_bin_height: fractions of the box; 1e-3 for ``"nflows"`` and 0 for ``"zuko"`` where not given.
        mask: int64 [C'], the channels (dimension 1) that are transformed, each once; the others are copied in the same pass.
        reduce: sum the log-determinant over all but the samples; else one an element, 0 where it is copied.

    Arithmetic is in float32 (float64 for float64 input).

    Returns:
        (output like ``input``, log-determinant [N], or of the shape of ``input``, in float32, or float64 for float64 input).
        Differentiable once in input and parameters; kept for the backward are these alone. A gradient of packed parameters
        is packed. At a knot it is that of the bin to the right.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or a number does not fit; the message names the argument.
        RuntimeError: on a CPU, ``mask`` names a channel twice or one that is not there. On a GPU such a channel is copied,
        or undefined.

    Sources: Durkan et al., "Neural Spline Flows", NeurIPS 2019; Gregory and Delbourgo 1982; Rezende et al., "Normalizing
    Flows on Tori and Spheres", ICML 2020.
    """
    check_floating(OP, "input", input)
    if input.dim() < 1:
        fail(OP, "input must be [N, C, *spatial] or [N], got a scalar")
    parameters = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    alone = input.dim() == 1
    if alone:
        if mask is not None:
            fail(OP, f"mask chooses channels of input [N, C, *spatial], got input of {shape_of(input)}")
        parameters = tuple(p[:, None] if isinstance(p, Tensor) and p.dim() == 2 else p for p in parameters)  # type: ignore[assignment]
        input = input[:, None]
    check_kinds(OP, tails, parametrization)
    channels = _check_mask(mask, input)
    bins = _check_parameters(parameters, (input.shape[0], channels, *input.shape[2:]), input, tails, num_bins)
    bounds = bound if isinstance(bound, Tensor) else None
    if bounds is not None:
        _check_bounds(bounds, channels, input)
    numbers = spline_numbers(
        OP, bins, tails, 1.0 if isinstance(bound, Tensor) else bound, min_bin_width, min_bin_height, min_derivative,
        parametrization, scale,
    )  # fmt: skip
    codes = (SPLINE_TAILS.index(tails), SPLINE_PARAMETRIZATIONS.index(parametrization))
    function: Any = _differentiable if _dispatch.needs_grad(input, *parameters) else _forward
    dtype = input.dtype
    if foreign(input, *parameters, bounds):
        function = in_float32(OP, _of_one_kind(function))
    elif unnormalized_heights is not None or opmath_dtype(unnormalized_widths.dtype) != opmath_dtype(dtype):
        function = _of_one_kind(function)
    output, log_det = function(input, *parameters, mask, bounds, numbers, bins, *codes, bool(inverse), bool(reduce))
    if output.dtype != dtype:
        output = output.to(dtype)
    if alone:
        output, log_det = output[:, 0], log_det if reduce else log_det[:, 0]
    return output, log_det


def _of_one_kind(function: Any) -> Any:
    """``function`` with parameters of one dtype, float64 where ``input`` is and nowhere else."""

    def call(input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, *rest: Any) -> Any:
        given, wide = (widths, heights, derivatives), opmath_dtype(input.dtype)
        if not all(p is None or (p.dtype == widths.dtype and opmath_dtype(p.dtype) == wide) for p in given):
            given = tuple(None if p is None else p.to(wide) for p in given)  # type: ignore[assignment]
        return function(input, *given, *rest)

    return call


def _check_mask(mask: Tensor | None, input: Tensor) -> int:
    """C'."""
    if mask is None:
        return input.shape[1]
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64:
        raise TypeError(f"{OP}: mask must be an int64 tensor of channels, got {kind_of(mask)}")
    if mask.dim() != 1 or mask.shape[0] > input.shape[1]:
        fail(OP, f"mask must be [C'] with C' at most C = {input.shape[1]}, got {shape_of(mask)}")
    if mask.device != input.device:
        fail(OP, f"mask must be on the device of input ({input.device}), got {mask.device}")
    return mask.shape[0]


def _check_parameters(
    parameters: Sequence[Tensor | None],
    elements: tuple[int, ...],
    input: Tensor,
    tails: str | None,
    num_bins: int | None,
) -> int:
    """K."""
    widths, heights, derivatives = parameters
    names = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")
    for name, p in zip(names, parameters, strict=True):
        if p is None and name != names[0]:
            continue
        check_floating(OP, name, p)  # type: ignore[arg-type]
        assert p is not None
        if p.dim() != len(elements) + 1 or tuple(p.shape[:-1]) != elements:
            fail(OP, f"{name} must be [N, C', *spatial, parameters] with {elements} elements, got {shape_of(p)}")
        if p.device != input.device:
            fail(OP, f"{name} must be on the device of input ({input.device}), got {p.device}")
    assert widths is not None
    if (heights is None) != (derivatives is None):
        fail(OP, "unnormalized_heights and unnormalized_derivatives must be given together, or neither")
    packed = derivatives is None
    bins = (widths.shape[-1] + 1) // 3 if packed else widths.shape[-1]
    if bins < 1 or num_bins not in (None, bins):
        wanted = "K >= 1" if num_bins is None else f"K = {num_bins}"
        fail(OP, f"unnormalized_widths must be of {wanted} bins, got {shape_of(widths)}{', packed' * packed}")
    counts = derivatives_of(tails, bins)
    if packed:
        if widths.shape[-1] - 2 * bins not in counts:
            sizes = " or ".join(str(2 * bins + count) for count in counts)
            fail(
                OP, f"unnormalized_widths, packed, must be [..., {sizes}] with tails {tails!r}, got {shape_of(widths)}"
            )
        return bins
    assert heights is not None and derivatives is not None
    if heights.shape[-1] != bins:
        fail(OP, f"unnormalized_heights must be [..., {bins}] as widths, got {shape_of(heights)}")
    if derivatives.shape[-1] not in counts:
        sizes = " or ".join(map(str, counts))
        fail(OP, f"unnormalized_derivatives must be [..., {sizes}] with tails {tails!r}, got {shape_of(derivatives)}")
    return bins


def _check_bounds(bounds: Tensor, channels: int, input: Tensor) -> None:
    check_floating(OP, "bound", bounds)
    if bounds.shape != (channels,):
        fail(OP, f"bound must be [C'] with C' = {channels}, got {shape_of(bounds)}")
    if bounds.device != input.device:
        fail(OP, f"bound must be on the device of input ({input.device}), got {bounds.device}")
    if bounds.requires_grad and torch.is_grad_enabled():
        fail(OP, "there is no gradient in bound: detach it")


_forward: Any = torch.ops.fastgen.rational_quadratic_spline_fwd.default
_backward: Any = torch.ops.fastgen.rational_quadratic_spline_bwd.default


def _differentiable(*args: Any) -> Any:
    return apply(_RationalQuadraticSpline, *args)


class _RationalQuadraticSpline(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.numbers, ctx.bins, ctx.tails, ctx.parametrization, ctx.inverse, ctx.reduce = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        packed, wants_parameters = tensors[2] is None, any(ctx.needs_input_grad[1:4])
        how = (ctx.numbers, ctx.bins, ctx.tails, ctx.parametrization, ctx.inverse, ctx.reduce)
        in_input, *in_parameters = _backward(grad_output, grad_log_det, *tensors, *how, wants_parameters)
        if not wants_parameters:
            in_parameters = [None, None, None]
        elif packed:
            in_parameters[1:] = [None, None]
        return in_input, *in_parameters, *[None] * 8
