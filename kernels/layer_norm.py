"""Triton kernels of `layer_norm`: a program holds whole rows, reads each operand once and writes sum, output and statistics.

In the backward it goes through a block of rows of one sample, or of all (`_slices`): each row is read once, ds and the gradient
of the branch are written, and the sums of dy, dy x^ and ds branch, of which the gradients of the small tensors are made, stay in
registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._elements import load_or, reciprocal_root
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, accumulator, tensor_reasons
from fastgen.kernels._slices import blocks_of, partial_sums, size_reasons, tile_of
from fastgen.reference._layout import opmath_dtype

__all__ = ["layer_norm", "layer_norm_bwd", "layer_norm_fwd", "reasons"]


@triton.jit
def tile_rows(last, first, size, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows from ``first`` (int64) up to ``last``, their columns, the offsets of their elements, and which of them are there."""
    row = first + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    return row, c, row[:, None] * size + c[None, :], (row < last)[:, None] & (c < size)[None, :]


@triton.jit(do_not_specialize=["tiles", "group_rows"])
def rows_kernel(
    x,  # [rows, C]
    residual,  # [rows, C] or None
    gate,  # [N, C] or None
    weight,  # [C] or None
    bias,  # [C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    y,  # [rows, C]
    total,  # [rows, C] or None
    mean_out,  # [rows]
    rstd_out,  # [rows]
    tiles,  # of a group: the rows of a sample, or all where no small tensor is a sample's own
    group_rows,
    size,  # C
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // tiles
    last = (group + 1) * group_rows
    row, c, at, mask = tile_rows(last, group * group_rows + program % tiles * BLOCK_P, size, BLOCK_P, BLOCK_C)
    inside, of_sample = c < size, group * size + c
    s = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    w = load_or(weight, c, inside, 1.0, ACC)[None, :]
    b = load_or(bias, c, inside, 0.0, ACC)[None, :]
    modulation = 1.0 + load_or(scale, of_sample, inside, 0.0, ACC)[None, :]
    added = load_or(shift, of_sample, inside, 0.0, ACC)[None, :]
    if residual is not None:
        opened = load_or(gate, of_sample, inside, 1.0, ACC)[None, :]
        s = s * opened + tl.load(residual + at, mask=mask, other=0.0).to(ACC)
        stored = s.to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=mask)
        s = stored.to(ACC)
    count = tl.cast(size, ACC)
    mean = tl.sum(s, axis=1) / count
    centred = tl.where(mask, s - mean[:, None], 0.0)
    missed = (
        tl.sum(centred, axis=1) / count
    )  # by the rounded mean: of a mean of 1e4 it is no small part of a deviation of 1
    centred = tl.where(mask, centred - missed[:, None], 0.0)
    rstd = reciprocal_root(tl.sum(centred * centred, axis=1) / count + EPS)
    tl.store(mean_out + row, mean + missed, mask=row < last)
    tl.store(rstd_out + row, rstd, mask=row < last)
    value = (centred * rstd[:, None] * w + b) * modulation + added
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks", "a_group", "group_rows", "block"])
def rows_bwd_kernel(
    dy,  # [rows, C]
    d_total,  # [rows, C] or None
    s,  # [rows, C]
    mean,  # [rows]
    rstd,  # [rows]
    branch,  # [rows, C] or None
    gate,  # [N, C] or None
    weight,  # [C] or None
    scale,  # [N, C] or None
    ds,  # [rows, C]
    d_branch,  # [rows, C] or None
    parts,  # [2 or 3, groups, blocks, C]: sums of dy, dy x^ and, with a gate, ds branch
    blocks,  # of all groups
    a_group,  # of a group
    group_rows,
    block,  # rows of a block
    size,  # C
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // a_group
    first = group * group_rows + program % a_group * block
    last = tl.minimum(first + block, (group + 1) * group_rows)
    c = tl.arange(0, BLOCK_C)
    inside = c < size
    k = load_or(weight, c, inside, 1.0, ACC) * (1.0 + load_or(scale, group * size + c, inside, 0.0, ACC))
    opened = load_or(gate, group * size + c, inside, 1.0, ACC)
    count = tl.cast(size, ACC)
    sum_dy = tl.zeros([BLOCK_C], dtype=ACC)
    sum_dy_x = tl.zeros([BLOCK_C], dtype=ACC)
    sum_gate = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(first, last, BLOCK_P):
        row, _c, at, mask = tile_rows(last, start, size, BLOCK_P, BLOCK_C)
        m = tl.load(mean + row, mask=row < last, other=0.0)
        r = tl.load(rstd + row, mask=row < last, other=0.0)
        x_hat = tl.where(mask, (tl.load(s + at, mask=mask, other=0.0).to(ACC) - m[:, None]) * r[:, None], 0.0)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        dx = grad * k[None, :]
        mean_dx = tl.sum(dx, axis=1) / count
        mean_dx_x = tl.sum(dx * x_hat, axis=1) / count
        value = (dx - (mean_dx[:, None] + x_hat * mean_dx_x[:, None])) * r[:, None]
        if d_total is not None:
            value += tl.load(d_total + at, mask=mask, other=0.0).to(ACC)
        sum_dy += tl.sum(grad, axis=0)
        sum_dy_x += tl.sum(grad * x_hat, axis=0)
        if gate is not None:
            value = tl.where(mask, value, 0.0)
            sum_gate += tl.sum(value * tl.load(branch + at, mask=mask, other=0.0).to(ACC), axis=0)
            tl.store(d_branch + at, (value * opened[None, :]).to(d_branch.dtype.element_ty), mask=mask)
        tl.store(ds + at, value.to(ds.dtype.element_ty), mask=mask)
    to = parts + program * size + c
    apart = tl.cast(blocks, tl.int64) * size
    tl.store(to, sum_dy, mask=inside)
    tl.store(to + apart, sum_dy_x, mask=inside)
    if gate is not None:
        tl.store(to + 2 * apart, sum_gate, mask=inside)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor)) + size_reasons(*args[0].shape[-1:] or (0,))


