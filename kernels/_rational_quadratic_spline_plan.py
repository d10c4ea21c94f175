"""What the kernels of `rational_quadratic_spline` share: the operands of a call, how they are cut into programs, and which
element of them a lane owns.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import SPLINE_NUMBERS, SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from fastgen.kernels._operands import Operands, accumulator
from fastgen.reference._layout import is_channels_last, opmath_dtype
from fastgen.reference._spline import derivatives_of

# Numbers of a side of the box that a program owns, half as many in float64: by registers, those of the backward live longer.
TILES = {"rational_quadratic_spline_fwd": 1024, "rational_quadratic_spline_bwd": 512}


@triton.jit
def element_of(parts, samples, elements, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, element in it, whether it is there) of each lane: ROWS samples of a program side by side, or a part of one."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    n = program // parts * ROWS + lane // (BLOCK // ROWS)
    element = program % parts * (BLOCK // ROWS) + lane % (BLOCK // ROWS)
    return n, element, (n < samples) & (element < elements)


@triton.jit
def place_of(n, element, inside, mask, channels, positions, channel_step, position_step):
    """(channel among those transformed, position, offset in a tensor like input, whether it may be touched)."""
    j = element // positions
    s = element % positions
    c = j
    if mask is not None:
        c = tl.load(mask + j, mask=inside, other=0)
        inside = inside & (c >= 0) & (c < channels)
    return j, s, n * channels * positions + c * channel_step + s * position_step, inside


@triton.jit
def box_of(
    bounds, j, inside, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    if bounds is not None:
        half = tl.load(bounds + j, mask=inside, other=1.0).to(ACC)
        return -half, half, -half, half
    else:
        zero = tl.zeros([BLOCK], dtype=ACC)
        return zero + LEFT, zero + RIGHT, zero + BOTTOM, zero + TOP


class Call:
    """The operands, sizes and constants of a call."""

    def __init__(
        self, op: str, input: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, mask: Tensor | None,
        bounds: Tensor | None, numbers: list[float], num_bins: int, tails: int, parametrization: int, inverse: bool, reduce: bool,
    ) -> None:  # fmt: skip
        operands = self.operands = Operands(op, input)
        if input.dim() < 2:
            operands.fail(f"input must be [N, C, *], got {tuple(input.shape)}")
        if num_bins < 1:
            operands.fail(f"num_bins must be at least 1, got {num_bins}")
        operands.code("tails", tails, SPLINE_TAILS)
        operands.code("parametrization", parametrization, SPLINE_PARAMETRIZATIONS)
        if mask is not None and (mask.dim() != 1 or mask.shape[0] > input.shape[1] or mask.dtype != torch.int64):
            operands.fail(f"mask must be int64 [C'] with C' <= {input.shape[1]}, got {mask.dtype}, {tuple(mask.shape)}")
        clip = self._check_numbers(numbers, num_bins, tails, parametrization)
        self.n, self.channels = input.shape[:2]
        self.positions = math.prod(input.shape[2:])
        chosen = self.channels if mask is None else mask.shape[0]
        self.elements = chosen * self.positions
        self.mask = operands.sized("mask", mask, chosen)
        self.bounds = operands.sized("bounds", bounds, chosen)
        self.input = operands.like("input", input)
        self.packed = heights is None
        self.bins, counts = num_bins, derivatives_of(SPLINE_TAILS[tails], num_bins)
        if (heights is None) != (derivatives is None):
            operands.fail("heights and derivatives must be given together, or neither")
        self.given = (widths,) if heights is None or derivatives is None else (widths, heights, derivatives)
        shape = (self.n, chosen, *input.shape[2:])
        columns = [t.shape[-1] if t.dim() else 0 for t in self.given]
        self.derivatives = columns[-1] - 2 * num_bins if self.packed else columns[-1]
        if self.derivatives not in counts or (not self.packed and columns[:2] != [num_bins] * 2):
            operands.fail(
                f"widths, heights and derivatives must be [*, {num_bins}] twice and [*, {counts[0]}], got {columns} columns"
            )
        for name, t, count in zip(("widths", "heights", "derivatives"), self.given, columns, strict=False):
            operands.check(name, t, (*shape, count))
            if t.dtype != widths.dtype or opmath_dtype(t.dtype) != opmath_dtype(input.dtype):
                operands.fail(
                    f"{name} must have one dtype with widths, float64 where input is: {t.dtype} with {input.dtype}"
                )
        tile = TILES[op] // 2 if input.dtype == torch.float64 else TILES[op]
        bins = max(triton.next_power_of_2(num_bins), 2)
        block = max(tile // bins, 1)
        row = min(triton.next_power_of_2(max(self.elements, 1)), block)
        self.parts = triton.cdiv(max(self.elements, 1), row)
        rows = block // row if self.parts == 1 else 1
        block = rows * row
        self.programs = triton.cdiv(self.n, rows) * self.parts
        last = is_channels_last(input)
        self.sizes = (self.n, self.channels, self.positions, self.elements, self.parts)
        self.steps = (1, self.channels) if last else (self.positions, 1)
        names = ("LEFT", "RIGHT", "BOTTOM", "TOP", "LEAST_WIDTH", "LEAST_HEIGHT", "LEAST_SLOPE", "SCALE")
        self.constants = dict(zip(names, map(float, numbers), strict=True)) | {
            "CLIP": clip, "TAILS": tails, "INVERSE": inverse, "REDUCE": reduce, "K": num_bins, "COLUMNS": self.derivatives,
            "BINS": bins, "ROWS": rows, "BLOCK": block, "ACC": accumulator(input), "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip

    def _check_numbers(self, numbers: list[float], bins: int, tails: int, parametrization: int) -> float:
        """CLIP."""
        if len(numbers) != len(SPLINE_NUMBERS):
            self.operands.fail(f"numbers must be {SPLINE_NUMBERS}, got {len(numbers)} of them")
        left, right, bottom, top, least_width, least_height, least_slope, _ = numbers
        if not (left < right and bottom < top):
            self.operands.fail(f"the box must not be empty, got {numbers[:4]}")
        if not (min(least_width, least_height) >= 0 and max(least_width, least_height) * bins <= 1):
            self.operands.fail(f"min_bin_width and min_bin_height must be in [0, 1 / num_bins], got {numbers[4:6]}")
        zuko = SPLINE_PARAMETRIZATIONS[parametrization] == "zuko"
        most = 1 if zuko or SPLINE_TAILS[tails] == "linear" else math.inf
        if not 0 < least_slope < most:
            self.operands.fail(f"min_derivative must be in (0, {most}), got {least_slope}")
        return -1 / math.log(least_slope) if zuko else 0.0

    def through(self, *given: Tensor) -> tuple[list[Tensor], list[int]]:
        """Widths, heights and derivatives, and four strides of each: of samples, channels, positions and columns."""
        if self.packed:
            k = self.bins
            given = (given[0][..., :k], given[0][..., k : 2 * k], given[0][..., 2 * k :])
        return list(given), [stride for t in given for stride in (t.stride(0), t.stride(1), along(t), t.stride(-1))]


def along(t: Tensor) -> int:
    """From each position of [N, C', *, columns] to the next; -1 where there is no one stride."""
    step, following = 0, -1
    for size, stride in reversed(list(zip(t.shape[2:-1], t.stride()[2:-1], strict=True))):
        if size == 1:
            continue
        step = stride if following == -1 else step
        if following not in (-1, stride):
            return -1
        following = stride * size
    return step


def even(t: Tensor) -> Tensor:
    return t.contiguous() if along(t) == -1 else t
