"""What `rms_norm` means, in plain torch. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4; with
``min_norm`` that of denoising-diffusion-pytorch, ``F.normalize(x, dim=1) * g * sqrt(C)``."""

import math

import torch
from torch import Tensor

from .._schema import ACTIVATIONS
from ._check import check_activation, check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, opmath_dtype


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
    """Returns (output, rstd), the latter of ``input`` less the dimension of the norm, in fp32 (fp64 for fp64)."""
    x, dim = input.to(opmath_dtype(input.dtype)), axis(over_channels)
    rstd = (1 / torch.sqrt(x.square().mean(dim) + eps)).clamp_max(_largest_rstd(x.shape[dim], min_norm))
    z = x * rstd.unsqueeze(dim)
    if weight is not None:
        z = z * _spread(weight, x, dim)
    if scale is not None:
        z = z * (1 + _spread(scale, x, dim))
    if shift is not None:
        z = z + _spread(shift, x, dim)
    if ACTIVATIONS[activation] == "silu":
        z = z * torch.sigmoid(z)
    return _like(z, input, over_channels), rstd.contiguous()


def rms_norm(
    input: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    min_norm: float,
    activation: int,
) -> Tensor:
    """The output alone."""
    return rms_norm_fwd(input, over_channels, weight, scale, shift, eps, min_norm, activation)[0]


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
    """With x^ = x rstd, k = w (1 + scale), z = x^ k + shift and dz = dy act'(z): dx = rstd (k dz - x^ mean(k dz x^)), without
    the second term where the norm was below ``min_norm``.
    Returns the gradients of (input, weight, scale, shift), those of small tensors in fp32 (fp64 for fp64), the last two empty where
    neither was given."""
    x, dim = input.to(rstd.dtype), axis(over_channels)
    r = rstd.unsqueeze(dim)
    x_hat = x * r
    w = _spread(weight, x, dim) if weight is not None else x.new_ones(())
    modulation = 1 + _spread(scale, x, dim) if scale is not None else x.new_ones(())
    k = w * modulation
    dz = grad_output.to(x.dtype)
    if ACTIVATIONS[activation] == "silu":
        z = x_hat * k if shift is None else x_hat * k + _spread(shift, x, dim)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    through_norm = x_hat * (k * dz * x_hat).mean(dim, keepdim=True)
    dx = r * (k * dz - torch.where(r < _largest_rstd(x.shape[dim], min_norm), through_norm, 0))
    others = [d for d in range(1, x.dim()) if d != dim % x.dim()]

    def over_pixels(t: Tensor) -> Tensor:  # [N, C]
        return t.sum(others) if others else t.clone()

    d_scale = d_shift = rstd.new_empty(0)
    if scale is not None or shift is not None:
        d_scale, d_shift = over_pixels(dz * x_hat * w), over_pixels(dz)
    d_weight = over_pixels(dz * x_hat * modulation).sum(0)
    return _like(dx, input, over_channels), d_weight, d_scale, d_shift


def axis(over_channels: bool) -> int:
    """The dimension of the norm."""
    return 1 if over_channels else -1


def _largest_rstd(size: int, min_norm: float) -> float:
    return math.sqrt(size) / min_norm if min_norm > 0 else math.inf


def _spread(p: Tensor, x: Tensor, dim: int) -> Tensor:
    """[C] or [N, C] -> a shape that broadcasts over ``x`` with C at ``dim``, in the dtype of ``x``."""
    p = (p if p.dim() == 2 else p[None]).to(x.dtype)
    others = [1] * (x.dim() - 2)
    return p.reshape(p.shape[0], *others, p.shape[1]) if dim == -1 else p.reshape(*p.shape, *others)


def _like(value: Tensor, input: Tensor, over_channels: bool) -> Tensor:
    """``value`` in the dtype of ``input``; over channels in its layout, else contiguous."""
    return copy_like(value, input) if over_channels else value.to(input.dtype).contiguous()


def rms_norm_fwd_check(
    input: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    min_norm: float,
    activation: int,
) -> None:
    check_main("rms_norm", "input", input, dims=2)
    n, c = input.shape[0], input.shape[axis(over_channels)]
    check_floats("rms_norm", input, (c,), weight=weight)
    check_floats("rms_norm", input, (n, c), scale=scale, shift=shift)
    require("rms_norm", min_norm >= 0, f"min_norm must not be negative, got {min_norm}")
    check_activation("rms_norm", activation)


rms_norm_check = rms_norm_fwd_check


def rms_norm_bwd_check(
    grad_output: Tensor,
    input: Tensor,
    rstd: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    min_norm: float,
    activation: int,
) -> None:
    rms_norm_fwd_check(input, over_channels, weight, scale, shift, 0.0, min_norm, activation)
    check_floats("rms_norm", input, tuple(input.shape), grad_output=grad_output)
    check_floats("rms_norm", input, _rstd_shape(input, over_channels), rstd=rstd)
    dtypes = grad_output.dtype == input.dtype and rstd.dtype == opmath_dtype(input.dtype)
    require("rms_norm", dtypes, "grad_output must have the dtype of input, rstd that of its statistics")


def _rstd_shape(input: Tensor, over_channels: bool) -> tuple[int, ...]:
    """That of ``input`` less the dimension of the norm."""
    shape = tuple(input.shape)
    return (shape[0], *shape[2:]) if over_channels else shape[:-1]


def _empty_output(input: Tensor, over_channels: bool) -> Tensor:
    return empty_like_layout(input) if over_channels else input.new_empty(input.shape)


def rms_norm_fake(
    input: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    min_norm: float,
    activation: int,
) -> Tensor:
    return _empty_output(input, over_channels)


def rms_norm_fwd_fake(
    input: Tensor,
    over_channels: bool,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    min_norm: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    rstd = input.new_empty(_rstd_shape(input, over_channels), dtype=opmath_dtype(input.dtype))
    return _empty_output(input, over_channels), rstd


def rms_norm_bwd_fake(
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
    n, c = input.shape[0], input.shape[axis(over_channels)]
    modulated = scale is not None or shift is not None
    d_scale, d_shift = (rstd.new_empty((n, c) if modulated else 0) for _ in range(2))
    return _empty_output(input, over_channels), rstd.new_empty(c), d_scale, d_shift
