"""What `group_norm` means, in plain torch. Wu and He, "Group Normalization", 2018, section 3; the modulation by scale and
shift is that of Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021, section 4 (adaptive group normalization)."""

import math
from typing import Any

import torch
from torch import Tensor

from .._schema import ACTIVATIONS
from ._check import check_activation, check_floats, check_main, check_skip, require
from ._layout import copy_like, empty_with_channels, opmath_dtype, together


def _per_channel(p: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] -> a shape that broadcasts over ``x`` [N, C, *spatial], in the dtype of ``x``."""
    p = p if p.dim() == 2 else p[None]
    return p.to(x.dtype).reshape(*p.shape, *[1] * (x.dim() - 2))


def group_norm_wide_fwd(
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
    """Returns (output, mean [N, G], rstd [N, G]), all of them and the arithmetic in fp32, or fp64 for fp64 input. Of two inputs
    the channels of ``skip`` come after those of ``input``, whose layout the output has."""
    x = together(input, skip).to(opmath_dtype(input.dtype))
    if channel_bias is not None:
        x = x + _per_channel(channel_bias, x)
    grouped = x.reshape(x.shape[0], num_groups, _group_size(x, num_groups))
    mean = grouped.mean(-1)
    centred = grouped - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = (centred * rstd[..., None]).reshape(x.shape)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    if scale is not None:
        y = y * (1 + _per_channel(scale, x))
    if shift is not None:
        y = y + _per_channel(shift, x)
    if ACTIVATIONS[activation] == "silu":
        y = y * torch.sigmoid(y)
    return copy_like(y, input, y.dtype), mean, rstd


def group_norm_fwd(
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
    """The same, the output in the dtype of the input."""
    y, mean, rstd = group_norm_wide_fwd(
        input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, activation
    )
    return y.to(input.dtype), mean, rstd


def group_norm(
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
) -> Tensor:
    """The output alone."""
    return group_norm_fwd(input, skip, num_groups, weight, bias, channel_bias, scale, shift, eps, activation)[0]


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
    """With x^ the normalised input, u = x^ * w + b and z = u * (1 + scale) + shift:
    dz = dy * act'(z), du = dz * (1 + scale), dx^ = du * w and dx = rstd * (dx^ - mean(dx^) - x^ * mean(dx^ * x^)).
    The parameters' gradients come back in fp32 (fp64 for fp64 input) whether or not the parameter was given."""
    x = together(input, skip).to(opmath_dtype(input.dtype))
    n = x.shape[0]
    spatial = list(range(2, x.dim()))
    group_size = _group_size(x, num_groups)
    if channel_bias is not None:
        x = x + _per_channel(channel_bias, x)
    x_hat = (x.reshape(n, num_groups, group_size) - mean[..., None]) * rstd[..., None]
    x_hat = x_hat.reshape(x.shape)
    w = _per_channel(weight, x) if weight is not None else x.new_ones(())
    modulation = 1 + _per_channel(scale, x) if scale is not None else x.new_ones(())
    u = x_hat * w
    if bias is not None:
        u = u + _per_channel(bias, x)
    dz = grad_output.to(x.dtype)
    if ACTIVATIONS[activation] == "silu":
        z = u * modulation
        if shift is not None:
            z = z + _per_channel(shift, x)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    du = dz * modulation
    dx_hat = (du * w).reshape(n, num_groups, group_size)
    grouped_hat = x_hat.reshape(dx_hat.shape)
    dx = dx_hat - dx_hat.mean(-1, keepdim=True) - grouped_hat * (dx_hat * grouped_hat).mean(-1, keepdim=True)
    dx = (dx * rstd[..., None]).reshape(x.shape)

    def over_space(t: Tensor) -> Tensor:  # [N, C, *spatial] -> [N, C]
        return t.sum(spatial) if spatial else t.clone()

    return (
        copy_like(dx, input),
        over_space(du * x_hat).sum(0),
        over_space(du).sum(0),
        over_space(dx),
        over_space(dz * u),
        over_space(dz),
    )


def _group_size(x: Tensor, num_groups: int) -> int:
    return x.shape[1] // num_groups * math.prod(x.shape[2:])


def group_norm_check(
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
) -> None:
    check_main("group_norm", "input", input, dims=2)
    n, c = input.shape[0], check_skip("group_norm", input, skip)
    require(
        "group_norm", num_groups >= 1 and c % num_groups == 0, f"num_groups must divide channels: {num_groups}, {c}"
    )
    check_floats("group_norm", input, (c,), weight=weight, bias=bias)
    check_floats("group_norm", input, (n, c), channel_bias=channel_bias, scale=scale, shift=shift)
    check_activation("group_norm", activation)


group_norm_fwd_check = group_norm_wide_fwd_check = group_norm_check


def group_norm_bwd_check(
    grad_output: Tensor, input: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, *rest: Any
) -> None:
    *params, activation = rest
    forward: Any = (*params, 0.0, activation)
    group_norm_check(input, skip, num_groups, *forward)
    c = input.shape[1] + (0 if skip is None else skip.shape[1])
    check_floats("group_norm", input, (input.shape[0], c, *input.shape[2:]), grad_output=grad_output)
    check_floats("group_norm", input, (input.shape[0], num_groups), mean=mean, rstd=rstd)


def _empty_output(input: Tensor, skip: Tensor | None) -> Tensor:
    return empty_with_channels(input, input.shape[1] + (0 if skip is None else skip.shape[1]))


def group_norm_fake(
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
) -> Tensor:
    return _empty_output(input, skip)


def group_norm_fwd_fake(
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
    statistics = input.new_empty((input.shape[0], num_groups), dtype=opmath_dtype(input.dtype))
    return _empty_output(input, skip), statistics, torch.empty_like(statistics)


def group_norm_wide_fwd_fake(
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
    statistics = input.new_empty((input.shape[0], num_groups), dtype=opmath_dtype(input.dtype))
    return _empty_output(input, skip).to(statistics.dtype), statistics, torch.empty_like(statistics)


def group_norm_bwd_fake(
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
    n, c = grad_output.shape[:2]
    per_channel = [mean.new_empty(c) for _ in range(2)]
    per_sample = [mean.new_empty((n, c)) for _ in range(3)]
    return _empty_output(input, skip), per_channel[0], per_channel[1], per_sample[0], per_sample[1], per_sample[2]
