"""Which algorithm a convolution takes, and why: what the kernel covers, then a table of measured rates, then the memory limit."""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _exact, _library
from ..reference import _convolution as reference
from ..reference import _convolution_direct as direct
from . import _packed_weights
from ._packed_weights import WEIGHTS

DIRECT = 16  # stands for a tile of a matrix unit: pixels in a row
NAMES = {
    4: "Winograd F(4x4, 3x3)", 2: "Winograd F(2x2, 3x3)", 1: "one matrix product", DIRECT: "matrix tiles of bfloat16",
    0: "the library's convolution",
}  # fmt: skip
_LIBRARY_PANEL = 8  # output channels that it computes at once
# From so many pixels on upsampling and convolution are one transposed convolution of the library (fp32; EPYC 7xx3).
TRANSPOSED_PIXELS = 256


class ConvolutionPlan(NamedTuple):
    """How :func:`fastgen.ops.conv2d` or :func:`fastgen.ops.upsample_conv2d` computes: the ``algorithm``, the ``reason``, the tile.

    ``outputs`` is the number of outputs a side of a tile: 4 or 2 for Winograd's, 1 for a 1x1 kernel, 0 for the library; 16, in a
    row, for matrix tiles. ``weight_bytes`` is what the packed weights take, kept as long as the weight is and does not change.
    """

    algorithm: str
    reason: str
    outputs: int
    weight_bytes: int


class Library(NamedTuple):
    """The time of the library's convolution in nanoseconds: of a ``call``, a thousand multiply-adds of a 3x3 kernel, a ``weight``,
    and a thousand multiply-adds of a 1x1 kernel, whose weights cost nothing beside them."""

    call: float
    product: float
    weight: float
    single: float


@dataclass(frozen=True)
class Rates:
    """What makes up the time of a call on two threads, in nanoseconds.

    For a tile algorithm in fp32: ``call`` once, ``product`` a thousand multiply-adds of its matrix products, ``value`` a value or a
    product of a tile, ``weight`` a packed weight. ``direct``, of matrix tiles, where there are any: a thousand multiply-adds, a
    value or an output, a packed weight. ``library``: by dtype.
    """

    call: float
    product: float
    value: float
    weight: float
    library: Mapping[torch.dtype, Library]
    direct: tuple[float, float, float] | None = None


def _for_all(library: Library) -> dict[torch.dtype, Library]:
    return dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), library)


_PASS = 0.15  # nanoseconds of plain torch for an element, each time that it goes through an image

# Variant -> rates. avx2: EPYC 7xx3 (Zen 3), both layouts, 3 to 1280 channels, 1x1 to 64x64, where half precision is not the
# library's strength and our product takes every 1x1 kernel. avx512, avx512_bf16, amx: a Xeon with AMX, channels-last, the same
# shapes, halves of one thread's times; the first two beside a library that was told to use no more than they do, but for bfloat16
# of avx512_bf16, where an EPYC's library is 2.7 times as fast (it runs pairs at twice the rate). portable leans to the library.
_ZEN3 = Library(call=10e3, product=16.0, weight=0.3, single=math.inf)
_OLD = Library(call=10e3, product=20.0, weight=0.3, single=math.inf)
_XEON = Library(call=20e3, product=6.8, weight=0.1, single=6.9)
_WIDENED = Library(call=50e3, product=72.0, weight=0.2, single=85.0)  # float16 without instructions for it
RATES = {
    "portable": Rates(call=20e3, product=60.0, value=0.8, weight=0.2, library=_for_all(_OLD)),
    "avx2": Rates(call=12e3, product=17.0, value=0.2, weight=0.2, library=_for_all(_ZEN3)),
    "avx512": Rates(
        call=6e3, product=7.0, value=0.22, weight=0.1,
        library={
            torch.float32: _XEON,
            torch.bfloat16: Library(call=30e3, product=31.0, weight=0.2, single=37.0),
            torch.float16: _WIDENED,
        },
    ),
    "avx512_bf16": Rates(
        call=6e3, product=7.0, value=0.22, weight=0.1,
        library={
            torch.float32: _XEON,
            torch.bfloat16: Library(call=25e3, product=4.4, weight=0.2, single=4.7),
            torch.float16: _WIDENED,
        },
    ),
    "amx": Rates(
        call=6e3, product=7.0, value=0.22, weight=0.1,
        library={
            torch.float32: _XEON,
            torch.bfloat16: Library(call=40e3, product=0.95, weight=0.3, single=1.4),
            torch.float16: Library(call=30e3, product=12.5, weight=0.16, single=11.8),  # by AVX512-FP16
        },
        direct=(0.62, 0.165, 0.07),
    ),
}  # fmt: skip