def layer_norm_fwd(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = _operands("layer_norm_fwd", input, residual, gate)
    n, size = input.shape[0], input.shape[-1]
    if residual is not None and residual.dtype != input.dtype:
        operands.fail(f"residual must have the dtype of input, got {residual.dtype} and {input.dtype}")
    x, residual = (operands.sized(name, t, *input.shape) for name, t in (("input", input), ("residual", residual)))
    weight, bias = (operands.sized(name, t, size) for name, t in (("weight", weight), ("bias", bias)))
    gate, scale, shift = (
        operands.sized(name, t, n, size) for name, t in (("gate", gate), ("scale", scale), ("shift", shift))
    )
    y = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    total = None if residual is None else torch.empty_like(y)
    mean = torch.empty(input.shape[:-1], dtype=opmath_dtype(input.dtype), device=input.device)
    rstd = torch.empty_like(mean)
    if input.numel():
        groups = 1 if gate is None and scale is None and shift is None else n
        tile, rows = tile_of(size, most_warps=32), mean.numel() // groups  # with 16, the widest rows spill
        tiles = triton.cdiv(rows, tile["BLOCK_P"])
        with on_device(input):
            launch(
                rows_kernel, groups * tiles, x, residual, gate, weight, bias, scale, shift, y, total, mean, rstd, tiles, rows,
                size, EPS=float(eps), ACC=accumulator(input), **tile, enable_fp_fusion=True,
            )  # fmt: skip
    else:  # no element has no mean
        mean.fill_(float("nan")), rstd.fill_(float("nan"))
    return y, input.new_empty(0) if total is None else total, mean, rstd


def layer_norm(*args: Any) -> tuple[Tensor, Tensor]:
    """(output, sum) alone; see :func:`layer_norm_fwd`."""
    return layer_norm_fwd(*args)[:2]


def layer_norm_bwd(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = _operands("layer_norm_bwd", normalized, branch, gate)
    shape, n, size = normalized.shape, normalized.shape[0], normalized.shape[-1]
    if (gate is None) != (branch is None):
        operands.fail("gate and branch come together")
    dy, d_total, s, branch = (
        operands.sized(name, t, *shape)
        for name, t in (
            ("grad_output", grad_output), ("grad_sum", grad_sum), ("normalized", normalized), ("branch", branch)
        )
    )  # fmt: skip
    mean, rstd = (operands.sized(name, t, *shape[:-1]) for name, t in (("mean", mean), ("rstd", rstd)))
    weight, bias = (operands.sized(name, t, size) for name, t in (("weight", weight), ("bias", bias)))
    gate, scale, shift = (
        operands.sized(name, t, n, size) for name, t in (("gate", gate), ("scale", scale), ("shift", shift))
    )
    ds = torch.empty(shape, dtype=normalized.dtype, device=normalized.device)
    d_branch = None if gate is None else torch.empty_like(ds)
    modulated = scale is not None or shift is not None
    by_sample = modulated or gate is not None
    groups = n if by_sample else 1
    tile = tile_of(size)
    blocks = blocks_of(groups, mean.numel() // max(groups, 1), tile["BLOCK_P"])
    parts = partial_sums(blocks, 2 if gate is None else 3, size, mean)
    if normalized.numel():
        with on_device(normalized):
            launch(
                rows_bwd_kernel, groups * blocks.a_group, dy, d_total, s, mean, rstd, branch, gate, weight, scale, ds, d_branch,
                parts, groups * blocks.a_group, blocks.a_group, blocks.slices, blocks.block, size,
                ACC=accumulator(normalized), **tile, enable_fp_fusion=True,
            )  # fmt: skip
    sum_dy, sum_dy_x, *sum_gate = parts.sum(2)  # [groups, C] each
    modulation = 1 if scale is None else 1 + scale.to(mean.dtype)
    d_weight, d_bias = ((modulation * t).sum(0) for t in (sum_dy_x, sum_dy))
    nothing = mean.new_empty(0)
    d_scale = d_shift = nothing
    if modulated:
        d_scale = sum_dy_x if weight is None else sum_dy_x * weight.to(mean.dtype)
        d_scale = d_scale if bias is None else d_scale + sum_dy * bias.to(mean.dtype)
        d_shift = sum_dy
    d_gate = sum_gate[0] if sum_gate else nothing
    in_branch = normalized.new_empty(0) if d_branch is None else d_branch
    return ds, in_branch, d_gate, d_weight, d_bias, d_scale, d_shift


def _operands(op: str, main: Tensor, branch: Tensor | None, gate: Tensor | None) -> Operands:
    operands = Operands(op, main)
    if main.dim() < 2:
        operands.fail(f"what is normalised must be [N, *, C], got shape {tuple(main.shape)}")
    if gate is not None and branch is None:
        operands.fail("gate needs a residual")
    return operands
