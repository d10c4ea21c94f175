"""Triton kernels of `affine_coupling`: a program owns a tile of positions and channels of one sample, [BLOCK_P, BLOCK_C], of
transformed and of copied elements alike; it reads each once and writes each result once. Of vectors [N, C] the samples are the
positions.

Sums of logarithms, of a sample or of a position, are written a program and added up by torch, in one order and without atomics.
Which channel of raw scale and shift belongs to a channel is found by comparing with all indices: nothing is read at an index, so
one out of range, or there twice, is harmless, and makes the log-determinant NaN.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import (
    COUPLING_CENTERS,
    COUPLING_CODES,
    COUPLING_LAYOUTS,
    COUPLING_MASKS,
    COUPLING_ORDERS,
    COUPLING_SCALES,
)
from fastgen.kernels._affine_coupling_plan import Call
from fastgen.kernels._affine_coupling_scale import multiplier
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, tensor_reasons
from fastgen.reference._layout import empty_like_layout, opmath_dtype
from fastgen.reference.affine_coupling import empty_beside

__all__ = ["affine_coupling_additive", "affine_coupling_bwd", "affine_coupling_fwd", "reasons"]

LOGARITHMS = tl.constexpr(1)  # what is summed: the logarithms before their mean is taken, or their gradients
GRADIENTS = tl.constexpr(2)


@triton.jit
def raw_channels(c, channels, indices, first, transformed, INDICES: tl.constexpr, BLOCK_J: tl.constexpr):
    """The channels of raw scale and shift that belong to channels ``c``, -1 where none does, and whether an index is wrong."""
    if INDICES:
        j = tl.zeros_like(c) - 1
        hits = tl.zeros_like(c)
        inside = tl.zeros([BLOCK_J], tl.int64)
        for start in range(0, transformed, BLOCK_J):
            at = start + tl.arange(0, BLOCK_J)
            index = tl.load(indices + at, mask=at < transformed, other=-1)
            hit = ((index[None, :] == c[:, None]) & (at < transformed)[None, :]).to(tl.int64)
            j += tl.sum(hit * (at[None, :] + 1), axis=1)
            hits += tl.sum(hit, axis=1)
            inside += ((index >= 0) & (index < channels)).to(tl.int64)
        wrong = (tl.sum(inside, axis=0) != transformed) | (tl.max(hits, axis=0) > 1)
        return tl.where(hits == 1, j, -1), wrong
    else:
        j = c - first
        return tl.where((j >= 0) & (j < transformed), j, -1), False


@triton.jit
def tile_of(tile, tiles_c, channels, positions, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels and positions of a tile, and which elements are there."""
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    return c, p, (p < positions)[:, None] & (c < channels)[None, :]


