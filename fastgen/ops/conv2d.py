"""`conv2d`: a convolution with the norm's affine map and the activation before it and the sums of a residual block after it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _library
from .._schema import ACTIVATIONS
from ..reference import conv2d as reference
from ..reference._layout import opmath_dtype
from . import _conv2d_plan
from ._check import check_floating, fail, shape_of
from ._conv2d_plan import Conv2dPlan
from ._dtypes import foreign, in_float32
from ._packed_weights import WEIGHTS, default_limit
from ._watchers import autocast_active, watched

_ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    activation: str | None = None,
    embedding: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
) -> Tensor:
    r"""`torch.nn.functional.conv2d`, fused with what a U-Net puts before and after it.

    .. math:: y = \big(w * act(input \cdot input\_scale + input\_shift) + bias + embedding + residual\big) \cdot output\_scale

    The zeros of the padding stand around what the activation returns, as they do in a chain of modules. With the scale and shift of
    :func:`fastgen.ops.group_norm_affine` this is GroupNorm, SiLU and convolution.

    On the CPU, without gradients, 3x3 kernels of stride 1 and padding 1 go through Winograd's F(4x4, 3x3) or F(2x2, 3x3) in
    fp32 wherever a table says that they are faster, and 1x1 kernels through one matrix product. Everything else, float64,
    gradients and autocast included, is the library's convolution in plain torch. :func:`conv2d_plan` says which, and why.

    The error of Winograd's algorithms, in fp32, is at most 2e-5 of the norm of the output; for weights and inputs that cancel, of
    the norm of the convolution of their magnitudes. ``fastgen.set_exact(True)`` turns them off.

    Packed weights, in fp32 four times the memory of the weight's elements for F(4x4) and 1.8 times for F(2x2), are made at the
    first call and kept until the weight changes or dies. An operation in place under ``no_grad``, `load_state_dict` and a new
    ``.data`` are seen; of what is done in place to ``.data`` itself, changes of the whole tensor, but not of a few elements.

    Args:
        input: [N, C, H, W], contiguous or channels-last or a slice of either; float64, float32, bfloat16 or float16.
        weight: [K, C / groups, kh, kw].
        bias: [K].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; ``"same"`` where both sides get the same padding.
        input_scale, input_shift: [N, C].
        activation: None or ``"silu"``.
        embedding: [N, K], the time embedding of a residual block.
        residual: of the shape of the output.
        output_scale: a number, multiplied last.

    Returns:
        [N, K, H', W'] in the dtype of ``input``, channels-last if ``input`` is, else contiguous; of the library's convolution in
        the layout that it returns. Differentiable in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape, a device, the activation or the padding does not fit; the message names the argument.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """
    code = _ACTIVATION_CODE.get(activation)
    if code is None:
        fail("conv2d", f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    stride, padding, dilation = _geometry(input, weight, stride, padding, dilation, groups)
    operands = (input_scale, input_shift, code, embedding, residual, float(output_scale))
    _check_operands(input, weight, bias, stride, padding, dilation, *operands)
    tensors = (input, weight, bias, input_scale, input_shift, embedding, residual)
    function = in_float32("conv2d", _call, input.dtype) if foreign(*tensors) else _call
    return function(input, weight, bias, stride, padding, dilation, groups, *operands)


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """By plain torch, or by the kernels where they can take the call and nobody must see what it is made of."""
    tensors = (weight, bias, *(arg for arg in args if isinstance(arg, Tensor)))
    function: Any = _plain
    if not _watched(input.device, input, *tensors) and not _conv2d_plan.reasons(input, weight, *args[:4]):
        function = torch.ops.fastgen.conv2d_fwd.default if watched() else _compute
    return function(input, weight, bias, *args)


def conv2d_plan(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Conv2dPlan:
    """Which algorithm :func:`conv2d` takes, as things are now (gradients, autocast, `fastgen.set_exact`, memory), and why.

    Returns:
        A :class:`Conv2dPlan` with ``algorithm``, ``reason``, ``outputs`` (a side of a tile) and ``weight_bytes``.

    Raises:
        TypeError, ValueError: as :func:`conv2d`.
    """
    geometry = _geometry(input, weight, stride, padding, dilation, groups)
    if why := _watched(input.device, input, weight):
        return _conv2d_plan.library_plan(why)
    if refusals := _conv2d_plan.reasons(input, weight, *geometry, groups):
        return _conv2d_plan.library_plan(refusals[0])
    return _conv2d_plan.choose(input, weight, WEIGHTS.find(weight))


def conv2d_memory_limit(limit: int | None) -> int:
    """Set how many bytes the packed weights of all convolutions may take together; None is the default, a quarter of the memory.

    A weight whose packed form does not fit takes the next smaller one, then the library's convolution. What is kept already stays.

    Returns:
        The limit until now.

    Raises:
        ValueError: ``limit`` is negative.
    """
    if limit is not None and limit < 0:
        fail("conv2d_memory_limit", f"limit must be None or a number of bytes, got {limit}")
    before, WEIGHTS.limit = WEIGHTS.limit, default_limit() if limit is None else limit
    return before


def _geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation as pairs, once input and weight fit each other."""
    check_floating("conv2d", "input", input)
    check_floating("conv2d", "weight", weight)
    if input.dim() != 4:
        fail("conv2d", f"input must be [N, C, H, W], got {shape_of(input)}")
    if groups < 1 or weight.dim() != 4 or weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups:
        given = f"{shape_of(weight)} with groups={groups} and input of {shape_of(input)}"
        fail("conv2d", f"weight must be [K, C / groups, kh, kw], got {given}")
    if 0 in weight.shape:
        fail("conv2d", f"weight must not be empty, got {shape_of(weight)}")
    if weight.device != input.device:
        fail("conv2d", f"weight must be on the device of input ({input.device}), got {weight.device}")
    steps, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if padding not in ("valid", "same") or (padding == "same" and (steps != (1, 1) or any(r % 2 for r in reach))):
            fail(
                "conv2d", f"padding must be numbers, 'valid', or 'same' with stride 1 and equal sides, got {padding!r}"
            )
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    paddings = _pair("padding", padding, 0)
    for size, kernel, step, pad, dilation in zip(
        input.shape[2:], weight.shape[2:], steps, paddings, dilations, strict=True
    ):
        if reference.output_size(size, kernel, step, pad, dilation) < 1:
            fail("conv2d", f"the kernel of {shape_of(weight)} is larger than the padded input of {shape_of(input)}")
    return steps, paddings, dilations


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or min(pair) < least:
        fail("conv2d", f"{name} must be one or two integers of at least {least}, got {value!r}")
    return pair[0], pair[1]


