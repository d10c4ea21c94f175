"""Which algorithm a convolution takes, and why: what the kernel covers, then a table of measured rates, then the memory limit."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _exact, _library
from . import _packed_weights
from ._packed_weights import WEIGHTS

NAMES = {4: "Winograd F(4x4, 3x3)", 2: "Winograd F(2x2, 3x3)", 1: "one matrix product", 0: "the library's convolution"}
_PANEL, _LIBRARY_PANEL = 16, 8  # output channels are computed in full panels: ours, the library's


class Conv2dPlan(NamedTuple):
    """How a call of :func:`fastgen.ops.conv2d` is computed: its ``algorithm``, the ``reason``, in words, and the tile.

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

    For a tile algorithm: ``call`` once, ``product`` a thousand multiply-adds of its matrix products, ``value`` a value or product
    of a tile (points times input and output channels), ``weight`` a packed weight. For the library's convolution: once, a
    thousand multiply-adds, a weight.
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
}  # fmt: skip


def reasons(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[str]:
    """Why the kernels cannot take this call, whatever they would cost."""
    kernel = tuple(weight.shape[2:])
    if input.device.type != "cpu":
        return [f"there is no kernel for {input.device.type}"]
    if _library.ISA is None:
        return [_library.ISA_REASON]
    if kernel not in ((3, 3), (1, 1)):
        return [f"the kernels take 3x3 and 1x1, not {kernel[0]}x{kernel[1]}"]
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1) or tuple(padding) != (kernel[0] // 2,) * 2 or groups != 1:
        return ["the kernels take stride 1, dilation 1, one group and the padding that keeps the size"]
    if input.dtype == torch.float64 or weight.dtype == torch.float64:
        return ["float64 is computed by the library"]
    if unsupported := _dispatch.dtype_reasons((input, weight)):
        return unsupported
    return []


def choose(input: Tensor, weight: Tensor, kept: Mapping[Hashable, Tensor]) -> Conv2dPlan:
    """The algorithm of a call that the kernels can take, as things are now; ``kept``: the packed weights that are there."""
    if unkept := _packed_weights.reasons(weight):
        return library_plan(unkept[0])
    if weight.shape[2] == 1:
        return _within_memory(weight, kept, (1,), "a 1x1 kernel is a matrix product")
    if _exact.is_exact():
        return library_plan("exact algorithms alone are wanted (fastgen.set_exact)")
    faster, gain = _faster(_library.ISA or "portable", *input.shape, weight.shape[0])
    if not faster:
        return library_plan("it is faster for this shape, by the table")
    return _within_memory(weight, kept, faster, f"{gain:.1f} times as fast as the library, by the table")


@functools.lru_cache(1024)
def _faster(isa: str, n: int, c: int, height: int, width: int, k: int) -> tuple[tuple[int, ...], float]:
    """Those of Winograd's two that are faster than the library, the fastest first, and how much that is."""
    rates = RATES[isa]
    pixels, panels = n * height * width, _full(k, _PANEL)
    library = rates.library_call + 9 * c * _full(k, _LIBRARY_PANEL) * (
        rates.library * 1e-3 * pixels + rates.library_weight
    )
    costs = {}
    for outputs in (4, 2):
        points, tiles = (outputs + 2) ** 2, n * -(-height // outputs) * -(-width // outputs)
        of_tile = rates.product * 1e-3 * c * panels + rates.value * (c + panels)
        costs[outputs] = rates.call + points * (tiles * of_tile + rates.weight * c * panels)
    faster = tuple(sorted((outputs for outputs in costs if costs[outputs] < library), key=costs.__getitem__))
    return faster, library / min(costs.values())


def _within_memory(
    weight: Tensor, kept: Mapping[Hashable, Tensor], choices: tuple[int, ...], reason: str
) -> Conv2dPlan:
    """The first of ``choices`` whose packed weights are there or fit beside all others."""
    for outputs in choices:
        size = packed_bytes(weight, outputs)
        if outputs in kept or size <= WEIGHTS.limit - WEIGHTS.bytes:
            return Conv2dPlan(NAMES[outputs], reason, outputs, size)
        reason = f"the packed weights of {NAMES[outputs]} ({size / 2**20:.1f} MiB) are past the memory limit"
    return library_plan(reason)


def packed_bytes(weight: Tensor, outputs: int) -> int:
    points = 1 if outputs == 1 else (outputs + 2) ** 2
    return 4 * points * weight.shape[1] * _full(weight.shape[0], _PANEL)


def _full(channels: int, panel: int) -> int:
    return -(-channels // panel) * panel


def library_plan(reason: str) -> Conv2dPlan:
    return Conv2dPlan(NAMES[0], reason, 0, 0)