@triton.jit
def chosen_positions(p, width, BOARD: tl.constexpr):
    """Where h + w is even (BOARD 1) or odd (2); 0: everywhere."""
    if BOARD == 0:
        return p >= 0
    else:
        return (p // width + p % width) % 2 == BOARD - 1


@triton.jit
def mean_at(means, n, p, positions, A_POSITION: tl.constexpr, ACC: tl.constexpr):
    """What is one a sample or one a position, [BLOCK_P, 1] or [1, 1]; 0 where it is None."""
    if means is None:
        return tl.zeros([1, 1], ACC)
    elif A_POSITION:
        return tl.load(means + n * positions + p, mask=p < positions, other=0.0).to(ACC)[:, None]
    else:
        return tl.load(means + n + tl.zeros([1, 1], tl.int64)).to(ACC)


@triton.jit
def store_sums(parts, values, n, tile, tiles, tiles_c, p, positions, bad, A_POSITION: tl.constexpr):
    """The sum of a tile, or of each of its positions, NaN where ``bad``."""
    nan = tl.where(bad, float("nan"), 0.0).to(values.dtype)
    if A_POSITION:
        to = (n * tiles_c + tile % tiles_c) * positions + p
        tl.store(parts + to, tl.sum(values, axis=1) + nan, mask=p < positions)
    else:
        tl.store(parts + n * tiles + tile, tl.sum(tl.sum(values, axis=1), axis=0) + nan)


@triton.jit(do_not_specialize=["tiles_c", "tiles", "first", "width"])
def affine_coupling_kernel(
    x,  # [N, C, P] through strides
    raw,  # [N, C', P] through strides
    shift,  # as raw
    weight,  # [C'] or None
    indices,  # [C'] or None
    means,  # of the logarithms: [N] or [N, P], or None
    y,  # as x, or None where only sums are wanted
    parts,  # sums of the logarithms [N, tiles] or [N, tiles_c, P], or None
    channels,  # C
    transformed,  # C'
    positions,  # P
    first,  # transformed channel, without indices
    width,  # of the image under a checkerboard
    tiles_c,  # programs side by side
    tiles,  # programs a sample
    x_n,
    x_c,
    x_p,  # strides of x and y
    raw_n,
    raw_c,
    raw_p,  # strides of raw and shift
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ADDITIVE: tl.constexpr,
    KIND: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SHIFT_LAST: tl.constexpr,
    SIGN: tl.constexpr,
    BOARD: tl.constexpr,
    A_POSITION: tl.constexpr,
    BOUND: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    c, p, inside = tile_of(tile, tiles_c, channels, positions, BLOCK_P, BLOCK_C)
    j, wrong = raw_channels(c, channels, indices, first, transformed, indices is not None, BLOCK_J)
    chosen = inside & (j >= 0)[None, :] & chosen_positions(p, width, BOARD)[:, None]
    from_raw = n * raw_n + p[:, None] * raw_p + j[None, :] * raw_c
    at = n * x_n + p[:, None] * x_p + c[None, :] * x_c
    t = tl.load(shift + from_raw, mask=chosen, other=0.0).to(ACC) * tl.full([1, 1], SIGN * GAIN, ACC)
    v = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    if ADDITIVE:
        moved = v + t
    else:
        a = tl.load(raw + from_raw, mask=chosen, other=0.0).to(ACC) * tl.full([1, 1], GAIN, ACC)
        w = tl.full([1, 1], BOUND, ACC)
        if weight is not None:
            w = tl.load(weight + j, mask=j >= 0, other=1.0).to(ACC)[None, :]
        mean = mean_at(means, n, p, positions, A_POSITION, ACC)
        m, log, _by_a, _by_weight = multiplier(a, w, mean, KIND, NEGATIVE, BOUND, OFFSET, EPS, ACC)
        moved = v * m + t if SHIFT_LAST else (v + t) * m
        if parts is not None:
            store_sums(parts, tl.where(chosen, log, 0.0), n, tile, tiles, tiles_c, p, positions, wrong, A_POSITION)
    if y is not None:
        tl.store(y + at, tl.where(chosen, moved, v).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles_c", "tiles", "first", "width"])
def affine_coupling_bwd_kernel(
    grad,  # as x
    x,  # [N, C, P] through strides
    raw,  # [N, C', P] through strides
    shift,  # as raw
    weight,  # [C'] or None
    indices,  # [C'] or None
    means,  # of the logarithms: [N] or [N, P], or None
    added,  # to the gradients of the logarithms, as means
    dx,  # as x, or None where only sums are wanted
    d_raw,  # as raw, or None
    d_shift,  # as raw, or None
    parts,  # sums of the gradients of the logarithms [N, tiles] or [N, tiles_c, P], or None
    d_weight,  # their sums for the weights [N, tiles_p, C'], or None
    channels,  # C
    transformed,  # C'
    positions,  # P
    first,  # transformed channel, without indices
    width,  # of the image under a checkerboard
    tiles_c,  # programs side by side
    tiles,  # programs a sample
    x_n,
    x_c,
    x_p,  # strides of x and y
    raw_n,
    raw_c,
    raw_p,  # strides of raw and shift
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    KIND: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SHIFT_LAST: tl.constexpr,
    SIGN: tl.constexpr,
    BOARD: tl.constexpr,
    A_POSITION: tl.constexpr,
    BOUND: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    c, p, inside = tile_of(tile, tiles_c, channels, positions, BLOCK_P, BLOCK_C)
    j, _wrong = raw_channels(c, channels, indices, first, transformed, indices is not None, BLOCK_J)
    taken = inside & (j >= 0)[None, :]
    chosen = taken & chosen_positions(p, width, BOARD)[:, None]
    from_raw = n * raw_n + p[:, None] * raw_p + j[None, :] * raw_c
    at = n * x_n + p[:, None] * x_p + c[None, :] * x_c
    t = tl.load(shift + from_raw, mask=chosen, other=0.0).to(ACC) * tl.full([1, 1], SIGN * GAIN, ACC)
    a = tl.load(raw + from_raw, mask=chosen, other=0.0).to(ACC) * tl.full([1, 1], GAIN, ACC)
    v = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
    w = tl.full([1, 1], BOUND, ACC)
    if weight is not None:
        w = tl.load(weight + j, mask=j >= 0, other=1.0).to(ACC)[None, :]
    mean = mean_at(means, n, p, positions, A_POSITION, ACC)
    more = mean_at(added, n, p, positions, A_POSITION, ACC)
    m, _log, by_a, by_weight = multiplier(a, w, mean, KIND, NEGATIVE, BOUND, OFFSET, EPS, ACC)
    by_input = g * m
    by_log = by_input * (v if SHIFT_LAST else v + t)
    if parts is not None:
        store_sums(parts, tl.where(chosen, by_log, 0.0), n, tile, tiles, tiles_c, p, positions, False, A_POSITION)
    if dx is not None:
        by_log = tl.where(chosen, by_log + more, 0.0)
        by_raw = by_log * by_a * tl.full([1, 1], GAIN, ACC)
        by_shift = (g if SHIFT_LAST else by_input) * tl.full([1, 1], SIGN * GAIN, ACC)
        if d_weight is not None:
            to = (n * (tiles // tiles_c) + tile // tiles_c) * transformed + j
            tl.store(
                d_weight + to, tl.sum(tl.where(chosen, by_log * by_weight, 0.0), axis=0), mask=(c < channels) & (j >= 0)
            )
        tl.store(dx + at, tl.where(chosen, by_input, g).to(dx.dtype.element_ty), mask=inside)
        tl.store(d_raw + from_raw, tl.where(chosen, by_raw, 0.0).to(d_raw.dtype.element_ty), mask=taken)
        tl.store(d_shift + from_raw, tl.where(chosen, by_shift, 0.0).to(d_raw.dtype.element_ty), mask=taken)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())


class _Affine:
    """A call with its codes: pointers of raw scale and shift, constants, means."""

    def __init__(
        self, op: str, input: Tensor, raw: Tensor, shift: Tensor | None, weight: Tensor | None, indices: Tensor | None,
        codes: Sequence[int], bound: float, offset: float, eps: float, gain: float,
    ) -> None:  # fmt: skip
        operands = Operands(op, input)
        tables = (
            COUPLING_SCALES,
            COUPLING_CENTERS,
            COUPLING_ORDERS,
            COUPLING_LAYOUTS,
            COUPLING_MASKS,
            (None, ""),
            (None, ""),
        )
        if len(codes) != len(tables):
            operands.fail(f"codes must be {COUPLING_CODES}, got {list(codes)}")
        for name, code, table in zip(COUPLING_CODES, codes, tables, strict=True):
            operands.code(name, code, table)
        scale, center, order, layout, mask, divide, inverse = codes
        if weight is not None and COUPLING_SCALES[scale] not in ("tanh", "soft_tanh"):
            operands.fail(f"scale_weight goes with tanh and soft_tanh, got {COUPLING_SCALES[scale]}")
        if center and COUPLING_SCALES[scale] in ("sigmoid", "softplus"):
            operands.fail(f"no center is taken from {COUPLING_SCALES[scale]}")
        self.call = call = Call(op, input, raw, shift, indices, mask)
        if weight is not None and not weight.is_floating_point():
            operands.fail(f"scale_weight must be a floating-point tensor, got {weight.dtype}")
        self.weight = operands.sized("scale_weight", weight, call.transformed)
        self.center, self.layout = COUPLING_CENTERS[center], COUPLING_LAYOUTS[layout]
        self.packed = shift is None
        self.a_position = call.vectors or self.center == "channels"
        self.constants = {
            "KIND": scale, "NEGATIVE": bool(divide) != bool(inverse), "SIGN": -1 if inverse else 1,
            "SHIFT_LAST": (COUPLING_ORDERS[order] == "scale_shift") != bool(inverse),
            "BOUND": bound, "OFFSET": offset, "EPS": eps, "GAIN": gain, **call.blocks(),
        }  # fmt: skip
        self.means: Tensor | None = None

    def raw_strides(self) -> tuple[int, int, int]:
        sample, channel, position = self.call.strides((2 if self.packed else 1) * self.call.transformed)
        return sample, channel * (2 if self.packed and self.layout.startswith("interleaved") else 1), position

    def unpacked(self, packed: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tensors that begin where raw scale and shift do."""
        if shift is not None:
            return packed, shift
        second = packed[:, 1 if self.layout.startswith("interleaved") else self.call.transformed :]
        return (packed, second) if self.layout in ("scale_first", "interleaved_scale_first") else (second, packed)

    def forward(self, y: Tensor | None, parts: Tensor | None, a_position: bool) -> None:
        call = self.call
        launch(
            affine_coupling_kernel, call.programs(), call.x, *self.unpacked(call.raw, call.shift), self.weight, call.indices,
            self.means, y, parts, *call.sizes(), *call.strides(call.channels), *self.raw_strides(), ADDITIVE=False,
            A_POSITION=a_position, **self.constants,
        )  # fmt: skip

    def mean(self, parts: Tensor) -> Tensor:
        """[N] or [N, P], the mean of what was summed."""
        sums, call = parts.sum(1), self.call
        if self.a_position:
            return sums / call.transformed
        count = call.positions * call.transformed
        if call.board:
            even = (call.positions + 1) // 2
            count = call.transformed * (even if call.board == 1 else call.positions - even)
        return sums / max(count, 1)

    def find_means(self) -> None:
        if self.center is None:
            return
        parts = self.call.parts(self.a_position, self.call.input)
        negative, self.constants["NEGATIVE"] = self.constants["NEGATIVE"], False
        self.forward(None, parts, self.a_position)
        self.constants["NEGATIVE"] = negative
        self.means = self.mean(parts)

    def backward(
        self,
        grad: Tensor,
        added: Tensor | None,
        gradients: tuple[Tensor, ...] | None,
        parts: Tensor | None,
        d_weight: Tensor | None,
    ) -> None:
        call = self.call
        dx, d_raw, d_shift = (None, None, None) if gradients is None else gradients
        launch(
            affine_coupling_bwd_kernel, call.programs(), grad, call.x, *self.unpacked(call.raw, call.shift), self.weight,
            call.indices, self.means, added, dx, d_raw, d_shift, parts, d_weight, *call.sizes(), *call.strides(call.channels),
            *self.raw_strides(), A_POSITION=self.a_position, **self.constants,
        )  # fmt: skip


def affine_coupling_fwd(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    affine = _Affine("affine_coupling_fwd", input, *args)
    call = affine.call
    y, zeros = empty_like_layout(input), input.new_zeros(input.shape[0], dtype=opmath_dtype(input.dtype))
    if not y.numel():
        return y, zeros
    with on_device(input):
        affine.find_means()
        parts = call.parts(affine.a_position, input)
        affine.forward(y, parts, affine.a_position)
    if affine.a_position and not call.vectors:
        parts = parts.sum(2, keepdim=True)
    log_det = parts.sum(1).reshape(input.shape[0])
    return y, log_det if affine.center is None else 0 * log_det


def affine_coupling_bwd(
    grad_output: Tensor, grad_log_det: Tensor, input: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affine = _Affine("affine_coupling_bwd", input, *args)
    call, wide = affine.call, opmath_dtype(input.dtype)
    if grad_output.dtype != input.dtype:
        call.operands.fail(f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    grad = call.operands.like("grad_output", grad_output)
    added = call.operands.sized("grad_log_det", grad_log_det, input.shape[0])
    if not added.is_floating_point():
        call.operands.fail(f"grad_log_det must be a floating-point tensor, got {added.dtype}")
    dx, d_raw = empty_like_layout(input), empty_beside(input, call.raw)
    d_shift = input.new_empty(0) if call.shift is None else empty_beside(input, call.shift)
    d_weight = input.new_zeros(0 if affine.weight is None else call.transformed, dtype=wide)
    if not input.numel():
        return dx, d_raw, d_shift, d_weight
    sums = None if affine.weight is None else d_weight.new_empty(call.n, call.tiles_p, call.transformed)
    gradients = (dx, *affine.unpacked(d_raw, None if call.shift is None else d_shift))
    with on_device(input):
        affine.find_means()
        if affine.center is not None:
            parts = call.parts(affine.a_position, input)
            affine.backward(grad, None, None, parts, None)
            added = -affine.mean(parts)
        affine.backward(grad, added, gradients, None, sums)
    return dx, d_raw, d_shift, d_weight if sums is None else sums.flatten(0, 1).sum(0)


def affine_coupling_additive(input: Tensor, shift: Tensor, indices: Tensor | None, mask: int, inverse: bool) -> Tensor:
    call = Call("affine_coupling_additive", input, None, shift, indices, mask)
    y = empty_like_layout(input)
    if y.numel():
        with on_device(input):
            launch(
                affine_coupling_kernel, call.programs(), call.x, call.shift, call.shift, None, call.indices, None, y, None,
                *call.sizes(), *call.strides(call.channels), *call.strides(call.transformed), ADDITIVE=True, KIND=0, NEGATIVE=False,
                SHIFT_LAST=True, SIGN=-1 if inverse else 1, A_POSITION=False, BOUND=1.0, OFFSET=0.0, EPS=0.0, GAIN=1.0,
                **call.blocks(),
            )  # fmt: skip
    return y
