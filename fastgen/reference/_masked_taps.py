"""Which taps of a kernel a mask leaves, and which channels: all that the rooms of `masked_conv2d` share about masks.

Taps are counted in raster order. Those of every mask are one run of it, so they are at most three rectangles; where sub-pixels
are ordered the last tap, the centre, is seen by some pairs of channels alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._schema import MASK_TYPES

_SHIFTED = ("down", "down_right")


def orders_colors(mask_type: int) -> bool:
    """Whether the mask has a centre whose channels can be ordered."""
    return MASK_TYPES[mask_type] in ("A", "B", "horizontal_A", "horizontal_B")


def fits_kernel(mask_type: int, kernel: Sequence[int]) -> bool:
    """Whether the kernel has a centre, in those dimensions in which the mask asks for one."""
    name = MASK_TYPES[mask_type]
    return (kernel[0] % 2 == 1 or name in _SHIFTED) and (kernel[1] % 2 == 1 or name == "down_right")


def origin(mask_type: int, kernel: Sequence[int]) -> tuple[int, int]:
    """Row and column of the tap that lies on the output."""
    name = MASK_TYPES[mask_type]
    y = kernel[0] - 1 if name in _SHIFTED else kernel[0] // 2
    return y, kernel[1] - 1 if name == "down_right" else kernel[1] // 2


def taps(mask_type: int, kernel: Sequence[int], color_channels: int = 1) -> range:
    """The taps that some pair of channels sees, in raster order."""
    name, (height, width) = MASK_TYPES[mask_type], kernel
    if name in _SHIFTED:
        return range(height * width)
    row = height // 2 * width
    if name.startswith("vertical"):
        return range(row + width if name == "vertical_B" else row)
    centre = 1 if name.endswith("B") or color_channels > 1 else 0
    return range(row if name.startswith("horizontal") else 0, row + width // 2 + centre)


def mask(
    mask_type: int,
    shape: Sequence[int],
    groups: int = 1,
    color_channels: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """True where a weight of ``shape`` [K, C / groups, kh, kw] is read.

    Output o is of color o // (K / color_channels), input i of color i // (C / color_channels); at the centre A sees the colors
    before its own, B also its own (van den Oord et al. 2016, section 3.4).
    """
    outputs, inputs, height, width = shape
    live = torch.zeros(outputs, inputs, height * width, dtype=torch.bool, device=device)
    seen = taps(mask_type, (height, width), color_channels)
    live[..., seen.start : seen.stop] = True
    if orders_colors(mask_type) and color_channels > 1:
        o = torch.arange(outputs, device=device)
        of_output = o * color_channels // outputs
        i = (o // (outputs // groups) * inputs)[:, None] + torch.arange(inputs, device=device)
        of_input = i * color_channels // (inputs * groups)
        later = of_input - of_output[:, None]
        live[..., seen.stop - 1] = later <= 0 if MASK_TYPES[mask_type].endswith("B") else later < 0
    return live.reshape(tuple(shape))


class Run(NamedTuple):
    """Outputs [first, last), all of one group and one color, which see the channels [low, high) of their group at the centre."""

    first: int
    last: int
    group: int
    low: int
    high: int


def runs(
    outputs: int, inputs: int, mask_type: int, groups: int, color_channels: int, transposed: bool = False
) -> list[Run]:
    """Of ``outputs`` and ``inputs``, which are channels; ``transposed``: of the gradient of the input."""
    colors = color_channels if orders_colors(mask_type) else 1
    own = MASK_TYPES[mask_type].endswith("B") or colors == 1
    of_group, seen = outputs // groups, inputs // groups
    cuts = sorted({k * outputs // parts for parts in (groups, colors) for k in range(parts + 1)})
    found = []
    for first, last in pairwise(cuts):
        group, color = first // of_group, first * colors // outputs
        edge = (color + (own != transposed)) * inputs // colors - group * seen  # up to it, or from it on
        edge = min(max(edge, 0), seen)
        low, high = (edge, seen) if transposed and colors > 1 else (0, edge if colors > 1 else seen)
        found.append(Run(first, last, group, low, high))
    return found


class Rectangle(NamedTuple):
    """Rows and columns of taps, and how far the first of each lies before the output and the last behind it, in pixels."""

    rows: range
    columns: range
    pad: tuple[int, int, int, int]  # left, right, top, bottom, as `torch.nn.functional.pad` takes them


def rectangles(
    seen: range, kernel: Sequence[int], origin: Sequence[int], dilation: Sequence[int], size: Sequence[int]
) -> list[Rectangle]:
    """The taps ``seen`` as rectangles, without those that lie outside of every image of ``size``."""
    inside = [
        [t for t in range(kernel[d]) if abs(t - origin[d]) * dilation[d] < size[d]] for d in range(2)
    ]  # a tap for each dimension at least: the origin
    width = kernel[1]
    found = []
    start = seen.start
    while start < seen.stop:
        row, column = divmod(start, width)
        if column or start + width > seen.stop:
            end = min(seen.stop, (row + 1) * width)
            rows, columns = range(row, row + 1), range(column, column + end - start)
        else:
            end = seen.stop - seen.stop % width
            rows, columns = range(row, end // width), range(width)
        start = end
        found.append((rows, columns))
    clipped = []
    for rows, columns in found:
        ys, xs = [y for y in inside[0] if y in rows], [x for x in inside[1] if x in columns]
        if not ys or not xs:
            continue
        pad = (
            (origin[1] - xs[0]) * dilation[1], (xs[-1] - origin[1]) * dilation[1], (origin[0] - ys[0]) * dilation[0],
            (ys[-1] - origin[0]) * dilation[0],
        )  # fmt: skip
        clipped.append(Rectangle(range(ys[0], ys[-1] + 1), range(xs[0], xs[-1] + 1), pad))
    return clipped
