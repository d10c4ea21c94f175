"""Triton kernels of `group_norm`, forward; the backward is in `_group_norm_bwd`, tiles and splits in `_group_norm_plan`.

moments  a program reads the tiles of one split and keeps mean and centred squares of each channel
finish   a program merges the splits of one group and writes y = act(a (x + channel_bias - mean) + b) as a, b of channels
apply    a program maps one tile
whole    a group that fits one program is read once and written once, and the other three are not needed

Sums are taken of the distance to a first element: with a mean of 1e4 the digits of the deviations survive them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import ACTIVATIONS
from fastgen.kernels._elements import load_or, reciprocal_root, silu
from fastgen.kernels._group_norm_bwd import group_norm_bwd
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
from fastgen.kernels._operands import Operands, aligned, tensor_reasons

__all__ = ["group_norm", "group_norm_bwd", "group_norm_fwd", "group_norm_wide_fwd", "reasons"]


# What is not specialised, here and below, moves no load: without the lists Triton would compile again for 1 and for multiples
# of 16 of each. They are batch sizes and splits, which change from call to call.
@triton.jit(do_not_specialize=["splits"])
def moments_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    part_mean,  # [N, splits, C]
    part_m2,  # [N, splits, C]
    channels,
    pixels,
    seam,
    stride_c,
    stride_p,
    splits,
    pixels_per_split,
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
    pivot = load_input(  # of each channel, its first element
        x, skip, n, 0, c, c < channels, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    mean = tl.zeros([BLOCK_C], dtype=ACC)
    m2 = tl.zeros([BLOCK_C], dtype=ACC)
    seen = tl.zeros([1], dtype=ACC)
    for start in range(first, last, BLOCK_P):
        p, cc, mask = tile_of(block, channels, pixels, start, BLOCK_P, BLOCK_C)
        value = load_input(
            x, skip, n, p[:, None], cc[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
        )  # fmt: skip
        value = tl.where(mask, value - pivot[None, :], 0.0)
        count = tl.full([1], 0.0, ACC) + tl.minimum(last - start, BLOCK_P).to(ACC)
        tile_mean = tl.sum(value, axis=0) / count
        centred = tl.where(mask, value - tile_mean[None, :], 0.0)
        # Chan, Golub and LeVeque 1979: merge (seen, mean, m2) with (count, tile_mean, sum of squares)
        delta = tile_mean - mean
        share = count / (seen + count)
        mean += delta * share
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * seen * share
        seen += count
    at = (n * splits + split) * channels + c
    tl.store(part_mean + at, pivot + mean, mask=c < channels)
    tl.store(part_m2 + at, m2, mask=c < channels)


@triton.jit
def channel_maps(n, c, mask, channels, rstd, weight, bias, scale, shift, ACC: tl.constexpr):
    """a, b of channels ``c`` of sample n under the deviation of their group."""
    row = n * channels + c
    modulation = 1.0 + load_or(scale, row, mask, 0.0, ACC)
    a = rstd * load_or(weight, c, mask, 1.0, ACC) * modulation
    b = load_or(bias, c, mask, 0.0, ACC) * modulation + load_or(shift, row, mask, 0.0, ACC)
    return a, b


@triton.jit
def parts_of(c, inside, first, splits, channels, pixels, pixels_per_split, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """Of splits ``first`` on and channels ``c``: offsets into [splits, C], their mask, and the pixels of each split."""
    split = first + tl.arange(0, BLOCK_S).to(tl.int64)
    count = tl.minimum(pixels - split * pixels_per_split, pixels_per_split).to(ACC)
    return split[:, None] * channels + c[None, :], (split < splits)[:, None] & inside[None, :], count


@triton.jit(do_not_specialize=["n_samples", "groups", "splits"])
def finish_kernel(
    part_mean,  # [N, splits, C]
    part_m2,  # [N, splits, C]
    weight,  # [C] or None
    bias,  # [C] or None
    channel_bias,  # [N, C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    mean_out,  # [N, G]
    rstd_out,  # [N, G]
    maps,  # [2, N, C]: a, b
    n_samples,
    channels,
    pixels,
    groups,
    splits,
    pixels_per_split,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    per_group = channels // groups
    total = group_size(per_group, pixels, ACC)
    rows = n * splits * channels
    pivot = tl.load(part_mean + rows + g * per_group)
    weighted = tl.zeros([BLOCK_D], dtype=ACC)
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c = g * per_group + d
        distance = load_or(channel_bias, n * channels + c, d < per_group, 0.0, ACC) - pivot
        for first in range(0, splits, BLOCK_S):
            at, mask, count = parts_of(
                c, d < per_group, first, splits, channels, pixels, pixels_per_split, BLOCK_S, ACC
            )
            part = tl.load(part_mean + rows + at, mask=mask, other=0.0) + distance[None, :]
            weighted += tl.sum(tl.where(mask, part * count[:, None], 0.0), axis=0)
    mean = tl.sum(weighted, axis=0) / total  # from the pivot
    squares = tl.zeros([BLOCK_D], dtype=ACC)
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c = g * per_group + d
        distance = load_or(channel_bias, n * channels + c, d < per_group, 0.0, ACC) - pivot
        for first in range(0, splits, BLOCK_S):
            at, mask, count = parts_of(
                c, d < per_group, first, splits, channels, pixels, pixels_per_split, BLOCK_S, ACC
            )
            delta = tl.load(part_mean + rows + at, mask=mask, other=0.0) + distance[None, :] - mean
            part = tl.load(part_m2 + rows + at, mask=mask, other=0.0) + delta * delta * count[:, None]
            squares += tl.sum(tl.where(mask, part, 0.0), axis=0)
    rstd = reciprocal_root(tl.sum(squares, axis=0) / total + EPS)
    size = tl.cast(n_samples, tl.int64) * channels
    for start in range(0, per_group, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        c = g * per_group + d
        inside = d < per_group
        a, b = channel_maps(n, c, inside, channels, rstd, weight, bias, scale, shift, ACC)
        at = n * channels + c
        tl.store(maps + at, a, mask=inside)
        tl.store(maps + size + at, b, mask=inside)
    tl.store(mean_out + program, mean + pivot)
    tl.store(rstd_out + program, rstd)


@triton.jit(do_not_specialize=["n_samples", "groups"])
def apply_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    y,  # [N, C, P] of all channels, or in the type of the arithmetic
    mean,  # [N, G]
    channel_bias,  # [N, C] or None
    maps,  # [2, N, C]: a, b
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
    row = n * channels + c
    size = tl.cast(n_samples, tl.int64) * channels
    added = load_or(channel_bias, row, c < channels, 0.0, ACC)
    m = tl.load(mean + n * groups + c // (channels // groups), mask=c < channels, other=0.0)
    a = tl.load(maps + row, mask=c < channels, other=0.0)
    b = tl.load(maps + size + row, mask=c < channels, other=0.0)
    at = n * channels * pixels + p[:, None] * stride_p + c[None, :] * stride_c
    value = load_input(
        x, skip, n, p[:, None], c[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    z = (value + added[None, :] - m[None, :]) * a[None, :] + b[None, :]
    if SILU:
        z = silu(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups"])
def whole_kernel(
    x,  # [N, C, P] through strides
    skip,  # the same, or None: the channels from `seam` on
    y,  # [N, C, P] of all channels, or in the type of the arithmetic
    weight,  # [C] or None
    bias,  # [C] or None
    channel_bias,  # [N, C] or None
    scale,  # [N, C] or None
    shift,  # [N, C] or None
    mean_out,  # [N, G]
    rstd_out,  # [N, G]
    channels,
    pixels,
    groups,
    seam,
    stride_c,
    stride_p,
    EPS: tl.constexpr,
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
    c = g * per_group + d
    inside = d < per_group
    mask = (p < pixels)[:, None] & inside[None, :]
    at = n * channels * pixels + p[:, None].to(tl.int64) * stride_p + c[None, :] * stride_c
    added = load_or(channel_bias, n * channels + c, inside, 0.0, ACC)
    first = g * per_group
    pivot = load_input(
        x, skip, n, 0, first, first < channels, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    pixel = p[:, None].to(tl.int64)
    value = load_input(
        x, skip, n, pixel, c[None, :], mask, channels, pixels, seam, stride_c, stride_p, CHANNELS_LAST, ACC
    )  # fmt: skip
    value += added[None, :]
    value = tl.where(mask, value - pivot, 0.0)
    total = group_size(per_group, pixels, ACC)
    mean = tl.sum(value) / total
    centred = tl.where(mask, value - mean, 0.0)
    rstd = reciprocal_root(tl.sum(centred * centred) / total + EPS)
    a, b = channel_maps(n, c, inside, channels, rstd, weight, bias, scale, shift, ACC)
    tl.store(mean_out + program, mean + pivot)
    tl.store(rstd_out + program, rstd)
    z = centred * a[None, :] + b[None, :]
    if SILU:
        z = silu(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    return tensor_reasons(arg for arg in args if isinstance(arg, Tensor))


def group_norm_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward("group_norm_fwd", False, *args)


def group_norm_wide_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Stores what it computes: the output in the type of the arithmetic, without a pass of its own over input or output."""
    return _forward("group_norm_wide_fwd", True, *args)


