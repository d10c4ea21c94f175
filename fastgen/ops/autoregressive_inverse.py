"""`autoregressive_inverse`: the inverse of a masked autoregressive flow, each unit of its network computed once."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._schema import AUTOREGRESSIVE_SCALES, SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from ..reference._masked_network import state_size
from ..reference._spline import derivatives_of
from ._check import check_floating, check_main, fail, kind_of, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32
from ._spline import check_kinds, spline_numbers

__all__ = [
    "autoregressive_inverse",
    "autoregressive_inverse_advance",
    "autoregressive_inverse_spline",
    "autoregressive_inverse_state",
]

_BOUNDED = ("tanh", "soft_tanh", "atan", "sigmoid_centered")
_CODE = {name: code for code, name in enumerate(AUTOREGRESSIVE_SCALES)}


def autoregressive_inverse(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None = None,
    *,
    scale_fn: str = "exp",
    bound: float = math.inf,
    offset: float = 0.0,
    eps: float = 0.0,
    gain: float = 1.0,
    shift_first: bool = False,
    multiply: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The x of which an affine autoregressive map makes ``input``, feature after feature.

    .. math:: x_d = (y_d - t_d) / s_d, \quad (a_d, t_d) = \mathrm{network}(x_{<d})_d, \quad s_d = f(a_d),
              \qquad \log|\det \partial x / \partial y| = -\sum_d \log s_d

    A unit of the network that depends on x_1, ..., x_m is computed once, when those are known, so that all of it costs what one
    pass through the masked network does, and not one for each feature. The same map is the density of an inverse autoregressive
    flow, whose x is known. ``fastgen.flows`` makes the program, weights and parameters of a network.

    ====================  ==========================================
    ``scale_fn``          scale s, with a = gain * raw scale
    ====================  ==========================================
    ``none``              1; the raw scale, where there is one, is not read
    ``exp``               log s = a
    ``tanh``              log s = bound tanh(a)
    ``soft_tanh``         log s = bound tanh(a / bound)
    ``atan``              log s = 0.636 bound atan(a)
    ``sigmoid_centered``  log s = 2 bound (sigmoid(a) - 1/2)
    ``soft_clip``         log s = a / (1 + \|a / bound\|)
    ``sigmoid``           s = sigmoid(a + offset) + eps
    ``softplus``          s = min(softplus(a) + eps, bound)
    ====================  ==========================================

    Args:
        input: [N, D], y.
        program: int64, on the device of ``input``, with levels.
        weights: packed, float32 or float64, which is the dtype of the arithmetic.
        parameters: biases, in the dtype of ``weights``.
        constants: [N, C] in the dtype of ``weights``: what layers add or multiply by, such as what they make of a context.
        scale_fn: as above, with ``bound`` > 0, ``offset`` and ``eps``; that of a :class:`fastgen.ops.ScaleFn` too.
        gain: multiplies the raw scale, and the shift too.
        shift_first: whether of the two outputs of a feature the shift comes first.
        multiply: x = y s + t in place of (y - t) / s, for maps whose forward subtracts and divides; the log-det is then positive.

    Returns:
        x in the dtype of ``input``, and the log-det [N] in that of ``weights``. No gradients: the module
        ``fastgen.flows.autoregressive_inverse`` has them, by the implicit function theorem.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or an option does not fit, an argument requires a gradient, or the program is none.

    Sources: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", 2017; Kingma et al., "Improving
    Variational Inference with Inverse Autoregressive Flow", 2016.
    """
    op = "autoregressive_inverse"
    code = _CODE.get(scale_fn)
    if code is None:
        fail(op, f"scale_fn must be one of {AUTOREGRESSIVE_SCALES}, got {scale_fn!r}")
    if not bound > 0:
        fail(op, f"bound must be positive, got {bound}")
    check_main(op, "input", input)
    if input.dim() != 2:
        fail(op, f"input must be [N, D], got {shape_of(input)}")
    _check(op, program, input=input, weights=weights, parameters=parameters, constants=constants)
    if not math.isfinite(bound) and scale_fn in _BOUNDED:
        fail(op, f"bound must be given for {scale_fn}")
    numbers = [float(bound), float(offset), float(eps), float(gain)]
    if foreign(input):
        output, log_det = in_float32(op, _inverse)(
            input, program, weights, parameters, constants, code, numbers, shift_first, multiply
        )
        return output.to(input.dtype), log_det
    return _inverse(input, program, weights, parameters, constants, code, numbers, shift_first, multiply)