def _check_operands(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    code: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> None:
    n, c, k = input.shape[0], input.shape[1], weight.shape[0]
    per_channel = ("bias", bias, (k,)), ("input_scale", input_scale, (n, c)), ("input_shift", input_shift, (n, c))
    for name, tensor, shape in (*per_channel, ("embedding", embedding, (n, k))):
        if tensor is not None:
            _check_operand(name, tensor, shape, input)
    if residual is not None:
        size = (
            reference.output_size(*of)
            for of in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        )
        _check_operand("residual", residual, (n, k, *size), input)


def _check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    check_floating("conv2d", name, tensor)
    if tensor.shape != shape:
        fail("conv2d", f"{name} must have shape {shape}, got {shape_of(tensor)} with input of {shape_of(input)}")
    if tensor.device != input.device:
        fail("conv2d", f"{name} must be on the device of input ({input.device}), got {tensor.device}")


def _watched(device: torch.device, *tensors: Tensor | None) -> str:
    """Why a call on ``device`` is plain torch's whatever its shapes are; empty where neither autograd nor autocast must see it."""
    if autocast_active(device):
        return "autocast chooses the dtypes of plain torch"
    return "gradients go through plain torch" if _dispatch.needs_grad(*tensors) else ""


def _plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> Tensor:
    """By the library's convolution in the dtype of ``input``, or of autocast; what stands around it in plain torch."""
    y, autocast = input, autocast_active(input.device)
    if input_scale is not None or input_shift is not None or activation:
        y = reference.prologue(y.to(opmath_dtype(y.dtype)), input_scale, input_shift, activation).to(y.dtype)
    if not autocast:
        weight, bias = weight.to(y.dtype), None if bias is None else bias.to(y.dtype)
    y = F.conv2d(y, weight, bias, list(stride), list(padding), list(dilation), groups)
    if embedding is None and residual is None and output_scale == 1.0:
        return y
    dtype = torch.result_type(y, residual) if autocast and residual is not None else y.dtype
    return reference.epilogue(y.to(opmath_dtype(dtype)), None, embedding, residual, output_scale).to(dtype)


def _compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> Tensor:
    """A call that the kernels can take. The plan is made at each, so that a compiled graph follows the weight and the switches."""
    kept = WEIGHTS.find(weight)
    outputs = _conv2d_plan.choose(input, weight, kept).outputs
    if outputs == 0:
        return _library_laid_out(
            input, weight, bias, stride, padding, dilation, groups,
            input_scale, input_shift, activation, embedding, residual, output_scale,
        )  # fmt: skip
    packed = kept.get(outputs)
    if packed is None:
        packed = WEIGHTS.make(weight, outputs, lambda memory: torch.ops.fastgen.conv2d_pack.default(memory, outputs))
    if residual is not None and residual.dtype != input.dtype:
        residual = residual.to(input.dtype)
    return torch.ops.fastgen.conv2d_packed.default(
        input, packed, weight.shape[0], bias, input_scale, input_shift, activation, embedding, residual, output_scale
    )


def _library_laid_out(input: Tensor, *args: Any) -> Tensor:
    """:func:`_plain` in the layout that the fake promises."""
    y = _plain(input, *args)
    return y if list(y.stride()) == reference.output_strides(y.shape, input) else reference.in_layout(y, input)


def _conv2d_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """The raw op on the CPU."""
    reference.conv2d_fwd_check(input, weight, bias, *args)
    function = _library_laid_out if _conv2d_plan.reasons(input, weight, *args[:4]) else _compute
    return function(input, weight, bias, *args)


if _library.ISA is not None:  # where no kernel is loaded the reference answers
    _library.implement("conv2d_fwd", _conv2d_fwd)
