"""Convolutions, transposed ones and enlargement by copies as taps: the rules of what reads neighbouring positions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._builder import Builder
from ._rules import rule
from ._values import NotPlannable, Value, is_channels
from .network import Tap


@rule("aten.convolution", "aten._convolution", "aten.cudnn_convolution")
def _convolution(
    b: Builder, x: Any, weight: Any, bias: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int, *_: Any,
) -> Value:  # fmt: skip
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise NotPlannable("its weights depend on the image")
    stride, padding, dilation, output_padding = map(list, (stride, padding, dilation, output_padding))
    vertical, x = as_image(x), x
    if len(x.axes) == 3:
        spatial = 0 if vertical else 1
        weight = weight.unsqueeze(-1 if vertical else -2)
        for sizes, neutral in ((stride, 1), (padding, 0), (dilation, 1), (output_padding, 0)):
            sizes.insert(1 - spatial, neutral)
    step = single_step(stride, x, weight, padding)
    size = (x.height, x.width)
    kernel = tuple(weight.shape[2:])
    if transposed:
        out = tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, s, p, d, k, o in zip(
            size, stride, padding, dilation, kernel, output_padding, strict=True))  # fmt: skip
        weights = upscaling_taps(dense(weight, groups, True), stride, padding, dilation)
        made = b.convolution(x, weights, bias, out, 1, step)
    else:
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k in zip(
            size, stride, padding, dilation, kernel, strict=True))  # fmt: skip
        full = dense(weight, groups, False)
        weights = {
            Tap(ky * dilation[0] - padding[0], kx * dilation[1] - padding[1]): full[:, :, ky, kx]
            for ky in range(kernel[0]) for kx in range(kernel[1])
        }  # fmt: skip
        made = b.convolution(x, weights, bias, out, step, 1)
    return b.image(made, x)


def as_image(x: Value) -> bool:
    """Whether [N, C, T] is a column rather than a row; refuses what is neither [N, C, H, W] nor [N, C, T]."""
    kinds = [[kind for kind, _ in dimension] for dimension in x.axes]
    first = len(x.axes) in (3, 4) and kinds[0] in ([], ["N"]) and is_channels(x.axes[1])
    if first and len(x.axes) == 4 and kinds[2] in ([], ["H"]) and kinds[3] in ([], ["W"]):
        return False
    if first and len(x.axes) == 3 and kinds[2] in ([], ["W"], ["H"]):
        return kinds[2] == ["H"] or (x.height > 1 and not kinds[2])
    raise NotPlannable(f"a convolution of {list(x.shape)} whose dimensions are not images, channels, rows and columns")


def single_step(stride: Sequence[int], x: Value, weight: Tensor, padding: Sequence[int]) -> int:
    """The one stride of both directions; of a single row or column its own does not matter."""
    steps = [s for s, n, k, p in zip(stride, (x.height, x.width), weight.shape[2:], padding, strict=True)
             if (n, k, p) != (1, 1, 0)]  # fmt: skip
    if len(set(steps)) > 1:
        raise NotPlannable(f"a stride of {tuple(stride)}, which is not the same in both directions")
    return steps[0] if steps else 1


def dense(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[O, I, kh, kw] with zeros between groups."""
    blocks = [block.transpose(0, 1) if transposed else block for block in weight.chunk(groups, 0)]
    if groups == 1:
        return blocks[0]
    outputs, inputs = blocks[0].shape[:2]
    full = weight.new_zeros(groups * outputs, groups * inputs, *weight.shape[2:])
    for g, block in enumerate(blocks):
        full[g * outputs : (g + 1) * outputs, g * inputs : (g + 1) * inputs] = block
    return full


def upscaling_taps(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[Tap, Tensor]:
    """Output y takes of source i the weight k with y = stride i - padding + dilation k."""
    taps: dict[Tap, Tensor] = {}
    for ky in range(weight.shape[2]):
        for kx in range(weight.shape[3]):
            at = [k * d - p for k, d, p in zip((ky, kx), dilation, padding, strict=True)]
            phase = (at[0] % stride[0], at[1] % stride[1])
            tap = Tap(-(at[0] // stride[0]), -(at[1] // stride[1]), phase)
            taps[tap] = taps[tap] + weight[:, :, ky, kx] if tap in taps else weight[:, :, ky, kx]
    return taps


@rule("aten.upsample_nearest2d", "aten._upsample_nearest_exact2d", "aten.upsample_nearest1d")
def _upsample(b: Builder, x: Value, size: Sequence[int], *_: Any) -> Value:
    as_image(x)
    height, width = (1, *size)[-2:]
    factor = width // x.width
    ys = range(factor) if x.height > 1 or height > 1 else range(1)
    if (len(ys) * x.height, factor * x.width) != (height, width):
        raise NotPlannable(
            f"an enlargement from {x.height} x {x.width} to {height} x {width} is not by one whole factor"
        )
    copy = torch.eye(len(x.channels))
    made = b.convolution(
        x, {Tap(0, 0, (py, px)): copy for py in ys for px in range(factor)}, None, (height, width), 1, factor
    )
    return b.image(made, x)
