"""What `conv2d` and `upsample_conv2d` share: operands and their checks, plain torch's way, and the way to the kernels.

What follows from shapes, dtypes and devices alone is worked out once and remembered: a layer of a small model takes no longer than
its checks do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _library
from .._schema import ACTIVATIONS
from ..reference import _convolution as reference
from ..reference._layout import opmath_dtype, together
from . import _convolution_plan
from ._check import check_floating, check_skip, fail, shape_of
from ._convolution_plan import DIRECT, ConvolutionPlan
from ._dtypes import foreign, in_float32
from ._moments import remember, worth
from ._packed_weights import WEIGHTS
from ._watchers import autocast_active, watched

_ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
_MOST_REMEMBERED = 4096


class Operands(NamedTuple):
    """What goes in and comes out beside the input and the weight, in the order of the raw ops."""

    bias: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    activation: int
    embedding: Tensor | None
    residual: Tensor | None
    output_scale: float
    skip: Tensor | None = None  # whose channels come after those of the input

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.input_scale, self.input_shift, self.embedding, self.residual, self.skip

    def passes(self, dtype: torch.dtype) -> tuple[int, int]:
        """How often plain torch goes through the image and through the output for these; low precision is widened and rounded."""
        before = (self.input_scale is not None) + (self.input_shift is not None) + (self.activation != 0)
        after = (self.embedding is not None) + (self.residual is not None) + (self.output_scale != 1.0)
        rounded = 0 if dtype == torch.float32 else 2
        return before + rounded * (before > 0), after + rounded * (after > 0)


class Checked(NamedTuple):
    """What is known of a call by its shapes, dtypes and devices."""

    geometry: tuple[Any, ...]  # as the raw op takes it
    refusals: list[str]  # why the kernels cannot take it, whatever they would cost
    foreign: bool  # it is computed with float32 copies
    shape: torch.Size  # of the input, with the channels of a second one


@dataclass(frozen=True, eq=False)
class Convolution:
    """A family of convolutions, whose geometry is whatever its functions take between the weight and the operands.

    ``scale``: rows of the output for one of the input, as its kernels have it. ``check``: the geometry as the raw op takes it and
    the size of the output, once it fits input and weight. ``library``: of (input, weight, bias, *geometry), by plain torch.
    ``in_parts``: of (input, skip, weight, bias, *geometry) where nobody asks for gradients, or None where one input must be made of
    the two.
    """

    op: str
    scale: int
    check: Callable[..., tuple[tuple[Any, ...], tuple[int, ...]]]  # of (input, weight, channels, *geometry)
    library: Callable[..., Tensor]
    in_parts: Callable[..., Tensor | None] | None = None

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        geometry: tuple[Any, ...],
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_shift: Tensor | None,
        activation: str | None,
        embedding: Tensor | None,
        residual: Tensor | None,
        output_scale: float,
        skip: Tensor | None = None,
        gather: bool = False,
    ) -> Tensor:
        code = _ACTIVATION_CODE.get(activation)
        if code is None:
            fail(self.op, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        if skip is not None:
            input, skip = check_skip(self.op, input, skip)
        operands = Operands(bias, input_scale, input_shift, code, embedding, residual, float(output_scale), skip)
        direct = not watched()
        checked = (self._remembered if direct else self._checked)(input, weight, geometry, operands)
        if not checked.foreign:
            return self._taken(direct, checked, input, weight, operands, gather)

        def of_copies(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
            copies = Operands(*args)
            return self._taken(direct, self._checked(input, weight, geometry, copies), input, weight, copies)

        return in_float32(self.op, of_copies, input.dtype)(input, weight, *operands)

    def plan(
        self, input: Tensor, weight: Tensor, geometry: tuple[Any, ...], skip: Tensor | None = None
    ) -> ConvolutionPlan:
        """Which algorithm takes a call, as things are now, and why."""
        operands = _NONE
        if skip is not None:
            input, skip = check_skip(self.op, input, skip)
            operands = _NONE._replace(skip=skip)
        checked = (self._checked if watched() else self._remembered)(input, weight, geometry, operands)
        if why := plainly(input.device, input, weight, skip):
            return _convolution_plan.library_plan(why)
        if checked.refusals:
            return _convolution_plan.library_plan(checked.refusals[0])
        return _convolution_plan.choose(self.scale, input.dtype, checked.shape, weight, WEIGHTS.find(weight))

    def register(self, check: Callable[..., None]) -> None:
        """Make this the raw op on the CPU, after its ``check``; where no kernel is loaded the reference answers."""

        def fwd(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
            check(input, weight, *args)
            geometry, operands = args[: -len(_NONE)], Operands(*args[-len(_NONE) :])
            refused = _convolution_plan.reasons(input, weight, geometry)
            return (self._library_laid_out if refused else self._compute)(input, weight, geometry, operands)

        if _library.ISA is not None:
            _library.implement(f"{self.op}_fwd", fwd)

    def _taken(
        self, direct: bool, checked: Checked, input: Tensor, weight: Tensor, operands: Operands, gather: bool = False
    ) -> Tensor:
        """By plain torch, or by the kernels where they can take the call and nobody must see what it is made of."""
        if checked.refusals or plainly(input.device, input, weight, *operands.tensors()):
            return self._plain(input, weight, checked.geometry, operands)
        if direct:
            return self._compute(input, weight, checked.geometry, operands, gather)
        return self._op("fwd")(input, weight, *checked.geometry, *operands)

    def _remembered(self, input: Tensor, weight: Tensor, geometry: tuple[Any, ...], operands: Operands) -> Checked:
        """:meth:`_checked`, once for all tensors on the CPU of these shapes and dtypes."""
        described: list[Any] = [self.op, geometry]
        try:
            for tensor in (input, weight, *operands.tensors()):
                if tensor is None:
                    described.append(None)
                elif tensor.is_cpu:
                    described += tensor.shape, tensor.dtype
                else:
                    return self._checked(input, weight, geometry, operands)
            key = tuple(described)
            checked = _REMEMBERED.get(key)
        except (AttributeError, TypeError):  # no tensor, or a list
            return self._checked(input, weight, geometry, operands)
        if checked is None:
            checked = self._checked(input, weight, geometry, operands)
            if len(_REMEMBERED) >= _MOST_REMEMBERED:
                _REMEMBERED.clear()
            _REMEMBERED[key] = checked
        return checked

    def _checked(self, input: Tensor, weight: Tensor, geometry: tuple[Any, ...], operands: Operands) -> Checked:
        """What is known of the call, once its arguments fit each other."""
        check_floating(self.op, "input", input)
        check_floating(self.op, "weight", weight)
        if input.dim() != 4:
            fail(self.op, f"input must be [N, C, H, W], got {shape_of(input)}")
        if weight.device != input.device:
            fail(self.op, f"weight must be on the device of input ({input.device}), got {weight.device}")
        shape = input.shape if operands.skip is None else together_shape(input, operands.skip)
        n, c = shape[:2]
        geometry, size = self.check(input, weight, c, *geometry)
        k = weight.shape[0]
        shapes = {
            "bias": (k,), "input_scale": (n, c), "input_shift": (n, c), "embedding": (n, k), "residual": (n, k, *size),
        }  # fmt: skip
        for name, wanted in shapes.items():
            tensor = getattr(operands, name)
            if tensor is None:
                continue
            check_floating(self.op, name, tensor)
            if tensor.shape != wanted:
                given = f"{shape_of(tensor)} with input of {shape_of(input)}"
                fail(self.op, f"{name} must have shape {wanted}, got {given}")
            if tensor.device != input.device:
                fail(self.op, f"{name} must be on the device of input ({input.device}), got {tensor.device}")
        refusals = _convolution_plan.reasons(input, weight, geometry)
        return Checked(geometry, refusals, foreign(input, weight, *operands.tensors()), shape)

    def _op(self, name: str) -> Any:
        return getattr(torch.ops.fastgen, f"{self.op}_{name}").default

    def _plain(self, input: Tensor, weight: Tensor, geometry: tuple[Any, ...], operands: Operands) -> Tensor:
        """By the library's convolution in the dtype of ``input``, or of autocast; what stands around it in plain torch."""
        bias, scale, shift, activation, embedding, residual, output_scale, skip = operands
        autocast, mapped = autocast_active(input.device), scale is not None or shift is not None or bool(activation)
        if not autocast:
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        y = None
        if skip is not None and self.in_parts is not None and not mapped:
            y = self.in_parts(input, skip, weight, bias, *geometry)
        if y is None:
            y = together(input, skip)
            if mapped:
                y = reference.prologue(y.to(opmath_dtype(y.dtype)), scale, shift, activation).to(y.dtype)
            y = self.library(y, weight, bias, *geometry)
        if embedding is None and residual is None and output_scale == 1.0:
            return y
        dtype = torch.result_type(y, residual) if autocast and residual is not None else y.dtype
        return reference.epilogue(y.to(opmath_dtype(dtype)), None, embedding, residual, output_scale).to(dtype)

    def _library_laid_out(self, input: Tensor, *args: Any) -> Tensor:
        """:meth:`_plain` in the layout that the fake promises."""
        y = self._plain(input, *args)
        return y if list(y.stride()) == reference.output_strides(y.shape, input) else reference.in_layout(y, input)

    def _compute(
        self, input: Tensor, weight: Tensor, geometry: tuple[Any, ...], operands: Operands, gather: bool = False
    ) -> Tensor:
        """A call that the kernels can take. The plan is made at each: a compiled graph follows the weight and the switches.

        ``gather``: the moments of the output are kept beside it.
        """
        kept = WEIGHTS.find(weight)
        shape = input.shape if operands.skip is None else together_shape(input, operands.skip)
        passes = operands.passes(input.dtype)
        outputs = _convolution_plan.choose(self.scale, input.dtype, shape, weight, kept, *passes).outputs
        if outputs == 0:
            return self._library_laid_out(input, weight, geometry, operands)
        direct = outputs == DIRECT
        packed = kept.get((self.scale, outputs))
        if packed is None:
            make = self._op("direct_pack" if direct else "pack")
            packed = WEIGHTS.make(weight, (self.scale, outputs), make if direct else lambda w: make(w, outputs))
        residual = operands.residual
        if residual is not None and residual.dtype is not input.dtype:
            operands = operands._replace(residual=residual.to(input.dtype))
        name = "direct" if direct else "packed"
        if not (gather and worth(name, input, weight.shape[0], self.scale)):
            return self._op(name)(input, packed, weight.shape[0], *operands)
        with _counted():
            y, moments = self._op(f"{name}_moments")(input, packed, weight.shape[0], *operands)
        remember(y, moments)
        return y


_NONE = Operands(None, None, None, 0, None, None, 1.0)
_REMEMBERED: dict[Any, Checked] = {}


def _counted() -> AbstractContextManager[Any]:
    """In which a new tensor is one whose operations in place are counted: in inference mode too, which makes others."""
    return _Counted() if torch.is_inference_mode_enabled() else _NOTHING


class _Counted:
    """Out of inference mode, and still without gradients."""

    def __enter__(self) -> None:
        self._mode, self._gradients = torch.inference_mode(False), torch.no_grad()
        self._mode.__enter__()
        self._gradients.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._gradients.__exit__(*error)
        self._mode.__exit__(*error)


_NOTHING = nullcontext()


def together_shape(input: Tensor, skip: Tensor) -> torch.Size:
    return torch.Size((input.shape[0], input.shape[1] + skip.shape[1], *input.shape[2:]))


def plainly(device: torch.device, *tensors: Tensor | None) -> str:
    """Why a call on ``device`` is plain torch's whatever its shapes are; empty where neither autograd nor autocast must see it."""
    if autocast_active(device):
        return "autocast chooses the dtypes of plain torch"
    return "gradients go through plain torch" if _dispatch.needs_grad(*tensors) else ""
