"""Triton kernels of `group_norm`, backward.

With x^ the normalised input, dz = dy act'(z), k = w (1 + scale): dx = rstd (k dz - mean(k dz) - x^ mean(k dz x^)).

    sums     a program reads the tiles of one split and keeps the sums of dz, dz x^ and x^ of each channel
    combine  a program merges the splits of one group: the two means, every parameter's gradient a sample, and
             dx = by_dz dz + by_x (x + added - m) + constant as three numbers a channel
    dx       a program maps one tile
    whole    a group that fits one program is read once, and the other three are not needed
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import ACTIVATIONS
from fastgen.kernels._elements import load_or, silu_grad
from fastgen.kernels._group_norm_plan import (
    Plan,
    both,
    channels_of_a_group,
    empty_output,
    group_size,
    load_input,
    make_plan,
    parameters,
    tile_of,
)
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import Operands, aligned

WARPS = 8  # 8 elements of a tile a thread: with 16 the sums take 145 registers on sm_80


@triton.jit
def load_maps(n, c, inside, channels, groups, mean, rstd, weight, bias, channel_bias, scale, shift, ACC: tl.constexpr):
    """Of channels ``c`` of sample n: x^ = (x + added - m) r and z = (x + added - m) a + b. Rounded in that order: in a group of
    one element x + added is m, to the bit."""
    row = n * channels + c
    group = n * groups + c // (channels // groups)
    r = tl.load(rstd + group, mask=inside, other=0.0)
    m = tl.load(mean + group, mask=inside, other=0.0)
    added = load_or(channel_bias, row, inside, 0.0, ACC)
    modulation = 1.0 + load_or(scale, row, inside, 0.0, ACC)
    a = r * load_or(weight, c, inside, 1.0, ACC) * modulation
    b = load_or(bias, c, inside, 0.0, ACC) * modulation + load_or(shift, row, inside, 0.0, ACC)
    return added, m, r, a, b


@triton.jit(do_not_specialize=["n_samples", "groups", "splits"])
def sums_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    dy,  # [N, C, P] of all channels, of any dtype
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
    seam,
    stride_c,
    stride_p,
    splits,
    pixels_per_split,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
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
    added, m, r, a, b = load_maps(
        n, c, c < channels, channels, groups, mean, rstd, weight, bias, channel_bias, scale, shift, ACC
    )  # fmt: skip
    sum_dz = tl.zeros([BLOCK_C], dtype=ACC)
    sum_dz_x = tl.zeros([BLOCK_C], dtype=ACC)
    sum_x = tl.zeros([BLOCK_C], dtype=ACC)
    for start in range(first, last, BLOCK_P):
        p, cc, mask = tile_of(block, channels, pixels, start, BLOCK_P, BLOCK_C)
        at = n * channels * pixels + p[:, None] * stride_p + cc[None, :] * stride_c
        value = load_input(
            x, skip, n, p[:, None], cc[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
        )  # fmt: skip
        centred = value + added[None, :] - m[None, :]
        dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        if SILU:
            dz = dz * silu_grad(centred * a[None, :] + b[None, :])
        dz = tl.where(mask, dz, 0.0)
        x_hat = tl.where(mask, centred * r[None, :], 0.0)
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_x += tl.sum(dz * x_hat, axis=0)
        sum_x += tl.sum(x_hat, axis=0)
    at = (n * splits + split) * channels + c
    size = tl.cast(n_samples, tl.int64) * splits * channels
    tl.store(parts + at, sum_dz, mask=c < channels)
    tl.store(parts + size + at, sum_dz_x, mask=c < channels)
    tl.store(parts + 2 * size + at, sum_x, mask=c < channels)


@triton.jit
def merge_splits(
    parts, n, c, inside, channels, splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    """The sum over the splits of one of the three parts, in a fixed order."""
    total = tl.zeros([BLOCK_D], dtype=ACC)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (split < splits)[:, None] & inside[None, :]
        at = (n * splits + split)[:, None] * channels + c[None, :]
        total += tl.sum(tl.load(parts + at, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def load_affine(n, c, inside, channels, weight, bias, scale, ACC: tl.constexpr):
    """Weight, bias and 1 + scale of channels ``c`` of sample n."""
    modulation = 1.0 + load_or(scale, n * channels + c, inside, 0.0, ACC)
    return load_or(weight, c, inside, 1.0, ACC), load_or(bias, c, inside, 0.0, ACC), modulation


@triton.jit
def store_channel_grads(
    n, c, inside, dz, dz_x, x_hat, mean_dz, mean_dz_x, r, channels, pixels, w, b, modulation,
    by_sample, d_channel_bias, d_scale, d_shift, n_samples, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters of channels ``c`` of sample n from their sums over space and the means of the group. The
    parameters come loaded: nothing could be read early once something is written."""
    row = n * channels + c
    by_bias = r * (w * modulation * dz - tl.cast(pixels, ACC) * mean_dz - x_hat * mean_dz_x)
    tl.store(by_sample + row, modulation * dz_x, mask=inside)
    tl.store(by_sample + tl.cast(n_samples, tl.int64) * channels + row, modulation * dz, mask=inside)
    tl.store(d_channel_bias + row, by_bias, mask=inside)
    tl.store(d_scale + row, w * dz_x + b * dz, mask=inside)
    tl.store(d_shift + row, dz, mask=inside)


