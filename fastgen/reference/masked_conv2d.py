"""What `masked_conv2d` means, in plain torch: van den Oord et al., "Pixel Recurrent Neural Networks" and "Conditional Image
Generation with PixelCNN Decoders", 2016; the shifted kernels of Salimans et al., "PixelCNN++", 2017.

A convolution by rectangles of taps: what is masked takes part in no product. And what its packed weights are: panels of PANEL
outputs, each panel of one group and one color.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .._schema import MASK_TYPES
from ._check import check_floats, check_main, require
from ._convolution import PANEL, check_image, empty, in_layout
from ._layout import copy_like, empty_like_layout, opmath_dtype, output_strides
from ._masked_taps import Rectangle, fits_kernel, mask, orders_colors, origin, rectangles, runs, taps

__all__ = ["mask", "taps"]


class _Part(NamedTuple):
    """A convolution that is part of the masked one: of a rectangle of taps, or of one color's channels at the centre."""

    outputs: slice
    inputs: slice  # of the image
    of_group: slice  # the same, of the weight
    taps: Rectangle
    groups: int

    def image(self, x: Tensor) -> Tensor:
        return F.pad(x[:, self.inputs], self.taps.pad)

    def of_weight(self) -> tuple[slice, ...]:
        rows, columns = self.taps.rows, self.taps.columns
        return self.outputs, self.of_group, slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def _parts(
    x: Tensor, weight: Tensor, mask_type: int, dilation: Sequence[int], groups: int, colors: int
) -> Iterator[_Part]:
    if x.numel() == 0:
        return
    kernel = weight.shape[2:]
    at, seen = origin(mask_type, kernel), taps(mask_type, kernel, colors)
    ordered = colors > 1 and orders_colors(mask_type)
    of_all = seen[:-1] if ordered else seen
    for rectangle in rectangles(of_all, kernel, at, dilation, x.shape[2:]):
        yield _Part(slice(None), slice(None), slice(None), rectangle, groups)
    if not ordered:
        return
    (centre,) = rectangles(seen[-1:], kernel, at, dilation, x.shape[2:])
    for run in runs(weight.shape[0], x.shape[1], mask_type, groups, colors):
        first = run.group * weight.shape[1]
        if run.low < run.high:
            inputs = slice(first + run.low, first + run.high)
            yield _Part(slice(run.first, run.last), inputs, slice(run.low, run.high), centre, 1)


def masked_conv2d_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> Tensor:
    """In the dtype of the input; the sums in fp32, or fp64 for fp64 input."""
    x = input.to(opmath_dtype(input.dtype))
    w = weight.to(x.dtype)
    y = x.new_zeros((x.shape[0], len(w), *x.shape[2:]))
    for part in _parts(x, w, mask_type, dilation, groups, color_channels):
        y[:, part.outputs] += F.conv2d(part.image(x), w[part.of_weight()], dilation=tuple(dilation), groups=part.groups)
    return in_layout(y if bias is None else y + bias.to(y.dtype)[:, None, None], input)


def masked_conv2d_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    x = input.to(opmath_dtype(input.dtype))
    grad, w = grad_output.to(x.dtype), weight.to(x.dtype)
    by_input, by_weight = torch.zeros_like(x), torch.zeros_like(w, memory_format=torch.contiguous_format)
    geometry = {"dilation": tuple(dilation)}
    for part in _parts(x, w, mask_type, dilation, groups, color_channels):
        image, of_weight, g = part.image(x), part.of_weight(), grad[:, part.outputs]
        if wants_input:
            of_image = conv2d_input(image.shape, w[of_weight], g, groups=part.groups, **geometry)
            by_input[:, part.inputs] += F.pad(of_image, [-p for p in part.taps.pad])
        if wants_weight:
            by_weight[of_weight] = conv2d_weight(image, w[of_weight].shape, g, groups=part.groups, **geometry)
    return (
        copy_like(by_input, input) if wants_input else input.new_empty(0),
        by_weight.to(weight.dtype) if wants_weight else weight.new_empty(0),
    )


def as_laid_out(y: Tensor, input: Tensor) -> Tensor:
    """``y`` in the layout of a gradient of ``input``, itself where it is."""
    return y if list(y.stride()) == output_strides(input) else copy_like(y, input)


def _cuts(
    outputs: int, inputs: int, mask_type: int, groups: int, colors: int, transposed: bool
) -> list[tuple[int, int]]:
    return [(run.first, run.last) for run in runs(outputs, inputs, mask_type, groups, colors, transposed)]


