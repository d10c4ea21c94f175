"""`masked_conv2d`: the causal convolutions of PixelCNN and its kin, by the taps of the mask alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _library
from .._schema import MASK_TYPES
from ..reference import _masked_taps
from ..reference import masked_conv2d as reference
from . import _packed_weights
from ._autograd import apply
from ._check import check_floating, fail, shape_of
from ._dtypes import foreign, in_float32
from ._packed_weights import WEIGHTS
from ._watchers import autocast_active, in_autocast_dtype, watched

_CODE = {name: code for code, name in enumerate(MASK_TYPES)}
_LEAST_OUTPUTS = 8  # of a group: half a panel; of fewer most of our products would be of zeros

# Variant -> the dtypes in which our products, in fp32 from packed weights, are faster than the library's convolution by rectangles
# of taps, which computes in fp32 too. avx2: EPYC 7xx3 (Zen 3); avx512 to amx: a Xeon with AMX, 1.05 to 2.5 times as fast.
PACKED: dict[str, frozenset[torch.dtype]] = {
    "portable": frozenset(),
    "avx2": frozenset({torch.float32, torch.bfloat16, torch.float16}),
    "avx512": frozenset({torch.float32, torch.bfloat16, torch.float16}),
    "avx512_bf16": frozenset({torch.float32, torch.bfloat16, torch.float16}),
    "amx": frozenset({torch.float32, torch.bfloat16, torch.float16}),
}


class MaskedConvolutionPlan(NamedTuple):
    """How :func:`masked_conv2d` computes on the CPU: whether with ``packed`` weights, the ``reason``, and their bytes."""

    packed: bool
    reason: str
    weight_bytes: int


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    color_channels: int = 1,
) -> Tensor:
    r"""A convolution of stride 1 that keeps the size and sees a part of its kernel, zeros standing around the image.

    .. math:: y_{o}(p) = bias_o + \sum_{t \in taps} \sum_i [mask_{oit}]\, weight_{oit}\, input_i(p + dilation\,(t - origin))

    What the mask hides is neither read nor computed: whatever stands there in the weight, or in the pixels of the image that an
    output may not see, has no part in it, NaN included, and the gradient of the weight is exactly 0 there. No algorithm that mixes
    pixels in its rounding (Winograd's) is used, so an output does not depend on a pixel it may not see by a single bit.

    ========================  ====================================================================================
    ``mask_type``             what an output sees
    ========================  ====================================================================================
    ``A``, ``B``              the rows above and what is left of it; B also itself
    ``vertical_A``, ``_B``    the rows above, all columns; B also its own row, whole
    ``horizontal_A``, ``_B``  what is left of it in its row; B also itself
    ``down``                  kh - 1 rows above and its own, (kw - 1) / 2 columns to both sides: no tap is masked
    ``down_right``            kh - 1 rows above and its own, kw - 1 columns to the left and its own: none is masked
    ========================  ====================================================================================

    On the CPU the weights of the taps are packed and kept as those of :func:`fastgen.ops.conv2d`, under the same limit of memory;
    float64, groups of few channels and variants whose library is faster go through the library's convolution, a rectangle of taps
    at a time: :func:`masked_conv2d_plan` says which, and why.

    Args:
        input: [N, C, H, W]; float64, float32, bfloat16 or float16.
        weight: [K, C / groups, kh, kw], the whole kernel, as checkpoints have it; odd but for the shifted masks, of which ``down``
            takes any height and ``down_right`` any height and width.
        bias: [K].
        mask_type: one of :data:`MASK_TYPES`.
        dilation: one number, or two, of rows and of columns.
        groups: as in `torch.nn.functional.conv2d`.
        color_channels: into how many colors, in order, the C and the K channels are divided evenly: at the centre tap A sees the
            colors before its own, B also its own. 1 where the mask has no centre (vertical, down).

    Returns:
        [N, K, H, W] in the dtype of ``input``, or of autocast, channels-last if ``input`` is, else contiguous. Differentiable once
        in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape, a device, ``mask_type`` or a number does not fit; the message names the argument.

    Sources: van den Oord, Kalchbrenner and Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016; van den Oord et al., "Conditional
    Image Generation with PixelCNN Decoders", 2016; Salimans et al., "PixelCNN++", 2017.
    """
    geometry = _checked(input, weight, bias, mask_type, dilation, groups, color_channels)
    if autocast_active(input.device):
        input, weight = in_autocast_dtype(input), in_autocast_dtype(weight)
        bias = None if bias is None else in_autocast_dtype(bias)
        with torch.autocast(input.device.type, enabled=False):  # what is summed in float32 is to stay so
            return _typed(input, weight, bias, *geometry)
    return _typed(input, weight, bias, *geometry)


def _typed(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Once no autocast is at work."""
    if foreign(input, weight, bias):
        return in_float32("masked_conv2d", _call, input.dtype)(input, weight, bias, *geometry)
    return _call(input, weight, bias, *geometry)


def masked_conv2d_mask(
    mask_type: str,
    weight_shape: Sequence[int],
    *,
    groups: int = 1,
    color_channels: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of :func:`masked_conv2d` for a weight of that shape.

    Returns:
        [K, C / groups, kh, kw], boolean: True where the weight is read.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
    """
    _check_mask("masked_conv2d_mask", "weight_shape", mask_type, weight_shape, groups, color_channels)
    return _masked_taps.mask(_CODE[mask_type], weight_shape, groups, color_channels, device)


def masked_conv2d_plan(input: Tensor, weight: Tensor, *, mask_type: str, groups: int = 1) -> MaskedConvolutionPlan:
    """How :func:`masked_conv2d` computes a call on the CPU, as things are now (kept weights, memory), and why.

    Raises:
        TypeError, ValueError: as :func:`masked_conv2d`.
    """
    code = _checked(input, weight, None, mask_type, 1, groups, 1)[0]
    return _choose(
        input, weight, groups, _packed_bytes(weight, code, groups), (code, groups, 1) in WEIGHTS.find(weight)
    )


def _checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    dilation: int | Sequence[int],
    groups: int,
    color_channels: int,
) -> tuple[int, tuple[int, int], int, int]:
    """The geometry as the raw op takes it, once all arguments fit."""
    op = "masked_conv2d"
    check_floating(op, "input", input)
    check_floating(op, "weight", weight)
    if input.dim() != 4:
        fail(op, f"input must be [N, C, H, W], got {shape_of(input)}")
    shape = _check_mask(op, "weight", mask_type, weight.shape, groups, color_channels)
    if shape[1] * groups != input.shape[1]:
        given = f"{shape_of(weight)} with groups={groups} and input of {shape_of(input)}"
        fail(op, f"weight must be [K, C / groups, kh, kw], got {given}")
    if bias is not None:
        check_floating(op, "bias", bias)
        if bias.shape != shape[:1]:
            fail(op, f"bias must have shape ({shape[0]},), got {shape_of(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            fail(op, f"{name} must be on the device of input ({input.device}), got {tensor.device}")
    pair = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if len(pair) != 2 or not all(isinstance(d, int) and d >= 1 for d in pair):
        fail(op, f"dilation must be one or two integers of at least 1, got {dilation!r}")
    return _CODE[mask_type], (pair[0], pair[1]), groups, color_channels


def _check_mask(
    op: str, name: str, mask_type: str, shape: Sequence[int], groups: int, colors: int
) -> tuple[int, int, int, int]:
    """``shape`` of a weight, whose argument has this ``name``, fits the mask."""
    code = _CODE.get(mask_type)
    if code is None:
        fail(op, f"mask_type must be one of {MASK_TYPES}, got {mask_type!r}")
    if len(shape) != 4 or 0 in shape or groups < 1 or shape[0] % groups:
        fail(op, f"{name} must be [K, C / groups, kh, kw] and not empty, got {tuple(shape)} with groups={groups}")
    outputs, inputs, height, width = shape
    if not _masked_taps.fits_kernel(code, (height, width)):
        odd = "an odd width" if mask_type == "down" else "an odd height and width"
        fail(op, f"{name} must have a kernel of {odd} for mask_type={mask_type!r}, got {height}x{width}")
    if colors < 1 or outputs % colors or inputs * groups % colors:
        given = f"color_channels={colors} with C={inputs * groups} and K={outputs}"
        fail(op, f"color_channels must divide the channels of input and output, got {given}")
    if colors > 1 and not _masked_taps.orders_colors(code):
        fail(op, f"color_channels must be 1 for mask_type={mask_type!r}, which has no centre to order, got {colors}")
    return outputs, inputs, height, width


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    if _dispatch.needs_grad(input, weight, bias):
        output: Tensor = apply(_MaskedConv2d, input, weight, bias, *geometry)
        return output
    if input.is_cpu and _library.ISA is not None and not watched():
        return _compute(input, weight, bias, *geometry)
    return torch.ops.fastgen.masked_conv2d_fwd.default(input, weight, bias, *geometry)


def _packed_bytes(weight: Tensor, code: int, groups: int) -> int:
    """Of one color, about; of more, panels of a color end in zeros."""
    taps = len(_masked_taps.taps(code, weight.shape[2:]))
    outputs = -(-weight.shape[0] // groups // reference.PANEL) * reference.PANEL * groups
    return 4 * outputs * weight.shape[1] * taps


def _choose(input: Tensor, weight: Tensor, groups: int, size: int, kept: bool) -> MaskedConvolutionPlan:
    """``size``: bytes of the packed weights; ``kept``: whether they are there."""
    isa = _library.ISA or "no"
    if input.dtype not in PACKED.get(isa, ()) or weight.dtype == torch.float64:
        return MaskedConvolutionPlan(False, f"the library computes {input.dtype} beside {isa} kernels", 0)
    if min(weight.shape[0] // groups, input.shape[1]) < _LEAST_OUTPUTS and groups > 1:
        return MaskedConvolutionPlan(False, "groups of few channels leave our products empty", 0)
    if not kept and size > WEIGHTS.limit - WEIGHTS.bytes:
        return MaskedConvolutionPlan(False, f"the packed weights ({size / 2**20:.1f} MiB) are past the memory limit", 0)
    return MaskedConvolutionPlan(True, "our products by the taps alone are faster, by the table", size)


def _compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    code: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> Tensor:
    """By the plan, made at each call, so that a compiled graph follows the weight."""
    purpose = (code, groups, color_channels)
    packed = WEIGHTS.find(weight).get(purpose)
    plan = _choose(input, weight, groups, _packed_bytes(weight, code, groups), packed is not None)
    if not plan.packed:
        return reference.masked_conv2d_fwd(input, weight, bias, code, dilation, groups, color_channels)
    if packed is None:

        def pack(weight: Tensor) -> Tensor:
            packed: Tensor = torch.ops.fastgen.masked_conv2d_pack.default(weight, *purpose, False)
            return packed

        packed = pack(weight) if _packed_weights.reasons(weight) else WEIGHTS.make(weight, purpose, pack)
    return torch.ops.fastgen.masked_conv2d_packed.default(
        input, packed, weight.shape[0], bias, weight.shape[2:], code, dilation, groups, color_channels, False
    )


def _masked_conv2d_fwd(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """The raw op on the CPU."""
    reference.masked_conv2d_fwd_check(input, weight, *args)
    return _compute(input, weight, *args)


def _masked_conv2d_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    code: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The raw op on the CPU. The weights are packed anew: a step of training changes them."""
    args = (grad_output, input, weight, code, dilation, groups, color_channels, wants_input, wants_weight)
    reference.masked_conv2d_bwd_check(*args)
    if not _choose(input, weight, groups, 0, True).packed:
        return reference.masked_conv2d_bwd(*args)
    ops, kernel = torch.ops.fastgen, weight.shape[2:]
    by_input, by_weight = input.new_empty(0), weight.new_empty(0)
    geometry = (code, dilation, groups, color_channels)
    grad = grad_output.to(input.dtype)
    if wants_input:
        packed = ops.masked_conv2d_pack.default(weight, code, groups, color_channels, True)
        by_input = ops.masked_conv2d_packed.default(grad, packed, input.shape[1], None, kernel, *geometry, True)
        by_input = reference.as_laid_out(by_input, input)
    if wants_weight:
        by_weight = ops.masked_conv2d_weight_bwd.default(grad, input, kernel, *geometry).to(weight.dtype)
    return by_input, by_weight


if _library.ISA is not None:  # where no kernel is loaded the reference answers
    _library.implement("masked_conv2d_fwd", _masked_conv2d_fwd)
    _library.implement("masked_conv2d_bwd", _masked_conv2d_bwd)


class _MaskedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        output: Tensor = torch.ops.fastgen.masked_conv2d_fwd.default(*args)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, *ctx.geometry = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        in_input, in_weight, in_bias = ctx.needs_input_grad[:3]
        by_input, by_weight = None, None
        if in_input or in_weight:
            by_input, by_weight = torch.ops.fastgen.masked_conv2d_bwd.default(
                grad_output, input, weight, *ctx.geometry, in_input, in_weight
            )
        by_bias = grad_output.sum((0, 2, 3)).to(ctx.bias_dtype) if in_bias else None
        return by_input if in_input else None, by_weight if in_weight else None, by_bias, None, None, None, None
