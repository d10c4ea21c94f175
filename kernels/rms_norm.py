"""Triton kernels of `rms_norm`: a program holds whole slices, [BLOCK_P, BLOCK_C] through two strides, so that tokens,
channels-last and contiguous images share the code, and reads each operand once.

In the backward it goes through a block of slices of one sample, or of all (`_slices`), writes dx and keeps the sums of dz and
dz x^, of which the gradients of the small tensors are made, in registers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import ACTIVATIONS
from fastgen.kernels._elements import load_or, reciprocal_root, silu, silu_grad
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, dense, tensor_reasons
from fastgen.kernels._slices import blocks_of, partial_sums, size_reasons, tile_of
from fastgen.reference._layout import empty_like_layout, is_channels_last, opmath_dtype

__all__ = ["reasons", "rms_norm", "rms_norm_bwd", "rms_norm_fwd"]


@triton.jit
def tile_slices(last, start, slices, size, stride_c, stride_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Slices from ``start`` (int64) on, counted through all samples; the offsets of their elements, and which are there."""
    at_slice = start + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    base = at_slice // slices * slices * size + at_slice % slices * stride_p
    return at_slice, base[:, None] + c[None, :] * stride_c, (at_slice < last)[:, None] & (c < size)[None, :]


@triton.jit(do_not_specialize=["tiles", "group_slices", "slices"])
def slices_kernel(
    x,  # [N, P, C] through strides
    weight,  # [C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    y,  # as x
    rstd_out,  # [N, P]
    tiles,  # of a group: the slices of a sample, or all where no small tensor is a sample's own
    group_slices,
    slices,  # P
    size,  # C
    stride_c,
    stride_p,
    EPS: tl.constexpr,
    LARGEST: tl.constexpr,  # the rstd of the least norm, or None
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // tiles
    start, last = group * group_slices + program % tiles * BLOCK_P, (group + 1) * group_slices
    at_slice, at, mask = tile_slices(last, start, slices, size, stride_c, stride_p, BLOCK_P, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    inside, of_sample = c < size, group * size + c
    value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    k = load_or(weight, c, inside, 1.0, ACC) * (1.0 + load_or(scale, of_sample, inside, 0.0, ACC))
    b = load_or(shift, of_sample, inside, 0.0, ACC)
    r = reciprocal_root(tl.sum(value * value, axis=1) / tl.cast(size, ACC) + EPS)
    if LARGEST is not None:
        most = tl.full(r.shape, LARGEST, ACC)
        r = tl.where(r > most, most, r)  # a NaN stays
    tl.store(rstd_out + at_slice, r, mask=at_slice < last)
    z = value * r[:, None] * k[None, :] + b[None, :]
    if SILU:
        z = silu(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks", "a_group", "group_slices", "block", "slices"])
def slices_bwd_kernel(
    dy,  # [N, P, C] through strides
    x,  # as dy
    rstd,  # [N, P]
    weight,  # [C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    dx,  # as dy
    parts,  # [2, groups, blocks, C]: sums of dz and dz x^
    blocks,  # of all groups
    a_group,  # of a group
    group_slices,
    block,  # slices of a block
    slices,  # P
    size,  # C
    stride_c,
    stride_p,
    LARGEST: tl.constexpr,  # the rstd of the least norm, or None
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // a_group
    first = group * group_slices + program % a_group * block
    last = tl.minimum(first + block, (group + 1) * group_slices)
    c = tl.arange(0, BLOCK_C)
    inside = c < size
    k = load_or(weight, c, inside, 1.0, ACC) * (1.0 + load_or(scale, group * size + c, inside, 0.0, ACC))
    b = load_or(shift, group * size + c, inside, 0.0, ACC)
    sum_dz = tl.zeros([BLOCK_C], dtype=ACC)
    sum_dz_x = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(first, last, BLOCK_P):
        at_slice, at, mask = tile_slices(last, start, slices, size, stride_c, stride_p, BLOCK_P, BLOCK_C)
        r = tl.load(rstd + at_slice, mask=at_slice < last, other=0.0)
        x_hat = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(ACC) * r[:, None], 0.0)
        dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        if SILU:
            dz = dz * silu_grad(x_hat * k[None, :] + b[None, :])
        dz_x = dz * x_hat
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_x += tl.sum(dz_x, axis=0)
        mean = tl.sum(dz_x * k[None, :], axis=1) / tl.cast(size, ACC)
        if LARGEST is not None:
            mean = tl.where(r < tl.full(r.shape, LARGEST, ACC), mean, 0.0)
        value = r[:, None] * (k[None, :] * dz - x_hat * mean[:, None])
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)
    to = parts + program * size + c
    tl.store(to, sum_dz, mask=inside)
    tl.store(to + tl.cast(blocks, tl.int64) * size, sum_dz_x, mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    over_channels = next(arg for arg in args if isinstance(arg, bool))
    size = args[0].shape[1:2] if over_channels else args[0].shape[-1:]
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor)) + size_reasons(*size or (0,))


class _Call:
    """The sizes and strides of a call, its small tensors, and the tensors of the shape of its input."""

    def __init__(
        self,
        op: str,
        input: Tensor,
        over_channels: bool,
        weight: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        min_norm: float,
        activation: int,
    ) -> None:
        self.operands = Operands(op, input)
        if input.dim() < 2:
            self.operands.fail(f"input must be [N, *, C] or [N, C, *spatial], got shape {tuple(input.shape)}")
        if not min_norm >= 0:
            self.operands.fail(f"min_norm must not be negative, got {min_norm}")
        self.operands.code("activation", activation, ACTIVATIONS)
        self.input, self.over_channels = input, over_channels
        self.n, self.size = input.shape[0], input.shape[1 if over_channels else -1]
        self.rstd_shape = (self.n, *input.shape[2:]) if over_channels else tuple(input.shape[:-1])
        self.slices = math.prod(self.rstd_shape[1:])
        planes = over_channels and self.slices > 1 and not is_channels_last(input)
        self.strides = (self.slices, 1) if planes else (1, self.size)
        self.weight = self.operands.sized("weight", weight, self.size)
        self.scale = self.operands.sized("scale", scale, self.n, self.size)
        self.shift = self.operands.sized("shift", shift, self.n, self.size)
        self.modulated = scale is not None or shift is not None
        self.groups = self.n if self.modulated else 1  # whose slices share k and b
        largest = math.sqrt(self.size) / min_norm if min_norm > 0 else None
        self.constants = {"LARGEST": largest, "SILU": activation == 1, "ACC": accumulator(input)}

    def like(self, name: str, t: Tensor) -> Tensor:
        """``t`` dense, in the layout of what is returned."""
        if not self.over_channels:
            return self.operands.sized(name, t, *self.input.shape)
        self.operands.check(name, t, self.input.shape)
        return dense(t, self.input)

    def empty(self) -> Tensor:
        if self.over_channels:
            return empty_like_layout(self.input)
        return torch.empty(self.input.shape, dtype=self.input.dtype, device=self.input.device)


def rms_norm_fwd(
    input: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    min_norm: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    call = _Call("rms_norm_fwd", input, over_channels, weight, scale, shift, min_norm, activation)
    x, y = call.like("input", input), call.empty()
    rstd = torch.empty(call.rstd_shape, dtype=opmath_dtype(input.dtype), device=input.device)
    if input.numel():
        tile, group_slices = tile_of(call.size), rstd.numel() // call.groups
        tiles = triton.cdiv(group_slices, tile["BLOCK_P"])
        with on_device(input):
            launch(
                slices_kernel, call.groups * tiles, x, call.weight, call.scale, call.shift, y, rstd, tiles, group_slices,
                call.slices, call.size, *call.strides, EPS=float(eps), **call.constants, **tile,
                enable_fp_fusion=True,
            )  # fmt: skip
    else:  # no element has no mean
        rstd.fill_(float("nan"))
    return y, rstd


def rms_norm(*args: Any) -> Tensor:
    """The output alone; see :func:`rms_norm_fwd`."""
    return rms_norm_fwd(*args)[0]


def rms_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    rstd: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    min_norm: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call("rms_norm_bwd", input, over_channels, weight, scale, shift, min_norm, activation)
    x, dy, dx = call.like("input", input), call.like("grad_output", grad_output), call.empty()
    rstd = call.operands.sized("rstd", rstd, *call.rstd_shape)
    tile = tile_of(call.size)
    blocks = blocks_of(call.groups, rstd.numel() // max(call.groups, 1), tile["BLOCK_P"])
    parts = partial_sums(blocks, 2, call.size, rstd)
    if input.numel():
        with on_device(input):
            launch(
                slices_bwd_kernel, call.groups * blocks.a_group, dy, x, rstd, call.weight, call.scale, call.shift, dx, parts,
                call.groups * blocks.a_group, blocks.a_group, blocks.slices, blocks.block, call.slices, call.size,
                *call.strides, **call.constants, **tile, enable_fp_fusion=True,
            )  # fmt: skip
    sum_dz, sum_dz_x = parts.sum(2)  # [groups, C] each
    d_weight = (sum_dz_x if call.scale is None else sum_dz_x * (1 + call.scale.to(rstd.dtype))).sum(0)
    d_scale = d_shift = rstd.new_empty(0)
    if call.modulated:
        d_scale = sum_dz_x if call.weight is None else sum_dz_x * call.weight.to(rstd.dtype)
        d_shift = sum_dz
    return dx, d_weight, d_scale, d_shift