def autoregressive_inverse_spline(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None = None,
    *,
    num_bins: int,
    tails: str | None = "linear",
    bound: float | Sequence[float] = 1.0,
    min_bin_width: float | None = None,
    min_bin_height: float | None = None,
    min_derivative: float = 1e-3,
    parametrization: str = "nflows",
    scale: float = 1.0,
    derivatives: int | None = None,
    turn: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The x of which an autoregressive map of splines makes ``input``, feature after feature.

    .. math:: x_d = T^{-1}(y_d;\ \mathrm{network}(x_{<d})_d)

    with T a monotone rational-quadratic spline, as :func:`fastgen.ops.rational_quadratic_spline` has it: the outputs of a feature
    are its K widths, K heights and slopes, packed. Each unit of the network is computed once, as in :func:`autoregressive_inverse`.

    Args:
        input: [N, D], y.
        program, weights, parameters, constants: as in :func:`autoregressive_inverse`.
        num_bins: K.
        tails, min_bin_width, min_bin_height, min_derivative, parametrization, scale: as in
            :func:`fastgen.ops.rational_quadratic_spline`.
        bound: the box: B of [-B, B] both ways, or (left, right, bottom, top).
        derivatives: how many slopes a feature has: K - 1 for linear tails, K for circular ones, K + 1 for none, or K + 1 for any,
            of which those at the ends are then not read where the tails fix them.
        turn: x is taken modulo 2 B, from 0 on, and B subtracted: the half turn that zuko's circular splines begin with.

    Returns:
        x in the dtype of ``input``, and log abs det dx/dy [N] in that of ``weights``. No gradients: the module
        ``fastgen.flows.autoregressive_inverse`` has them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or a number does not fit, an argument requires a gradient, or the program is none.

    Source: Durkan et al., "Neural Spline Flows", NeurIPS 2019.
    """
    op = "autoregressive_inverse_spline"
    check_kinds(op, tails, parametrization)
    if num_bins < 1:
        fail(op, f"num_bins must be at least 1, got {num_bins}")
    box = (bound, min_bin_width, min_bin_height, min_derivative)
    numbers = spline_numbers(op, num_bins, tails, *box, parametrization, scale)
    counts = derivatives_of(tails, num_bins)
    count = counts[0] if derivatives is None else derivatives
    if count not in counts:
        fail(op, f"derivatives must be {counts[0]} with tails {tails!r}, got {derivatives}")
    if turn and numbers[0] != -numbers[1]:
        fail(op, f"turn must have a box of -bound to bound, got {bound!r}")
    check_main(op, "input", input)
    if input.dim() != 2:
        fail(op, f"input must be [N, D], got {shape_of(input)}")
    _check(op, program, input=input, weights=weights, parameters=parameters, constants=constants)
    codes = (SPLINE_TAILS.index(tails), SPLINE_PARAMETRIZATIONS.index(parametrization))
    args = (program, weights, parameters, constants, numbers, num_bins, count, *codes, turn)
    if foreign(input):
        output, log_det = in_float32(op, _inverse_spline)(input, *args)
        return output.to(input.dtype), log_det
    return _inverse_spline(input, *args)  # type: ignore[no-any-return]


def autoregressive_inverse_state(program_rows: int, samples: int, *, like: Tensor) -> Tensor:
    """The state of :func:`autoregressive_inverse_advance` for so many samples, in the dtype and on the device of ``like``."""
    return like.new_zeros(state_size(program_rows, samples))


def autoregressive_inverse_advance(
    state: Tensor,
    known: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None = None,
    *,
    level: int,
    outputs: int,
) -> Tensor:
    """The outputs of the network for the features of one level, for maps other than affine; the arguments are those of
    :func:`autoregressive_inverse`.

    Levels are asked for in order. ``state`` is written to.

    Args:
        state: of :func:`autoregressive_inverse_state`.
        known: [N, features of the level before], those that are known by now, [N, 0] at level 0; in the dtype of ``weights``.
        constants: given at level 0 alone.
        level: from 0 on.
        outputs: how many numbers the level has.

    Returns:
        [N, outputs] in the dtype of ``weights``: for each feature of the level, in the order of the program, its parameters. No
        gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or the level does not fit, an argument requires a gradient, or the program is none.
    """
    op = "autoregressive_inverse_advance"
    check_main(op, "known", known)
    _check(op, program, known=known, state=state, weights=weights, parameters=parameters, constants=constants)
    if not state.is_contiguous():
        fail(op, "state must be contiguous: it is written to")
    return _raw(op, state, known.contiguous(), program, weights, parameters, constants, level, outputs)


def _inverse_spline(*args: Any) -> Any:
    return _raw("autoregressive_inverse_spline", *args)


def _inverse(*args: Any) -> Any:
    return _raw("autoregressive_inverse", *args)


def _raw(name: str, *args: Any) -> Any:
    """A raw op, whose complaints of its arguments are those of the public one."""
    function = getattr(torch.ops.fastgen, name).default
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not message.startswith(f"{name}: "):
            raise
        raise ValueError(message) from None


def _check(op: str, program: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check_floating(op, name, tensor)
            refuse_gradient(op, name, tensor)
    if not isinstance(program, Tensor) or program.dtype != torch.int64:
        raise TypeError(f"{op}: program must be an int64 tensor, got {kind_of(program)}")
