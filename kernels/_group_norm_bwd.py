"""Triton kernels of `group_norm`, backward.

With x^ the normalised input, dz = dy act'(z), k = w (1 + scale): dx = rstd (k dz - mean(k dz) - x^ mean(k dz x^)).

    sums     a program reads the tiles of one split and keeps the sums of dz, dz x^ and x^ of each channel
    combine  a program merges the splits of one group: the two means, every parameter's gradient a sample, and
             dx = by_dz dz + by_x (x - m) + constant as three numbers a channel
    dx       a program maps one tile
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._launch import dense
from fastgen.kernels._group_norm_plan import load_or, make_plan, tile_of
from fastgen.reference._layout import empty_like_layout

WARPS = 8  # 8 elements of a tile a thread: with 16 the sums take 145 registers on sm_80


@triton.jit
def silu_grad(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s + s * z * (1.0 - s)


@triton.jit
def load_maps(
    n, c, inside, channels, per_group, groups, mean, rstd, weight, bias, channel_bias, scale, shift, ACC: tl.constexpr
):
    """Of channels ``c`` of sample n: m and rstd of x^ = (x - m) rstd, and a, b of z = (x - m) a + b."""
    row = n * channels + c
    group = n * groups + c // per_group
    r = tl.load(rstd + group, mask=inside, other=0.0)
    m = tl.load(mean + group, mask=inside, other=0.0) - load_or(channel_bias, row, inside, 0.0, ACC)
    modulation = 1.0 + load_or(scale, row, inside, 0.0, ACC)
    a = r * load_or(weight, c, inside, 1.0, ACC) * modulation
    b = load_or(bias, c, inside, 0.0, ACC) * modulation + load_or(shift, row, inside, 0.0, ACC)
    return m, r, a, b


@triton.jit
def sums_kernel(
    x,  # [N, C, P] through strides
    dy,  # the same
    mean,  # [N, G]
    rstd,  # [N, G]
    weight,  # [C] or None
    bias,  # [C] or None
    channel_bias,  # [N, C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    parts,  # [3, N, splits, C]: sums of dz, dz x^, x^
    n_samples,
    channels,
    pixels,
    groups,
    stride_c,
    stride_p,
    splits,
    pixels_per_split,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    block, split, n = program % blocks, program // blocks % splits, program // blocks // splits
    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m, r, a, b = load_maps(
        n,
        c,
        c < channels,
        channels,
        channels // groups,
        groups,
        mean,
        rstd,
        weight,
        bias,
        channel_bias,
        scale,
        shift,
        ACC,
    )
    sum_dz = tl.zeros([BLOCK_C], dtype=ACC)
    sum_dz_x = tl.zeros([BLOCK_C], dtype=ACC)
    sum_x = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(first, last, BLOCK_P):
        p, cc, mask = tile_of(block, channels, pixels, start, last, BLOCK_P, BLOCK_C)
        at = n * channels * pixels + p[:, None] * stride_p + cc[None, :] * stride_c
        centred = tl.load(x + at, mask=mask, other=0.0).to(ACC) - m[None, :]
        dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        if SILU:
            dz = dz * silu_grad(centred * a[None, :] + b[None, :])
        dz = tl.where(mask, dz, 0.0)
        x_hat = tl.where(mask, centred * r[None, :], 0.0)
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_x += tl.sum(dz * x_hat, axis=0)
        sum_x += tl.sum(x_hat, axis=0)
    at = (n * splits + split) * channels + c
    size = n_samples.to(tl.int64) * splits * channels
    tl.store(parts + at, sum_dz, mask=c < channels)
    tl.store(parts + size + at, sum_dz_x, mask=c < channels)
    tl.store(parts + 2 * size + at, sum_x, mask=c < channels)


@triton.jit
def merge_splits(parts, n, c, inside, channels, splits, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """The sum over the splits of one of the three parts, in order."""
    total = tl.zeros([BLOCK_D], dtype=ACC)
    for split in range(0, splits):
        total += tl.load(parts + (n * splits + split) * channels + c, mask=inside, other=0.0)
    return total


@triton.jit
def combine_kernel(
    parts,  # [3, N, splits, C]
    rstd,  # [N, G]
    weight,  # [C] or None
    bias,  # [C] or None
    scale,  # [N, C] or None
    combine,  # [3, N, C]: by_dz, by_x, constant
    grads,  # [5, N, C]: weight and bias of this sample, channel_bias, scale, shift
    n_samples,
    channels,
    pixels,
    groups,
    splits,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    per_group = channels // groups
    part = n_samples.to(tl.int64) * splits * channels
    row_size = n_samples.to(tl.int64) * channels
    total = (per_group * pixels).to(ACC)
    r = tl.load(rstd + program)
    group_dz = tl.zeros([BLOCK_D], dtype=ACC)
    group_dz_x = tl.zeros([BLOCK_D], dtype=ACC)
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c, inside = g * per_group + d, d < per_group
        k = load_or(weight, c, inside, 1.0, ACC) * (1.0 + load_or(scale, n * channels + c, inside, 0.0, ACC))
        group_dz += k * merge_splits(parts, n, c, inside, channels, splits, BLOCK_D, ACC)
        group_dz_x += k * merge_splits(parts + part, n, c, inside, channels, splits, BLOCK_D, ACC)
    mean_dz = tl.sum(group_dz, axis=0) / total
    mean_dz_x = tl.sum(group_dz_x, axis=0) / total
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c, inside = g * per_group + d, d < per_group
        row = n * channels + c
        w = load_or(weight, c, inside, 1.0, ACC)
        modulation = 1.0 + load_or(scale, row, inside, 0.0, ACC)
        dz = merge_splits(parts, n, c, inside, channels, splits, BLOCK_D, ACC)
        dz_x = merge_splits(parts + part, n, c, inside, channels, splits, BLOCK_D, ACC)
        x_hat = merge_splits(parts + 2 * part, n, c, inside, channels, splits, BLOCK_D, ACC)
        tl.store(combine + row, r * w * modulation, mask=inside)
        tl.store(combine + row_size + row, tl.zeros([BLOCK_D], dtype=ACC) - r * r * mean_dz_x, mask=inside)
        tl.store(combine + 2 * row_size + row, tl.zeros([BLOCK_D], dtype=ACC) - r * mean_dz, mask=inside)
        tl.store(grads + row, modulation * dz_x, mask=inside)
        tl.store(grads + row_size + row, modulation * dz, mask=inside)
        d_channel_bias = r * (w * modulation * dz - pixels.to(ACC) * mean_dz - x_hat * mean_dz_x)
        tl.store(grads + 2 * row_size + row, d_channel_bias, mask=inside)
        d_scale = w * dz_x + load_or(bias, c, inside, 0.0, ACC) * dz
        tl.store(grads + 3 * row_size + row, d_scale, mask=inside)
        tl.store(grads + 4 * row_size + row, dz, mask=inside)


@triton.jit
def dx_kernel(
    x,  # [N, C, P] through strides
    dy,  # the same
    dx,  # the same
    mean,  # [N, G]
    rstd,  # [N, G]
    weight,  # [C] or None
    bias,  # [C] or None
    channel_bias,  # [N, C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    combine,  # [3, N, C]
    n_samples,
    channels,
    pixels,
    groups,
    stride_c,
    stride_p,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    program = tl.program_id(0).to(tl.int64)
    block, tile, n = program % blocks, program // blocks % pixel_blocks, program // blocks // pixel_blocks
    p, c, mask = tile_of(block, channels, pixels, tile * BLOCK_P, pixels, BLOCK_P, BLOCK_C)
    m, _r, a, b = load_maps(
        n,
        c,
        c < channels,
        channels,
        channels // groups,
        groups,
        mean,
        rstd,
        weight,
        bias,
        channel_bias,
        scale,
        shift,
        ACC,
    )
    row_size = n_samples.to(tl.int64) * channels
    row = n * channels + c
    by_dz = tl.load(combine + row, mask=c < channels, other=0.0)
    by_x = tl.load(combine + row_size + row, mask=c < channels, other=0.0)
    constant = tl.load(combine + 2 * row_size + row, mask=c < channels, other=0.0)
    at = n * channels * pixels + p[:, None] * stride_p + c[None, :] * stride_c
    centred = tl.load(x + at, mask=mask, other=0.0).to(ACC) - m[None, :]
    dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    if SILU:
        dz = dz * silu_grad(centred * a[None, :] + b[None, :])
    value = by_dz[None, :] * dz + (by_x[None, :] * centred + constant[None, :])
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


def group_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dy = dense(input, input), dense(grad_output, input)
    plan = make_plan(x, num_groups)
    dx = empty_like_layout(input)
    grads = torch.zeros((5, plan.n, plan.channels), dtype=plan.opmath, device=x.device)
    if x.numel() > 0:
        params = [None if p is None else p.contiguous() for p in (weight, bias, channel_bias, scale, shift)]
        parts = torch.empty((3, plan.n, plan.splits, plan.channels), dtype=plan.opmath, device=x.device)
        combine = torch.empty((3, plan.n, plan.channels), dtype=plan.opmath, device=x.device)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        tile = {"BLOCK_P": plan.block_p, "BLOCK_C": plan.block_c, "ACC": plan.accumulate}
        launch = {"num_warps": WARPS, "enable_fp_fusion": True}
        strides = (plan.stride_c, plan.stride_p)
        sums_kernel[(plan.n * plan.splits * plan.channel_blocks,)](
            x, dy, mean, rstd, *params, parts, plan.n, plan.channels, plan.pixels, plan.groups, *strides, plan.splits,
            plan.pixels_per_split, SILU=activation == 1, **tile, **launch,
        )  # fmt: skip
        combine_kernel[(plan.n * plan.groups,)](
            parts, rstd, params[0], params[1], params[3], combine, grads, plan.n, plan.channels, plan.pixels,
            plan.groups, plan.splits, BLOCK_D=min(triton.next_power_of_2(plan.per_group), 256), ACC=plan.accumulate,
            **launch,
        )  # fmt: skip
        dx_kernel[(plan.n * plan.pixel_blocks * plan.channel_blocks,)](
            x, dy, dx, mean, rstd, *params, combine, plan.n, plan.channels, plan.pixels, plan.groups, *strides,
            SILU=activation == 1, **tile, **launch,
        )  # fmt: skip
    return dx, grads[0].sum(0), grads[1].sum(0), grads[2].clone(), grads[3].clone(), grads[4].clone()