@triton.jit(do_not_specialize=["n_samples", "groups", "splits"])
def combine_kernel(
    parts,  # [3, N, splits, C]
    rstd,  # [N, G]
    weight,  # [C] or None
    bias,  # [C] or None
    scale,  # [N, C] or None
    combine,  # [3, N, C]: by_dz, by_x, constant
    by_sample,  # [2, N, C]: gradients of weight and bias, a sample
    d_channel_bias,  # [N, C]
    d_scale,  # [N, C]
    d_shift,  # [N, C]
    n_samples,
    channels,
    pixels,
    groups,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    per_group = channels // groups
    size = tl.cast(n_samples, tl.int64) * channels
    part = size * splits
    total = group_size(per_group, pixels, ACC)
    r = tl.load(rstd + program)
    group_dz = tl.zeros([BLOCK_D], dtype=ACC)
    group_dz_x = tl.zeros([BLOCK_D], dtype=ACC)
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c, inside = g * per_group + d, d < per_group
        k = load_or(weight, c, inside, 1.0, ACC) * (1.0 + load_or(scale, n * channels + c, inside, 0.0, ACC))
        group_dz += k * merge_splits(parts, n, c, inside, channels, splits, BLOCK_S, BLOCK_D, ACC)
        group_dz_x += k * merge_splits(parts + part, n, c, inside, channels, splits, BLOCK_S, BLOCK_D, ACC)
    mean_dz = tl.sum(group_dz, axis=0) / total
    mean_dz_x = tl.sum(group_dz_x, axis=0) / total
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c, inside = g * per_group + d, d < per_group
        row = n * channels + c
        w, b, modulation = load_affine(n, c, inside, channels, weight, bias, scale, ACC)
        dz = merge_splits(parts, n, c, inside, channels, splits, BLOCK_S, BLOCK_D, ACC)
        dz_x = merge_splits(parts + part, n, c, inside, channels, splits, BLOCK_S, BLOCK_D, ACC)
        x_hat = merge_splits(parts + 2 * part, n, c, inside, channels, splits, BLOCK_S, BLOCK_D, ACC)
        tl.store(combine + row, r * (w * modulation), mask=inside)
        tl.store(combine + size + row, tl.zeros([BLOCK_D], dtype=ACC) - r * r * mean_dz_x, mask=inside)
        tl.store(combine + 2 * size + row, tl.zeros([BLOCK_D], dtype=ACC) - r * mean_dz, mask=inside)
        store_channel_grads(
            n, c, inside, dz, dz_x, x_hat, mean_dz, mean_dz_x, r, channels, pixels, w, b, modulation,
            by_sample, d_channel_bias, d_scale, d_shift, n_samples, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_samples", "groups"])
def dx_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    dy,  # [N, C, P] of all channels, of any dtype
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
    seam,
    stride_c,
    stride_p,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    program = tl.program_id(0).to(tl.int64)
    block, tile, n = program % blocks, program // blocks % pixel_blocks, program // blocks // pixel_blocks
    p, c, mask = tile_of(block, channels, pixels, tile * BLOCK_P, BLOCK_P, BLOCK_C)
    added, m, _r, a, b = load_maps(
        n, c, c < channels, channels, groups, mean, rstd, weight, bias, channel_bias, scale, shift, ACC
    )  # fmt: skip
    row_size = tl.cast(n_samples, tl.int64) * channels
    row = n * channels + c
    by_dz = tl.load(combine + row, mask=c < channels, other=0.0)
    by_x = tl.load(combine + row_size + row, mask=c < channels, other=0.0)
    constant = tl.load(combine + 2 * row_size + row, mask=c < channels, other=0.0)
    at = n * channels * pixels + p[:, None] * stride_p + c[None, :] * stride_c
    value = load_input(
        x, skip, n, p[:, None], c[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    centred = value + added[None, :] - m[None, :]
    dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    if SILU:
        dz = dz * silu_grad(centred * a[None, :] + b[None, :])
    value = by_dz[None, :] * dz + (by_x[None, :] * centred + constant[None, :])
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_samples", "groups"])
def whole_bwd_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    dy,  # [N, C, P] of all channels, of any dtype
    dx,  # the same
    mean,  # [N, G]
    rstd,  # [N, G]
    weight,  # [C] or None
    bias,  # [C] or None
    channel_bias,  # [N, C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    by_sample,  # [2, N, C]: gradients of weight and bias, a sample
    d_channel_bias,  # [N, C]
    d_scale,  # [N, C]
    d_shift,  # [N, C]
    n_samples,
    channels,
    pixels,
    groups,
    seam,
    stride_c,
    stride_p,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,  # divides the channels of a group
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    per_group = channels_of_a_group(channels, groups, UNIT)
    d = tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    c, inside = g * per_group + d, d < per_group
    mask = (p < pixels)[:, None] & inside[None, :]
    r = tl.load(rstd + program)
    added, m, _r, slope, offset = load_maps(
        n, c, inside, channels, groups, mean, rstd, weight, bias, channel_bias, scale, shift, ACC
    )
    w, b, modulation = load_affine(n, c, inside, channels, weight, bias, scale, ACC)
    k = w * modulation
    pixel = p[:, None].to(tl.int64)
    at = n * channels * pixels + pixel * stride_p + c[None, :] * stride_c
    value = load_input(
        x, skip, n, pixel, c[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    centred = value + added[None, :] - m[None, :]
    dz = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    if SILU:
        dz = dz * silu_grad(centred * slope[None, :] + offset[None, :])
    dz = tl.where(mask, dz, 0.0)
    x_hat = tl.where(mask, centred * r, 0.0)
    sum_dz = tl.sum(dz, axis=0)
    sum_dz_x = tl.sum(dz * x_hat, axis=0)
    total = group_size(per_group, pixels, ACC)
    mean_dz = tl.sum(k * sum_dz, axis=0) / total
    mean_dz_x = tl.sum(k * sum_dz_x, axis=0) / total
    value = r * (k[None, :] * dz - mean_dz - x_hat * mean_dz_x)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)
    store_channel_grads(
        n, c, inside, sum_dz, sum_dz_x, tl.sum(x_hat, axis=0), mean_dz, mean_dz_x, r, channels, pixels, w, b, modulation,
        by_sample, d_channel_bias, d_scale, d_shift, n_samples, ACC,
    )  # fmt: skip


def group_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    skip: Tensor | None,
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
    plan = make_plan("group_norm_bwd", input, skip, num_groups)
    operands, dx = Operands("group_norm_bwd", input), empty_output(input, plan)
    operands.code("activation", activation, ACTIVATIONS)
    inputs, dy = both(input, skip), operands.like("grad_output", grad_output, dx)
    mean, rstd = (operands.sized(name, t, plan.n, num_groups) for name, t in (("mean", mean), ("rstd", rstd)))
    params = parameters(operands, plan, weight, bias, channel_bias, scale, shift)
    empty = torch.empty if dx.numel() > 0 else torch.zeros  # no element contributes nothing
    by_sample = empty((2, plan.n, plan.channels), dtype=plan.opmath, device=dx.device)
    d_channel_bias, d_scale, d_shift = (
        empty((plan.n, plan.channels), dtype=plan.opmath, device=dx.device) for _ in range(3)
    )
    if dx.numel() > 0:
        run = run_whole if plan.fits_whole(an_element(plan)) else run_split
        grads = (by_sample, d_channel_bias, d_scale, d_shift)
        with on_device(dx):
            run(plan, inputs, dy, dx, mean, rstd, params, grads, activation)
    return dx, by_sample[0].sum(0), by_sample[1].sum(0), d_channel_bias, d_scale, d_shift


def an_element(plan: Plan) -> int:
    """Numbers an element that `whole_bwd_kernel` holds: dz and x^, and in fp64 what its division, a subroutine, has to keep."""
    return 3 if plan.wide else 2


def run_whole(
    plan: Plan,
    inputs: tuple[Tensor, Tensor | None],
    dy: Tensor,
    dx: Tensor,
    mean: Tensor,
    rstd: Tensor,
    params: list[Tensor | None],
    grads: tuple[Tensor, ...],
    activation: int,
) -> None:
    launch(
        whole_bwd_kernel, plan.n * plan.groups, *map(aligned, inputs), aligned(dy), dx, mean, rstd, *params, *grads, plan.n,
        plan.channels, plan.pixels, plan.groups, plan.seam, plan.stride_c, plan.stride_p, SILU=activation == 1, **plan.two,
        **plan.whole_launch(an_element(plan)), enable_fp_fusion=True,
    )  # fmt: skip


def run_split(
    plan: Plan,
    inputs: tuple[Tensor, Tensor | None],
    dy: Tensor,
    dx: Tensor,
    mean: Tensor,
    rstd: Tensor,
    params: list[Tensor | None],
    grads: tuple[Tensor, ...],
    activation: int,
) -> None:
    parts = torch.empty((3, plan.n, plan.splits, plan.channels), dtype=plan.opmath, device=dx.device)
    combine = torch.empty((3, plan.n, plan.channels), dtype=plan.opmath, device=dx.device)
    sizes = (plan.n, plan.channels, plan.pixels, plan.groups)
    strides = (plan.seam, plan.stride_c, plan.stride_p)
    options = {"ACC": plan.accumulate, "num_warps": WARPS, "enable_fp_fusion": True}
    launch(
        sums_kernel, plan.n * plan.splits * plan.channel_blocks, *inputs, dy, mean, rstd, *params, parts, *sizes,
        *strides, plan.splits, plan.pixels_per_split, SILU=activation == 1, **plan.two, **plan.tile, **options,
    )  # fmt: skip
    launch(
        combine_kernel, plan.n * plan.groups, parts, rstd, params[0], params[1], params[3], combine, *grads, *sizes,
        plan.splits, **plan.merge_tile, **options,
    )  # fmt: skip
    launch(
        dx_kernel, plan.n * plan.pixel_blocks * plan.channel_blocks, *inputs, dy, dx, mean, rstd, *params, combine,
        *sizes, *strides, SILU=activation == 1, **plan.two, **plan.tile, **options,
    )  # fmt: skip
