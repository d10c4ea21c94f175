"""`affine_coupling` and `additive_coupling`: part of a tensor scaled and shifted as a conditioner says, and log-determinants."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import COUPLING_CENTERS, COUPLING_LAYOUTS, COUPLING_MASKS, COUPLING_ORDERS, COUPLING_SCALES
from ..reference._layout import opmath_dtype
from ._autograd import apply
from ._check import check_floating, fail, kind_of, shape_of
from ._dtypes import foreign, in_float32

WEIGHTED = ("tanh", "soft_tanh")
LEAST = 1e-30  # eps that float32 has all digits of, beside a sigmoid that is 0
LARGEST = {"soft_clip": -math.log(1e-3), "softplus": math.inf, "soft_tanh": 2.0, "atan": 2.0, "sigmoid_centered": 2.0}
_NUMBERS = ("bound", "offset", "eps", "gain")
_MASKS: dict[object, int] = {name: code for code, name in enumerate(COUPLING_MASKS) if name not in ("none", "indices")}
_MASKS[None] = 0
_INDICES = COUPLING_MASKS.index("indices")


@dataclass(frozen=True)
class ScaleFn:
    r"""How the scale s of an affine coupling comes from a = gain * raw_scale.

    ========================  =====================================================  ==========================================
    kind                      scale                                                  where
    ========================  =====================================================  ==========================================
    ``exp``                   log s = a                                              RealNVP, normflows
    ``tanh``                  log s = w tanh(a)                                      RealNVP; FrEIA, ``bound`` its ``clamp``
    ``soft_tanh``             log s = w tanh(a / w)                                  later AllInOneBlocks, with ``gain=0.1``
    ``atan``                  log s = 0.636 bound atan(a)                            FrEIA, ``bound`` its ``clamp``
    ``sigmoid_centered``      log s = 2 bound (sigmoid(a) - 1/2)                     FrEIA, ``bound`` its ``clamp``
    ``soft_clip``             log s = a / (1 + \|a / bound\|)                          zuko, ``bound = -log(slope)``
    ``sigmoid``               s = sigmoid(a + offset) + eps                          Glow, nflows (1e-3), SRFlow (1e-4)
    ``softplus``              s = min(softplus(a) + eps, bound)                      nflows
    ========================  =====================================================  ==========================================

    Attributes:
        kind: one of the above.
        bound: of the table; by default 1 for ``tanh``, 2 for ``soft_tanh``, ``atan`` and ``sigmoid_centered``, -log(1e-3) for
            ``soft_clip``, none for ``softplus``. With a ``scale_weight`` that is w, else the bound is.
        offset: of ``sigmoid``.
        eps: of ``sigmoid`` and ``softplus``.
        gain: multiplies the raw scale, and the shift too.
        divide: the scale is 1 / s (normflows' "sigmoid").
        center: ``"sample"`` or ``"channels"``: log s less its mean over the transformed elements of a sample (GIN, FrEIA's
            AllInOneBlock) or of a position (FrEIA's GINCouplingBlock), so that the log-determinant is 0. Not of ``sigmoid`` and
            ``softplus``.

    Raises:
        ValueError: one of them is not known, or does not fit the others; the message names it.
    """

    kind: str = "exp"
    bound: float | None = None
    offset: float = 0.0
    eps: float = 0.0
    gain: float = 1.0
    divide: bool = False
    center: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in COUPLING_SCALES:
            fail("ScaleFn", f"kind must be one of {COUPLING_SCALES}, got {self.kind!r}")
        if self.bound is None:
            object.__setattr__(self, "bound", LARGEST.get(self.kind, 1.0))
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                fail("ScaleFn", f"{name} must be a number, got {value!r}")
        if not self.bound > 0:  # type: ignore[operator]
            fail("ScaleFn", f"bound must be positive, got {self.bound}")
        if self.eps != 0 and not self.eps >= LEAST:
            fail("ScaleFn", f"eps must be 0 or at least {LEAST}, got {self.eps}")
        if self.center not in COUPLING_CENTERS:
            fail("ScaleFn", f"center must be one of {COUPLING_CENTERS}, got {self.center!r}")
        if self.center is not None and self.kind in ("sigmoid", "softplus"):
            fail("ScaleFn", f"no center is taken from {self.kind}")


SCALE_FNS: dict[str, ScaleFn] = {
    **{kind: ScaleFn(kind) for kind in ("exp", "tanh", "soft_tanh", "atan", "sigmoid_centered", "soft_clip")},
    "sigmoid": ScaleFn("sigmoid", offset=2.0),
    "softplus": ScaleFn("softplus", eps=1e-3),
    "gin": ScaleFn("exp", center="sample"),
}
# (scale_fn, order, layout, mask, inverse) -> (whether a scale_weight fits, the codes and numbers of the raw ops)
Plan = tuple[bool, list[int], float, float, float, float]
_PLANS: dict[Any, Plan] = {}


def affine_coupling(
    input: Tensor,
    raw_scale: Tensor,
    shift: Tensor | None = None,
    *,
    scale_fn: str | ScaleFn = "exp",
    order: str = "scale_shift",
    layout: str = "scale_first",
    mask: str | Tensor | None = None,
    inverse: bool = False,
    scale_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An affine coupling with its log-determinant, in one pass.

    .. math:: y = x \cdot s + t \quad\text{or}\quad y = (x + t) \cdot s, \qquad \log\det = \sum \log s

    where ``mask`` says, and y = x elsewhere, copied in the same pass. The sum runs over all transformed elements of a sample, in
    an order that depends on the shape alone.

    Args:
        input: [N, C] or [N, C, *spatial], any strides; float64, float32, bfloat16 or float16.
        raw_scale: [N, C', *spatial], what ``scale_fn`` makes s of; or, without ``shift``, the output of a conditioner
            [N, 2 C', *spatial] that holds both. Any strides; another dtype is converted to that of ``input`` first.
        shift: [N, C', *spatial], t, or None.
        scale_fn: a :class:`ScaleFn`, or ``"exp"``, ``"tanh"``, ``"soft_tanh"``, ``"atan"``, ``"sigmoid_centered"``,
            ``"soft_clip"``, ``"sigmoid"`` (offset 2), ``"softplus"`` (eps 1e-3) or ``"gin"`` (exp, less the mean over a sample).
        order: ``"scale_shift"``, y = x s + t, or ``"shift_scale"``, y = (x + t) s.
        layout: where both lie along the channels of a packed ``raw_scale``: ``"scale_first"``, ``"shift_first"``,
            ``"interleaved"`` (the shift at even channels) or ``"interleaved_scale_first"``.
        mask: what is transformed: None, all (C' = C); ``"first_half"`` or ``"second_half"`` of the channels (C' = C // 2 and
            C - C // 2); an int64 tensor [C'] of indices of channels; ``"checkerboard"`` or ``"checkerboard_inverse"``, the
            positions with h + w even or odd of [N, C, H, W] (C' = C; raw scale and shift matter only there).
        inverse: x of y, and the log-determinant of the inverse, which is the negative.
        scale_weight: [C'], the w of ``tanh`` and ``soft_tanh``.

    Arithmetic is in float32 (float64 for float64 input). Kept for the backward are the arguments alone.

    Returns:
        (output, log_det): of the shape and dtype of ``input``, channels-last if that is, else contiguous; [N] in float32
        (float64 for float64 input). Differentiable once, by every tensor; the gradient of a packed ``raw_scale`` is written
        packed.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: a shape or a device does not fit, or a name is not known; the message names the argument.
        RuntimeError: an index of ``mask`` is out of range or there twice. On a GPU such a mask gives a log-determinant of NaN.

    Sources: Dinh et al., "NICE", 2014, and "Density estimation using Real NVP", 2016; Kingma and Dhariwal, "Glow", 2018; Sorrenson
    et al., "Disentanglement by nonlinear ICA with general incompressible-flow networks (GIN)", 2020.
    """
    indices = mask if isinstance(mask, Tensor) else None
    plan = _plan(scale_fn, order, layout, mask if indices is None else _INDICES, inverse)
    check_floating("affine_coupling", "input", input)
    check_floating("affine_coupling", "raw_scale", raw_scale)
    channels = _transformed("affine_coupling", input, indices, plan[1][4])
    if shift is None:
        _check_shape("affine_coupling", "raw_scale, which holds the shift too,", raw_scale, input, 2 * channels)
    else:
        check_floating("affine_coupling", "shift", shift)
        _check_shape("affine_coupling", "raw_scale", raw_scale, input, channels)
        _check_shape("affine_coupling", "shift", shift, input, channels)
    if scale_weight is not None:
        _check_weight(scale_weight, input, channels, plan[0])
    if foreign(input, raw_scale, shift, scale_weight):
        output, log_det = in_float32("affine_coupling", _run)(input, raw_scale, shift, scale_weight, indices, *plan[1:])
        return output.to(input.dtype), log_det
    return _run(input, raw_scale, shift, scale_weight, indices, *plan[1:])


def additive_coupling(
    input: Tensor, shift: Tensor, *, mask: str | Tensor | None = None, inverse: bool = False
) -> Tensor:
    r"""An additive coupling, y = x + t where ``mask`` says and y = x elsewhere, in one pass; its log-determinant is 0.

    Args:
        input: [N, C] or [N, C, *spatial], any strides; float64, float32, bfloat16 or float16.
        shift: [N, C', *spatial], t, any strides; another dtype is converted to that of ``input`` first.
        mask: what is transformed, as of :func:`affine_coupling`.
        inverse: x = y - t.

    Returns:
        The shape and dtype of ``input``; channels-last if that is, else contiguous. Differentiable any number of times.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: a shape or a device does not fit, or ``mask`` is not known; the message names the argument.
        RuntimeError: an index of ``mask`` is out of range or there twice.

    Source: Dinh et al., "NICE: Non-linear independent components estimation", 2014.
    """
    indices = mask if isinstance(mask, Tensor) else None
    code = _INDICES if indices is not None else _mask_code("additive_coupling", mask)
    check_floating("additive_coupling", "input", input)
    check_floating("additive_coupling", "shift", shift)
    channels = _transformed("additive_coupling", input, indices, code)
    _check_shape("additive_coupling", "shift", shift, input, channels)
    if foreign(input, shift):
        output: Tensor = in_float32("additive_coupling", _add, input.dtype)(input, shift, indices, code, bool(inverse))
        return output
    return _add(input, shift, indices, code, bool(inverse))


def _plan(scale_fn: str | ScaleFn, order: str, layout: str, mask: object, inverse: bool) -> Plan:
    key = (scale_fn, order, layout, mask, inverse)
    try:
        plan = _PLANS.get(key)
    except TypeError:  # something that has no hash: a list
        plan = None
    if plan is not None:
        return plan
    fn = SCALE_FNS.get(scale_fn) if isinstance(scale_fn, str) else scale_fn
    if not isinstance(fn, ScaleFn):
        fail("affine_coupling", f"scale_fn must be a ScaleFn or one of {tuple(SCALE_FNS)}, got {scale_fn!r}")
    for name, value, known in (("order", order, COUPLING_ORDERS), ("layout", layout, COUPLING_LAYOUTS)):
        if value not in known:
            fail("affine_coupling", f"{name} must be one of {known}, got {value!r}")
    codes = [
        COUPLING_SCALES.index(fn.kind),
        COUPLING_CENTERS.index(fn.center),
        COUPLING_ORDERS.index(order),
        COUPLING_LAYOUTS.index(layout),
        _INDICES if mask is _INDICES else _mask_code("affine_coupling", mask),
        int(fn.divide),
        int(bool(inverse)),
    ]
    plan = (fn.kind in WEIGHTED, codes, float(fn.bound), float(fn.offset), float(fn.eps), float(fn.gain))  # type: ignore[arg-type]
    if not torch.compiler.is_compiling():
        _PLANS[key] = plan
    return plan


def _mask_code(op: str, mask: object) -> int:
    code = _MASKS.get(mask) if mask is None or isinstance(mask, str) else None
    if code is None:
        fail(
            op,
            f"mask must be None, an int64 tensor of indices or one of {tuple(name for name in _MASKS if name)}, got {mask!r}",
        )
    return code


def _transformed(op: str, input: Tensor, indices: Tensor | None, mask: int) -> int:
    """C', how many channels raw scale and shift have."""
    shape = input.shape
    if len(shape) < 2:
        fail(op, f"input must be [N, C] or [N, C, *spatial], got {shape_of(input)}")
    if indices is not None:
        if indices.dtype != torch.int64:
            raise TypeError(f"{op}: mask must be an int64 tensor of indices, got {kind_of(indices)}")
        if indices.dim() != 1 or not 1 <= indices.shape[0] <= shape[1]:
            fail(op, f"mask must be [C'] with 1 <= C' <= {shape[1]}, got {shape_of(indices)}")
        if indices.device != input.device:
            fail(op, f"mask must be on the device of input ({input.device}), got {indices.device}")
        return indices.shape[0]
    channels = shape[1]
    if mask > 3 and len(shape) != 4:
        fail(op, f"input must be [N, C, H, W] for a checkerboard, got {shape_of(input)}")
    channels = channels // 2 if mask == 2 else channels - channels // 2 if mask == 3 else channels
    if channels < 1:
        fail(op, f"the mask must leave a channel to be transformed, got input of {shape_of(input)}")
    return channels


def _check_shape(op: str, name: str, t: Tensor, input: Tensor, channels: int) -> None:
    """``t`` is [N, channels, *spatial] beside ``input``."""
    shape, wanted = t.shape, input.shape
    if len(shape) != len(wanted) or shape[1] != channels or shape[0] != wanted[0] or shape[2:] != wanted[2:]:
        expected = (wanted[0], channels, *wanted[2:])
        fail(op, f"{name} must be {tuple(expected)} with input of {shape_of(input)} and this mask, got {shape_of(t)}")
    if t.device != input.device:
        fail(op, f"{name} must be on the device of input ({input.device}), got {t.device}")


def _check_weight(weight: Tensor, input: Tensor, channels: int, fits: bool) -> None:
    check_floating("affine_coupling", "scale_weight", weight)
    if not fits:
        fail("affine_coupling", f"scale_weight goes with the scale functions {WEIGHTED} alone")
    if weight.dim() != 1 or weight.shape[0] != channels:
        fail("affine_coupling", f"scale_weight must be [C'] with C' = {channels}, got {shape_of(weight)}")
    if weight.device != input.device:
        fail("affine_coupling", f"scale_weight must be on the device of input ({input.device}), got {weight.device}")


def _run(input: Tensor, raw_scale: Tensor, shift: Tensor | None, weight: Tensor | None, *rest: Any) -> Any:
    if raw_scale.dtype != input.dtype:
        raw_scale = raw_scale.to(input.dtype)
    if shift is not None and shift.dtype != input.dtype:
        shift = shift.to(input.dtype)
    if _dispatch.needs_grad(input, raw_scale, shift, weight):
        return apply(_AffineCoupling, input, raw_scale, shift, weight, *rest)
    return torch.ops.fastgen.affine_coupling_fwd.default(input, raw_scale, shift, weight, *rest)


class _AffineCoupling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastgen.affine_coupling_fwd.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.codes, ctx.bound, ctx.offset, ctx.eps, ctx.gain = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        input, raw_scale, shift, weight, indices = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        if grad_log_det is None:
            grad_log_det = input.new_zeros(input.shape[0], dtype=opmath_dtype(input.dtype))
        in_input, in_raw, in_shift, in_weight = torch.ops.fastgen.affine_coupling_bwd.default(
            grad_output, grad_log_det, input, raw_scale, shift, weight, indices,
            ctx.codes, ctx.bound, ctx.offset, ctx.eps, ctx.gain,
        )  # fmt: skip
        return (
            in_input, in_raw, None if shift is None else in_shift, None if weight is None else in_weight.to(weight.dtype),
            *[None] * 6,
        )  # fmt: skip


def _add(input: Tensor, shift: Tensor, *rest: Any) -> Tensor:
    if shift.dtype != input.dtype:
        shift = shift.to(input.dtype)
    if _dispatch.needs_grad(input, shift):
        added: Tensor = apply(_AdditiveCoupling, input, shift, *rest)
        return added
    output: Tensor = torch.ops.fastgen.affine_coupling_additive.default(input, shift, *rest)
    return output


class _AdditiveCoupling(torch.autograd.Function):
    """The gradient of the input is that of the output, and the shift's a part of it: plain torch, which any transform follows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastgen.affine_coupling_additive.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _input, _shift, indices, ctx.mask, ctx.inverse = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,), half = ctx.saved_tensors, grad.shape[1] // 2
        part, mask = grad, COUPLING_MASKS[ctx.mask]
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        if indices is not None:
            part = grad.index_select(1, indices)
        elif mask.endswith("half"):
            part = grad[:, :half] if mask == "first_half" else grad[:, half:]
        elif mask.startswith("checkerboard"):
            h, w = (torch.arange(n, device=grad.device) for n in grad.shape[2:])
            part = torch.where((h[:, None] + w) % 2 == int(mask == "checkerboard_inverse"), grad, 0)
        return grad, -part if ctx.inverse else part, None, None, None
