"""Which algorithm a convolution takes, and why: what the kernel covers, then a table of measured rates, then the memory limit."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _exact, _library
from ..reference import _convolution as reference
from . import _packed_weights
from ._packed_weights import WEIGHTS

NAMES = {4: "Winograd F(4x4, 3x3)", 2: "Winograd F(2x2, 3x3)", 1: "one matrix product", 0: "the library's convolution"}
_LIBRARY_PANEL = 8  # output channels that it computes at once
# From so many pixels on upsampling and convolution are one transposed convolution of the library (fp32; EPYC 7xx3).
TRANSPOSED_PIXELS = 256


class ConvolutionPlan(NamedTuple):
    """How :func:`fastgen.ops.conv2d` or :func:`fastgen.ops.upsample_conv2d` computes: the ``algorithm``, the ``reason``, the tile.

    ``outputs`` is the number of outputs a side of a tile: 4 or 2 for Winograd's, 1 for a 1x1 kernel, 0 for the library.
    ``weight_bytes`` is what the packed weights take, kept as long as the weight is and does not change.
    """

    algorithm: str
    reason: str
    outputs: int
    weight_bytes: int


@dataclass(frozen=True)
class Rates:
    """What makes up the time of a call on two threads, in nanoseconds.

    For a tile algorithm: ``call`` once, ``product`` a thousand multiply-adds of its matrix products, ``value`` a value or a product
    of a tile, ``weight`` a packed weight. For the library's convolution: once, a thousand multiply-adds, a weight.
    """

    call: float
    product: float
    value: float
    weight: float
    library_call: float
    library: float
    library_weight: float


# Variant -> rates. avx2: EPYC 7xx3 (Zen 3), both layouts, 3 to 1280 channels, 1x1 to 64x64. The others are what their products and
# torch's convolution reach elsewhere, and lean to the library.
RATES = {
    "portable": Rates(call=20e3, product=60.0, value=0.8, weight=0.2, library_call=10e3, library=20.0, library_weight=0.3),
    "avx2": Rates(call=12e3, product=17.0, value=0.2, weight=0.2, library_call=10e3, library=16.0, library_weight=0.3),
    "avx512": Rates(call=12e3, product=12.0, value=0.2, weight=0.2, library_call=10e3, library=9.5, library_weight=0.3),
    "avx512_bf16": Rates(call=12e3, product=12.0, value=0.2, weight=0.2, library_call=10e3, library=9.5, library_weight=0.3),
    "amx": Rates(call=12e3, product=12.0, value=0.2, weight=0.2, library_call=10e3, library=9.5, library_weight=0.3),
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


def choose(scale: int, input: Tensor, weight: Tensor, kept: Mapping[Hashable, Tensor]) -> ConvolutionPlan:
    """The algorithm of a call that the kernels can take, as things are now; ``kept``: the packed weights that are there.

    The first of those for this shape whose packed weights are there, or fit beside all others.
    """
    if not kept and (unkept := _packed_weights.reasons(weight)):
        return library_plan(unkept[0])
    past = ""
    for plan in _plans(_library.ISA or "portable", _exact.is_exact(), scale, input.shape, weight.shape):
        size = plan.weight_bytes
        if (scale, plan.outputs) in kept or size <= WEIGHTS.limit - WEIGHTS.bytes or not size:
            return plan._replace(reason=past) if past else plan
        past = f"the packed weights of {plan.algorithm} ({size / 2**20:.1f} MiB) are past the memory limit"
    raise AssertionError("the library's convolution takes every call")


@functools.lru_cache(4096)
def _plans(isa: str, exact: bool, scale: int, shape: torch.Size, weight: torch.Size) -> list[ConvolutionPlan]:
    """What may take a call of these shapes, the best first and the library last."""

    def plan(outputs: int, reason: str) -> ConvolutionPlan:
        return ConvolutionPlan(NAMES[outputs], reason, outputs, packed_bytes(scale, outputs, weight))

    if weight[2] == 1:
        reason = "a 1x1 kernel is a matrix product"
        return [plan(1, reason), library_plan(reason)]
    if exact:
        return [library_plan("exact algorithms alone are wanted (fastgen.set_exact)")]
    costs = _costs(RATES[isa], scale, shape, weight[0])
    best = sorted((outputs for outputs in costs if costs[outputs] < costs[0]), key=costs.__getitem__)
    if not best:
        return [library_plan("it is faster for this shape, by the table")]
    reason = f"{costs[0] / costs[best[0]]:.1f} times as fast as the library, by the table"
    return [*(plan(outputs, reason) for outputs in best), library_plan(reason)]


def _costs(rates: Rates, scale: int, shape: Sequence[int], k: int) -> dict[int, float]:
    """Outputs a side of a tile -> nanoseconds; 0: the library."""
    n, c, height, width = shape
    pixels, panels = n * height * width, _full(k, reference.PANEL)

    def of_library(taps: int, pixels: int, of_weight: float) -> float:
        return rates.library_call + taps * c * _full(k, _LIBRARY_PANEL) * (rates.library * 1e-3 * pixels + of_weight)

    costs = {0: of_library(9, scale**2 * pixels, rates.library_weight)}
    if scale == 2 and pixels >= TRANSPOSED_PIXELS:
        costs[0] = min(costs[0], of_library(16, pixels, 15 * rates.library_weight))
    for outputs in (4, 2):
        points, blocks = (outputs + 2) ** 2, len(reference.blocks(outputs, scale))
        tiles = n * -(-height // outputs) * -(-width // outputs)
        transforms = rates.value * tiles * (points * c + blocks * panels)
        costs[outputs] = rates.call + transforms + blocks * c * panels * (rates.product * 1e-3 * tiles + rates.weight)
    return costs


def packed_bytes(scale: int, outputs: int, weight: Sequence[int]) -> int:
    """Of a weight of that shape."""
    return 4 * len(reference.blocks(outputs, scale)) * weight[1] * _full(weight[0], reference.PANEL)


def _full(channels: int, panel: int) -> int:
    return -(-channels // panel) * panel


def library_plan(reason: str) -> ConvolutionPlan:
    return ConvolutionPlan(NAMES[0], reason, 0, 0)