def group_norm(*args: Any) -> Tensor:
    """The output alone; see :func:`group_norm_fwd`."""
    return group_norm_fwd(*args)[0]


def _forward(
    op: str,
    wide: bool,
    input: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = make_plan(op, input, skip, num_groups)
    operands = Operands(op, input)
    operands.code("activation", activation, ACTIVATIONS)
    params = parameters(operands, plan, weight, bias, channel_bias, scale, shift)
    inputs, y = both(input, skip), empty_output(input, plan, plan.opmath if wide else None)
    mean = torch.empty((plan.n, num_groups), dtype=plan.opmath, device=y.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:  # no element has no mean
        return y, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    run = run_whole if plan.fits_whole(1) else run_split
    with on_device(y):
        run(plan, inputs, y, params, mean, rstd, float(eps), activation)
    return y, mean, rstd


def run_whole(
    plan: Plan,
    inputs: tuple[Tensor, Tensor | None],
    y: Tensor,
    params: list[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    activation: int,
) -> None:
    launch(
        whole_kernel, plan.n * plan.groups, *map(aligned, inputs), y, *params, mean, rstd, plan.channels, plan.pixels,
        plan.groups, plan.seam, plan.stride_c, plan.stride_p, EPS=eps, SILU=activation == 1, **plan.two, **plan.whole_launch(1),
        enable_fp_fusion=True,
    )  # fmt: skip


def run_split(
    plan: Plan,
    inputs: tuple[Tensor, Tensor | None],
    y: Tensor,
    params: list[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    activation: int,
) -> None:
    part_mean = torch.empty((plan.n, plan.splits, plan.channels), dtype=plan.opmath, device=y.device)
    part_m2 = torch.empty_like(part_mean)
    maps = torch.empty((2, plan.n, plan.channels), dtype=plan.opmath, device=y.device)
    sizes = (plan.n, plan.channels, plan.pixels, plan.groups)
    strides = (plan.seam, plan.stride_c, plan.stride_p)
    options = {"ACC": plan.accumulate, "num_warps": 4, "enable_fp_fusion": True}
    launch(
        moments_kernel, plan.n * plan.splits * plan.channel_blocks, *inputs, part_mean, part_m2, plan.channels,
        plan.pixels, *strides, plan.splits, plan.pixels_per_split, **plan.two, **plan.tile, **options,
    )  # fmt: skip
    launch(
        finish_kernel, plan.n * plan.groups, part_mean, part_m2, *params, mean, rstd, maps, *sizes, plan.splits,
        plan.pixels_per_split, EPS=eps, **plan.merge_tile, **options,
    )  # fmt: skip
    launch(
        apply_kernel, plan.n * plan.pixel_blocks * plan.channel_blocks, *inputs, y, mean, params[2], maps, *sizes,
        *strides, SILU=activation == 1, **plan.two, **plan.tile, **options,
    )  # fmt: skip