def reasons(input: Tensor, weight: Tensor, geometry: Sequence[Any]) -> list[str]:
    """Why the kernels cannot take this call, whatever they would cost; ``geometry`` is conv2d's, or empty."""
    kernel = tuple(weight.shape[2:])
    if input.device.type != "cpu":
        return [f"there is no kernel for {input.device.type}"]
    if _library.ISA is None:
        return [_library.ISA_REASON]
    if kernel not in ((3, 3), (1, 1)):
        return [f"the kernels take 3x3 and 1x1, not {kernel[0]}x{kernel[1]}"]
    if geometry:
        stride, padding, dilation, groups = geometry
        usual = tuple(stride) == tuple(dilation) == (1, 1) and groups == 1
        if not usual or tuple(padding) != (kernel[0] // 2,) * 2:
            return ["the kernels take stride 1, dilation 1, one group and the padding that keeps the size"]
    if input.dtype == torch.float64 or weight.dtype == torch.float64:
        return ["float64 is computed by the library"]
    return _dispatch.dtype_reasons((input, weight))


def choose(
    scale: int,
    dtype: torch.dtype,
    shape: torch.Size,
    weight: Tensor,
    kept: Mapping[Hashable, Tensor],
    before: int = 0,
    after: int = 0,
) -> ConvolutionPlan:
    """The algorithm of a call that the kernels can take, as things are now, of an input of this ``dtype`` and ``shape``; ``kept``:
    the packed weights that are there.

    The first of those for this shape whose packed weights are there, or fit beside all others. ``before`` and ``after``: the times
    that plain torch would go through the image, or the output, for what stands around the library's convolution.
    """
    if not kept and (unkept := _packed_weights.reasons(weight)):
        return library_plan(unkept[0])
    past = ""
    isa, exact = _library.ISA or "portable", _exact.is_exact()
    for plan in _plans(isa, exact, scale, dtype, shape, weight.shape, before, after):
        size = plan.weight_bytes
        if (scale, plan.outputs) in kept or size <= WEIGHTS.limit - WEIGHTS.bytes or not size:
            return plan._replace(reason=past) if past else plan
        past = f"the packed weights of {plan.algorithm} ({size / 2**20:.1f} MiB) are past the memory limit"
    raise AssertionError("the library's convolution takes every call")


@functools.lru_cache(4096)
def _plans(
    isa: str,
    exact: bool,
    scale: int,
    dtype: torch.dtype,
    shape: torch.Size,
    weight: torch.Size,
    before: int,
    after: int,
) -> list[ConvolutionPlan]:
    """What may take a call of these shapes, the best first and the library last."""
    costs = _costs(RATES[isa], scale, dtype, shape, weight, before, after)
    # Matrix tiles round no more than the library does, but for sums of weights after upsampling.
    allowed = [o for o in costs if o and (not exact or o == 1 or (o == DIRECT and scale == 1))]
    best = sorted((o for o in allowed if costs[o] < costs[0]), key=costs.__getitem__)
    if exact and not allowed:
        return [library_plan("exact algorithms alone are wanted (fastgen.set_exact)")]
    if not best:
        return [library_plan("it is faster for this shape, by the table")]
    reason = f"{costs[0] / costs[best[0]]:.1f} times as fast as the library, by the table"
    plans = [ConvolutionPlan(NAMES[o], reason, o, packed_bytes(scale, o, weight)) for o in best]
    return [*plans, library_plan(reason)]


def _costs(
    rates: Rates,
    scale: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    weight: Sequence[int],
    before: int,
    after: int,
) -> dict[int, float]:
    """Outputs a side of a tile -> nanoseconds; 0: the library."""
    n, c, height, width = shape
    k, kernel = weight[0], weight[2]
    pixels, panels, library = n * height * width, _full(k, reference.PANEL), rates.library[dtype]
    around = _PASS * (before * c * pixels + after * k * scale**2 * pixels)

    def of_library(taps: int, pixels: int, of_weight: float, product: float = library.product) -> float:
        return library.call + around + taps * c * _full(k, _LIBRARY_PANEL) * (product * 1e-3 * pixels + of_weight)

    def of_tiles(outputs: int, points: int, blocks: int) -> float:
        tiles = n * -(-height // outputs) * -(-width // outputs)
        transforms = rates.value * tiles * (points * c + blocks * panels)
        return rates.call + transforms + blocks * c * panels * (rates.product * 1e-3 * tiles + rates.weight)

    if kernel == 1:
        costs = {0: of_library(1, pixels, 0, library.single), 1: of_tiles(1, 1, 1)}
    else:
        costs = {0: of_library(9, scale**2 * pixels, library.weight)}
        if scale == 2 and dtype == torch.float32 and pixels >= TRANSPOSED_PIXELS:
            costs[0] = min(costs[0], of_library(16, pixels, 15 * library.weight))
        for outputs in (4, 2):
            costs[outputs] = of_tiles(outputs, (outputs + 2) ** 2, len(reference.blocks(outputs, scale)))
    if rates.direct is not None and dtype == torch.bfloat16:
        product, value, of_weight = rates.direct
        channels, taps = _full(c, direct.BLOCK), direct.taps(kernel, scale) * scale**2
        positions = n * min(height * _full(width, DIRECT), (height + kernel // 2) * (width + kernel // 2))
        values = value * positions * (channels + scale**2 * panels)
        costs[DIRECT] = rates.call + values + taps * channels * panels * (product * 1e-3 * positions + of_weight)
    return costs


def packed_bytes(scale: int, outputs: int, weight: Sequence[int]) -> int:
    """Of a weight of that shape."""
    if outputs == DIRECT:
        return 2 * math.prod(direct.packed_shape(weight, scale))
    return 4 * len(reference.blocks(outputs, scale)) * weight[1] * _full(weight[0], reference.PANEL)


def _full(channels: int, panel: int) -> int:
    return -(-channels // panel) * panel


def library_plan(reason: str) -> ConvolutionPlan:
    return ConvolutionPlan(NAMES[0], reason, 0, 0)
