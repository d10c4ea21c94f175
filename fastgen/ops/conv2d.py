"""`conv2d`: a convolution with the norm's affine map and the activation before it and the sums of a residual block after it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
from .. import _library as _library_loading
from ..reference import conv2d as reference
from ._check import fail, shape_of
from ._convolution import Convolution, plainly
from ._convolution_plan import ConvolutionPlan
from ._packed_weights import WEIGHTS, default_limit
from ._watchers import autocast_active

_SMALL_IMAGE = 1024  # pixels


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    skip: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    activation: str | None = None,
    embedding: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    gather_moments: bool = False,
) -> Tensor:
    r"""`torch.nn.functional.conv2d`, fused with what a U-Net puts before and after it.

    .. math:: y = \big(w * act(input \cdot input\_scale + input\_shift) + bias + embedding + residual\big) \cdot output\_scale

    The zeros of the padding stand around what the activation returns, as they do in a chain of modules. With the scale and shift of
    :func:`fastgen.ops.group_norm_affine` this is GroupNorm, SiLU and convolution.

    On the CPU, without gradients, 3x3 kernels of stride 1 and padding 1 go through Winograd's F(4x4, 3x3) or F(2x2, 3x3) in
    fp32 wherever a table says that they are faster, and 1x1 kernels through one matrix product; in bfloat16, where the processor
    has matrix tiles (AMX), either goes directly through those. Everything else, float64, gradients and autocast included, is the
    library's convolution in plain torch. :func:`conv2d_plan` says which, and why.

    The error of Winograd's algorithms, in fp32, is at most 2e-5 of the norm of the output; for weights and inputs that cancel, of
    the norm of the convolution of their magnitudes. ``fastgen.set_exact(True)`` turns them off; matrix tiles round no more than the
    library does, and stay.

    Packed weights, in fp32 four times the memory of the weight's elements for F(4x4) and 1.8 times for F(2x2), are made at the
    first call and kept until the weight changes or dies. An operation in place under ``no_grad``, `load_state_dict` and a new
    ``.data`` are seen; of what is done in place to ``.data`` itself, changes of the whole tensor, but not of a few elements.

    Args:
        input: [N, C, H, W], contiguous or channels-last or a slice of either; float64, float32, bfloat16 or float16.
        weight: [K, C / groups, kh, kw].
        bias: [K].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; ``"same"`` where both sides get the same padding.
        skip: [N, C', H, W], a second input, whose channels come after those of ``input``; C is then the channels of both. The
            kernels read it where it lies, plain torch makes one of the two.
        input_scale, input_shift: [N, C].
        activation: None or ``"silu"``.
        embedding: [N, K], the time embedding of a residual block.
        residual: of the shape of the output.
        output_scale: a number, multiplied last.
        gather_moments: a hint that a norm of fastgen's reads the output next. Where Winograd's kernels or that of 1x1 take the
            call, and the output is of 4 MiB or more, they gather the moments of its channels as they store it and keep them beside
            it, for :func:`group_norm_affine`; elsewhere, where it was not faster, it does nothing.

    Returns:
        [N, K, H', W'] in the dtype of ``input``, channels-last if ``input`` is, else contiguous; of the library's convolution in
        the layout that it returns. Differentiable in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape, a device, the activation or the padding does not fit; the message names the argument.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """
    geometry = stride, padding, dilation, groups
    return _CONV2D(
        input, weight, geometry, bias, input_scale, input_shift, activation, embedding, residual, output_scale, skip,
        gather_moments,
    )  # fmt: skip


def conv2d_plan(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    skip: Tensor | None = None,
) -> ConvolutionPlan:
    """Which algorithm :func:`conv2d` takes, as things are now (gradients, autocast, `fastgen.set_exact`, memory), and why.

    Returns:
        A :class:`ConvolutionPlan` with ``algorithm``, ``reason``, ``outputs`` (a side of a tile) and ``weight_bytes``.

    Raises:
        TypeError, ValueError: as :func:`conv2d`.
    """
    return _CONV2D.plan(input, weight, (stride, padding, dilation, groups), skip)


def conv2d_memory_limit(limit: int | None) -> int:
    """Set how many bytes all packed weights may take together, `geglu`'s too; None is the default, a quarter of the memory.

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
    channels: int,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Stride, padding and dilation as pairs, and the size of the output."""
    if groups < 1 or weight.dim() != 4 or weight.shape[1] * groups != channels or weight.shape[0] % groups:
        whole = (input.shape[0], channels, *input.shape[2:])
        given = f"{shape_of(weight)} with groups={groups} and input of shape {whole}"
        fail("conv2d", f"weight must be [K, C / groups, kh, kw], got {given}")
    if 0 in weight.shape:
        fail("conv2d", f"weight must not be empty, got {shape_of(weight)}")
    steps, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if padding not in ("valid", "same") or (padding == "same" and (steps != (1, 1) or any(r % 2 for r in reach))):
            fail(
                "conv2d", f"padding must be numbers, 'valid', or 'same' with stride 1 and equal sides, got {padding!r}"
            )
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    paddings = _pair("padding", padding, 0)
    size = tuple(
        reference.output_size(*of)
        for of in zip(input.shape[2:], weight.shape[2:], steps, paddings, dilations, strict=True)
    )
    if min(size) < 1:
        fail("conv2d", f"the kernel of {shape_of(weight)} is larger than the padded input of {shape_of(input)}")
    return (steps, paddings, dilations, groups), size


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or min(pair) < least:
        fail("conv2d", f"{name} must be one or two integers of at least {least}, got {value!r}")
    return pair[0], pair[1]


def _library(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    single = tuple(stride) == tuple(weight.shape[2:]) == (1, 1) and not any(padding) and groups == 1
    if single and _as_product(input, weight, bias):
        of_pixel, pixels = weight.flatten(1), input.flatten(2)
        if bias is None:
            return torch.matmul(of_pixel, pixels).unflatten(2, input.shape[2:])
        return torch.baddbmm(bias[:, None], of_pixel.expand(len(pixels), -1, -1), pixels).unflatten(2, input.shape[2:])
    return F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)


def _as_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a 1x1 kernel over an image that lies channel by channel is a product rather than a convolution of the library, which
    puts such an image into another order and back: 0.4 to 0.9 of its time in bfloat16, 0.5 to 1.03 in float32 of images of up to
    1,024 pixels (an EPYC with AVX512-BF16).
    """
    small, of_pairs = input.shape[2] * input.shape[3] <= _SMALL_IMAGE, _library_loading.ISA in ("avx512_bf16", "amx")
    return (
        input.is_cpu
        and input.is_contiguous()
        and ((input.dtype == torch.float32 and small) or (input.dtype == torch.bfloat16 and of_pairs))
        and weight.dtype == input.dtype
        and not autocast_active(input.device)
        and not _dispatch.needs_grad(input, weight, bias)
    )


def reads_in_parts(
    input: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    *_: Any,
) -> bool:
    """Whether the library's convolution by a 1x1 kernel is two products of two inputs, each where it lies: of float32 with the
    channels innermost 1.03 to 1.5 times as fast as to make one of them (a Xeon); in bfloat16 it is not always."""
    if weight.shape[2:] != (1, 1) or tuple(stride) != (1, 1) or not (padding == "valid" or not any(padding)):
        return False
    if weight.shape[1] != input.shape[1] + skip.shape[1] or weight.dtype != torch.float32:
        return False
    lie = (t.dtype == torch.float32 and t.is_contiguous(memory_format=torch.channels_last) for t in (input, skip))
    return input.is_cpu and all(lie) and not plainly(input.device, input, skip, weight, bias)


def _in_parts(input: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor | None:
    if not reads_in_parts(input, skip, weight, bias, *geometry):
        return None
    n, c, height, width = input.shape
    first, second = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (input, skip))
    of_pixel = weight.flatten(1).t()
    y = first @ of_pixel[:c] if bias is None else torch.addmm(bias, first, of_pixel[:c])
    return y.addmm_(second, of_pixel[c:]).view(n, height, width, len(weight)).permute(0, 3, 1, 2)


_CONV2D = Convolution("conv2d", 1, _geometry, _library, _in_parts)
_CONV2D.register(reference.conv2d_fwd_check)