def masked_conv2d_pack(weight: Tensor, mask_type: int, groups: int, color_channels: int, transposed: bool) -> Tensor:
    """[K, C / groups, kh, kw] -> [panels, taps, C / groups, PANEL] in fp32, with zeros where a panel or a color ends."""
    live = mask(mask_type, weight.shape, groups, color_channels, weight.device)
    seen = taps(mask_type, weight.shape[2:], color_channels)
    w = torch.where(live, weight.float(), 0.0).flatten(2)[..., seen.start : seen.stop]  # [K, C / groups, taps]
    channels = len(w), w.shape[1] * groups
    if transposed:
        w, channels = _swapped(w, groups).flip(-1), channels[::-1]
    panels = [
        F.pad(w[first:last], (0, 0, 0, 0, 0, (first - last) % PANEL))
        for first, last in _cuts(*channels, mask_type, groups, color_channels, transposed)
    ]
    return torch.cat(panels).unflatten(0, (-1, PANEL)).permute(0, 3, 2, 1).contiguous()


def _swapped(w: Tensor, groups: int) -> Tensor:
    """[K, C / groups, *] -> [C, K / groups, *], and back."""
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def masked_conv2d_packed(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    transposed: bool,
) -> Tensor:
    """By the weight that was packed."""
    rows = packed.permute(0, 3, 2, 1).flatten(0, 1)  # [outputs and padding, inputs of a group, taps]
    kept, start = [], 0
    for first, last in _cuts(out_channels, input.shape[1], mask_type, groups, color_channels, transposed):
        kept.append(rows[start : start + last - first])
        start += -(-(last - first) // PANEL) * PANEL
    w = torch.cat(kept)
    if transposed:
        w = _swapped(w, groups).flip(-1)
    seen = taps(mask_type, kernel, color_channels)
    w = F.pad(w, (seen.start, kernel[0] * kernel[1] - seen.stop)).unflatten(-1, (kernel[0], kernel[1]))
    geometry = (mask_type, dilation, groups, color_channels)
    if not transposed:
        return masked_conv2d_fwd(input, w, bias, *geometry)
    image = input.new_zeros((1,)).expand(input.shape[0], out_channels, *input.shape[2:])
    y = masked_conv2d_bwd(input, image, w, *geometry, True, False)[0]
    return in_layout(y if bias is None else y + bias.to(y.dtype)[:, None, None], input)


def masked_conv2d_weight_bwd(
    grad_output: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> Tensor:
    shape = (grad_output.shape[1], input.shape[1] // groups, *kernel)
    weight = input.new_zeros((1,), dtype=torch.float32).expand(shape)
    return masked_conv2d_bwd(grad_output, input, weight, mask_type, dilation, groups, color_channels, False, True)[1]


def _check(
    op: str,
    image: Tensor,
    channels: tuple[int, int],
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> None:
    """``channels``: of the output and of the input of the convolution."""
    check_image(op, image)
    check_mask(op, channels, kernel, mask_type, groups, color_channels)
    fits = len(dilation) == 2 and min(dilation) >= 1
    require(op, fits, f"dilation must be two integers of at least 1, got {list(dilation)}")


def check_mask(
    op: str, channels: tuple[int, int], kernel: Sequence[int], mask_type: int, groups: int, color_channels: int
) -> None:
    require(op, 0 <= mask_type < len(MASK_TYPES), f"mask_type must be an index of MASK_TYPES, got {mask_type}")
    require(op, len(kernel) == 2 and min(kernel) >= 1, f"kernel must be two integers of at least 1, got {list(kernel)}")
    fits = fits_kernel(mask_type, kernel)
    require(op, fits, f"kernel must be odd for the mask {MASK_TYPES[mask_type]}, got {list(kernel)}")
    fits = groups >= 1 and min(channels) >= 1 and channels[0] % groups == 0 and channels[1] % groups == 0
    require(op, fits, f"groups must divide the channels, got groups={groups} and channels {channels}")
    colors = color_channels
    fits = colors >= 1 and channels[0] % colors == 0 and channels[1] % colors == 0
    require(op, fits, f"color_channels must divide the channels, got color_channels={colors} and channels {channels}")
    require(
        op, colors == 1 or orders_colors(mask_type), f"color_channels must be 1 for the mask {MASK_TYPES[mask_type]}"
    )


def masked_conv2d_fwd_check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    colors: int,
) -> None:
    op = "masked_conv2d_fwd"
    check_image(op, input)
    _check_weight(op, weight)
    _check(op, input, (weight.shape[0], input.shape[1]), weight.shape[2:], mask_type, dilation, groups, colors)
    check_floats(op, input, (weight.shape[0], input.shape[1] // groups, *weight.shape[2:]), weight=weight)
    check_floats(op, input, (weight.shape[0],), bias=bias)


def _check_weight(op: str, weight: Tensor) -> None:
    check_main(op, "weight", weight)
    fits = weight.dim() == 4 and min(weight.shape) >= 1
    require(op, fits, f"weight must be [K, C / groups, kh, kw] and not empty, got shape {tuple(weight.shape)}")


def masked_conv2d_bwd_check(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    wants_input: bool,
    wants_weight: bool,
) -> None:
    op = "masked_conv2d_bwd"
    check_image(op, input)
    _check_weight(op, weight)
    channels = (weight.shape[0], input.shape[1])
    _check(op, input, channels, weight.shape[2:], mask_type, dilation, groups, color_channels)
    check_floats(op, input, (channels[0], channels[1] // groups, *weight.shape[2:]), weight=weight)
    check_floats(op, input, (input.shape[0], channels[0], *input.shape[2:]), grad_output=grad_output)


def masked_conv2d_pack_check(
    weight: Tensor, mask_type: int, groups: int, color_channels: int, transposed: bool
) -> None:
    op = "masked_conv2d_pack"
    _check_weight(op, weight)
    channels = (weight.shape[0], weight.shape[1] * groups)
    check_mask(op, channels, weight.shape[2:], mask_type, groups, color_channels)


def masked_conv2d_packed_check(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    transposed: bool,
) -> None:
    op = "masked_conv2d_packed"
    check_image(op, input)
    require(op, input.dtype != torch.float64, "input must be float32, bfloat16 or float16")
    channels = (out_channels, input.shape[1])
    given = channels[::-1] if transposed else channels
    _check(op, input, given, kernel, mask_type, dilation, groups, color_channels)
    shape = _packed_shape(*channels, kernel, mask_type, groups, color_channels, transposed)
    fits = packed.dtype == torch.float32 and packed.is_contiguous()
    require(op, fits, "packed must be what masked_conv2d_pack returns")
    check_floats(op, input, shape, packed=packed)
    check_floats(op, input, (out_channels,), bias=bias)


def _packed_shape(
    outputs: int, inputs: int, kernel: Sequence[int], mask_type: int, groups: int, colors: int, transposed: bool
) -> tuple[int, int, int, int]:
    # what groups and colors cut depends on the numbers: symbolic ones are specialised
    cuts = _cuts(int(outputs), int(inputs), mask_type, groups, colors, transposed)
    panels = sum(-(-(last - first) // PANEL) for first, last in cuts)
    return panels, len(taps(mask_type, kernel, colors)), inputs // groups, PANEL


def masked_conv2d_weight_bwd_check(
    grad_output: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> None:
    op = "masked_conv2d_weight_bwd"
    check_image(op, input)
    check_main(op, "grad_output", grad_output)
    require(op, input.dtype != torch.float64, "input must be float32, bfloat16 or float16")
    require(op, grad_output.dtype == input.dtype, f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    require(op, grad_output.dim() == 4, f"grad_output must be [N, K, H, W], got shape {tuple(grad_output.shape)}")
    channels = (grad_output.shape[1], input.shape[1])
    _check(op, input, channels, kernel, mask_type, dilation, groups, color_channels)
    check_floats(op, input, (input.shape[0], channels[0], *input.shape[2:]), grad_output=grad_output)


def masked_conv2d_fwd_fake(input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return empty(input, weight.shape[0], input.shape[2:])


def masked_conv2d_bwd_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        empty_like_layout(input) if wants_input else input.new_empty(0),
        weight.new_empty(weight.shape) if wants_weight else weight.new_empty(0),
    )


def masked_conv2d_pack_fake(
    weight: Tensor, mask_type: int, groups: int, color_channels: int, transposed: bool
) -> Tensor:
    channels = (weight.shape[0], weight.shape[1] * groups)
    channels = channels[::-1] if transposed else channels
    shape = _packed_shape(*channels, weight.shape[2:], mask_type, groups, color_channels, transposed)
    return weight.new_empty(shape, dtype=torch.float32)


def masked_conv2d_packed_fake(input: Tensor, packed: Tensor, out_channels: int, *_: object) -> Tensor:
    return empty(input, out_channels, input.shape[2:])


def masked_conv2d_weight_bwd_fake(
    grad_output: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    *_: object,
) -> Tensor:
    shape = (grad_output.shape[1], input.shape[1] // groups, *kernel)
    return input.new_empty(shape, dtype=torch.float32)
