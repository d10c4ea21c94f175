"""`upsample_conv2d`: nearest upsampling by two and the 3x3 convolution after it, without the image between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import upsample_conv2d as reference
from ._check import fail, shape_of
from ._convolution import Convolution
from ._convolution_plan import TRANSPOSED_PIXELS, ConvolutionPlan
from ._watchers import autocast_active


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
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
    r"""``conv2d(interpolate(input, scale_factor=2, mode="nearest"), weight, bias, padding=1)``, without the image between them.

    .. math:: y = \big(w * up(act(input \cdot input\_scale + input\_shift)) + bias + embedding + residual\big) \cdot output\_scale

    Of each 2x2 pixels of the output one sees a kernel of 2x2 sums of the weights on the small input, its own of four, so that 4
    multiplications are left of 9. On the CPU, without gradients, they go through Winograd's F(4x4, 3x3) or F(2x2, 3x3) in fp32
    wherever a table says that they are faster: the four kernels share one transformed input, and 1.56 or 2.25 multiplications are
    left; in bfloat16, where the processor has matrix tiles (AMX), those 4 go directly through them, by sums of weights that are
    rounded to bfloat16. Where neither is faster, and with gradients, a float32 image that is large enough is one transposed
    convolution of the library; all else is the library's convolution of the upsampled image. :func:`upsample_conv2d_plan` says
    which, and why.

    The error, what turns Winograd off and the packed weights are as in :func:`conv2d`; those take, in fp32, 11.1 times the memory
    of the weight's elements for F(4x4) and 4 times for F(2x2). :func:`conv2d_memory_limit` counts them in.

    Args:
        input: [N, C, H, W], contiguous or channels-last or a slice of either; float64, float32, bfloat16 or float16.
        weight: [K, C, 3, 3].
        bias: [K].
        skip: [N, C', H, W], a second input, whose channels come after those of ``input``; C is then the channels of both. The
            kernels read it where it lies, plain torch makes one of the two.
        input_scale, input_shift: [N, C].
        activation: None or ``"silu"``.
        embedding: [N, K].
        residual: of the shape of the output.
        output_scale: a number, multiplied last.
        gather_moments: a hint that a norm of fastgen's reads the output next. Where Winograd's kernels or that of 1x1 take the
            call, and the output is of 4 MiB or more, they gather the moments of its channels as they store it and keep them beside
            it, for :func:`group_norm_affine`; elsewhere, where it was not faster, it does nothing.

    Returns:
        [N, K, 2H, 2W] in the dtype of ``input``, channels-last if ``input`` is, else contiguous; of the library's convolution in
        the layout that it returns. Differentiable in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape, a device or the activation does not fit; the message names the argument.
    """
    return _UPSAMPLE_CONV2D(
        input, weight, (), bias, input_scale, input_shift, activation, embedding, residual, output_scale, skip,
        gather_moments,
    )  # fmt: skip


def upsample_conv2d_plan(input: Tensor, weight: Tensor, *, skip: Tensor | None = None) -> ConvolutionPlan:
    """Which algorithm :func:`upsample_conv2d` takes, as things are now (gradients, autocast, `fastgen.set_exact`, memory), and why.

    Raises:
        TypeError, ValueError: as :func:`upsample_conv2d`.
    """
    return _UPSAMPLE_CONV2D.plan(input, weight, (), skip)


def _geometry(input: Tensor, weight: Tensor, channels: int) -> tuple[tuple[()], tuple[int, int]]:
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.shape[1] != channels:
        whole = (input.shape[0], channels, *input.shape[2:])
        fail("upsample_conv2d", f"weight must be [K, C, 3, 3], got {shape_of(weight)} with input of shape {whole}")
    if 0 in weight.shape:
        fail("upsample_conv2d", f"weight must not be empty, got {shape_of(weight)}")
    if 0 in input.shape[2:]:
        fail("upsample_conv2d", f"input must have a pixel, got {shape_of(input)}")
    return (), reference.output_size(input)


def _library(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The library's way: 16 multiply-adds a pixel of the input, where sums of the weights cost less than they save, or 36."""
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    on_cpu = input.device.type == "cpu" and not autocast_active(input.device)
    if on_cpu and input.dtype == weight.dtype == torch.float32 and pixels >= TRANSPOSED_PIXELS:
        return F.conv_transpose2d(input, _transposed(weight), bias, stride=2, padding=1)
    return F.conv2d(reference.upsampled(input), weight, bias, padding=1)


def _transposed(weight: Tensor) -> Tensor:
    """[C, K, 4, 4] whose transposed convolution of stride 2 is the convolution by ``weight`` of the image upsampled by two."""
    taps = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # of each of four, summed
    sums = weight.flatten(2) @ torch.kron(taps, taps).t()  # [K, C, 16]
    return sums.unflatten(2, (4, 4)).transpose(0, 1)


_UPSAMPLE_CONV2D = Convolution("upsample_conv2d", 2, _geometry, _library)
_UPSAMPLE_CONV2D.register(reference.upsample_conv2d_fwd_check)
