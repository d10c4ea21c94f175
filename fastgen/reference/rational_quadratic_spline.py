"""What `rational_quadratic_spline` means: the splines of `_spline`, one an element of the channels that are transformed."""

import torch
from torch import Tensor

from .._schema import SPLINE_TAILS
from ._check import check_floats, check_main, require
from ._layout import copy_in_order_of, copy_like, empty_in_order_of, empty_like_layout, opmath_dtype
from ._spline import Spline, check_spline, derivatives_of

OP = "rational_quadratic_spline"


def rational_quadratic_spline_fwd(
    input: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    numbers: list[float],
    num_bins: int,
    tails: int,
    parametrization: int,
    inverse: bool,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """The output in the dtype of the input, the log-determinant in fp32, or fp64 for fp64 input."""
    chosen = _chosen(input, mask)
    x = input if chosen is None else input.index_select(1, chosen)
    spline = Spline(x, widths, heights, derivatives, bounds, numbers, num_bins, tails, parametrization, inverse)
    output, log_det = spline.values(x)
    if reduce:
        log_det = log_det.flatten(1).sum(1)
    if chosen is not None:
        output = input.to(output.dtype).index_copy(1, chosen, output)
        log_det = log_det if reduce else torch.zeros_like(output).index_copy(1, chosen, log_det)
    return copy_like(output, input), log_det if reduce else copy_like(log_det, input, log_det.dtype)


def rational_quadratic_spline_bwd(
    grad_output: Tensor,
    grad_log_det: Tensor,
    input: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    numbers: list[float],
    num_bins: int,
    tails: int,
    parametrization: int,
    inverse: bool,
    reduce: bool,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _chosen(input, mask)
    grad = grad_output.to(opmath_dtype(input.dtype))
    grad_log = grad_log_det.to(grad.dtype)
    if reduce:
        grad_log = grad_log.reshape(-1, *[1] * (input.dim() - 1)).expand(input.shape)
    x, g, g_log = (t if chosen is None else t.index_select(1, chosen) for t in (input, grad, grad_log))
    spline = Spline(x, widths, heights, derivatives, bounds, numbers, num_bins, tails, parametrization, inverse)
    by_input, by_widths, by_heights, by_knots = spline.gradients(g, g_log)
    if chosen is not None:
        by_input = grad.index_copy(1, chosen, by_input)
    empty = widths.new_empty(0)
    first = copy_like(by_input, input)
    if not wants_parameters:
        return first, empty, empty.clone(), empty.clone()
    if heights is None or derivatives is None:
        by_all = torch.cat([by_widths, by_heights, spline.to_columns(by_knots, widths.shape[-1] - 2 * num_bins)], -1)
        return first, copy_in_order_of(by_all, widths), empty, empty.clone()
    by_derivatives = spline.to_columns(by_knots, derivatives.shape[-1])
    pairs = ((by_widths, widths), (by_heights, heights), (by_derivatives, derivatives))
    return first, *(copy_in_order_of(by, of) for by, of in pairs)  # type: ignore[return-value]


def _chosen(input: Tensor, mask: Tensor | None) -> Tensor | None:
    """``mask``, its values seen on the CPU; elsewhere asking would wait for the device."""
    if mask is not None and mask.device.type == "cpu":
        channels = input.shape[1]
        for j, value in enumerate(mask.tolist()):
            require(OP, 0 <= value < channels, f"mask must be in [0, {channels}), got mask[{j}] = {value}")
        require(OP, len(set(mask.tolist())) == mask.numel(), "mask must name each channel once")
    return mask


def rational_quadratic_spline_fwd_check(
    input: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    numbers: list[float],
    num_bins: int,
    tails: int,
    parametrization: int,
    inverse: bool,
    reduce: bool,
) -> None:
    check_main(OP, "input", input, dims=2)
    check_main(OP, "widths", widths)
    check_spline(OP, numbers, num_bins, tails, parametrization)
    channels = input.shape[1]
    if mask is not None:
        require(
            OP,
            mask.dtype == torch.int64 and mask.dim() == 1,
            f"mask must be int64 [C'], got {mask.dtype}, {tuple(mask.shape)}",
        )
        require(OP, mask.shape[0] <= channels, f"mask must name each channel once, got {mask.shape[0]} of {channels}")
        require(OP, mask.device == input.device, f"mask must be on {input.device}, got {mask.device}")
        channels = mask.shape[0]
    of_element = (input.shape[0], channels, *input.shape[2:])
    counts = derivatives_of(SPLINE_TAILS[tails], num_bins)
    require(
        OP, (heights is None) == (derivatives is None), "heights and derivatives must be given together, or neither"
    )
    if heights is None or derivatives is None:
        fits = widths.dim() > 0 and widths.shape[-1] - 2 * num_bins in counts
        require(OP, fits, f"packed widths must be [*, {2 * num_bins} + {counts[0]}], got {tuple(widths.shape)}")
        check_floats(OP, input, (*of_element, widths.shape[-1]), widths=widths)
    else:
        check_floats(OP, input, (*of_element, num_bins), widths=widths, heights=heights)
        fits = derivatives.dim() > 0 and derivatives.shape[-1] in counts
        require(OP, fits, f"derivatives must be [*, {counts[0]}], got {tuple(derivatives.shape)}")
        check_floats(OP, input, (*of_element, derivatives.shape[-1]), derivatives=derivatives)
        same = widths.dtype == heights.dtype == derivatives.dtype
        require(OP, same, "widths, heights and derivatives must have one dtype")
    same = opmath_dtype(widths.dtype) == opmath_dtype(input.dtype)
    require(OP, same, f"widths must be float64 where input is, and nowhere else, got {widths.dtype} with {input.dtype}")
    check_floats(OP, input, (channels,), bounds=bounds)


def rational_quadratic_spline_bwd_check(
    grad_output: Tensor,
    grad_log_det: Tensor,
    input: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    numbers: list[float],
    num_bins: int,
    tails: int,
    parametrization: int,
    inverse: bool,
    reduce: bool,
    wants_parameters: bool,
) -> None:
    rational_quadratic_spline_fwd_check(
        input, widths, heights, derivatives, mask, bounds, numbers, num_bins, tails, parametrization, inverse, reduce
    )
    check_floats(OP, input, tuple(input.shape), grad_output=grad_output)
    check_floats(OP, input, tuple(input.shape[:1] if reduce else input.shape), grad_log_det=grad_log_det)


def rational_quadratic_spline_fwd_fake(input: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    dtype, reduce = opmath_dtype(input.dtype), args[-1]
    log_det = input.new_empty(input.shape[0], dtype=dtype) if reduce else empty_like_layout(input, dtype)
    return empty_like_layout(input), log_det


def rational_quadratic_spline_bwd_fake(
    grad_output: Tensor,
    grad_log_det: Tensor,
    input: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, wants_parameters = empty_like_layout(input), args[-1]

    def like(t: Tensor | None) -> Tensor:
        return widths.new_empty(0) if t is None or not wants_parameters else empty_in_order_of(t, t.shape)

    return first, like(widths), like(heights), like(derivatives)
