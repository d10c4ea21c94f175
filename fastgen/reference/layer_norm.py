"""What `layer_norm` means, in plain torch. Ba, Kiros and Hinton, "Layer Normalization", 2016, section 3; the modulation by scale
and shift, and the gate of what is added, are those of Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023."""

import torch
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import opmath_dtype


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
    """Returns (output, sum, mean, rstd), the statistics of each row in fp32 (fp64 for fp64), the sum empty without a residual.
    What is normalised is the sum as it is returned."""
    x, total = input.to(opmath_dtype(input.dtype)), input.new_empty(0)
    if residual is not None:
        if gate is not None:
            x = x * _per_sample(gate, x)
        total = (x + residual.to(x.dtype)).to(input.dtype, memory_format=torch.contiguous_format)
        x = total.to(x.dtype)
    mean = x.mean(-1)
    centred = x - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if scale is not None:
        y = y * (1 + _per_sample(scale, y))
    if shift is not None:
        y = y + _per_sample(shift, y)
    return _dense(y, input.dtype), total, _dense(mean), _dense(rstd)


def layer_norm(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(output, sum) alone."""
    return layer_norm_fwd(input, residual, gate, weight, bias, scale, shift, eps)[:2]


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
    """With s what was normalised, x^ = (s - mean) rstd, u = x^ w + b and k = w (1 + scale):
    ds = rstd (k dy - mean(k dy) - x^ mean(k dy x^)) + grad_sum, of s = gate branch + residual.
    Returns the gradients of (s, branch, gate, weight, bias, scale, shift), those of small tensors in fp32 (fp64 for fp64); of
    branch and gate empty without a gate, of scale and shift without either."""
    x = normalized.to(mean.dtype)
    dy = grad_output.to(x.dtype)
    x_hat = (x - mean[..., None]) * rstd[..., None]
    w = weight.to(x.dtype) if weight is not None else x.new_ones(())
    modulation = 1 + _per_sample(scale, x) if scale is not None else x.new_ones(())
    du = dy * modulation
    dx_hat = du * w
    ds = dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    ds = ds * rstd[..., None]
    if grad_sum is not None:
        ds = ds + grad_sum.to(x.dtype)
    d_branch = d_gate = d_scale = d_shift = mean.new_empty(0)
    if gate is not None and branch is not None:
        d_branch = _dense(ds * _per_sample(gate, x), normalized.dtype)
        d_gate = _over_tokens(ds * branch.to(x.dtype))
    else:
        d_branch = d_branch.to(normalized.dtype)
    if scale is not None or shift is not None:
        u = x_hat * w if bias is None else x_hat * w + bias.to(x.dtype)
        d_scale, d_shift = _over_tokens(dy * u), _over_tokens(dy)
    d_weight, d_bias = ((t.reshape(-1, t.shape[-1])).sum(0) for t in (du * x_hat, du))
    return _dense(ds, normalized.dtype), d_branch, d_gate, d_weight, d_bias, d_scale, d_shift


def _per_sample(p: Tensor, x: Tensor) -> Tensor:
    """[N, C] -> [N, 1, ..., C], which broadcasts over ``x`` [N, *, C], in the dtype of ``x``."""
    return p.to(x.dtype).reshape(p.shape[0], *[1] * (x.dim() - 2), p.shape[1])


def _over_tokens(t: Tensor) -> Tensor:
    """[N, *, C] -> [N, C], a sum."""
    return t.sum(list(range(1, t.dim() - 1))) if t.dim() > 2 else t.clone()


def _dense(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return t.to(dtype or t.dtype).contiguous()


def layer_norm_fwd_check(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> None:
    check_main("layer_norm", "input", input, dims=2)
    sample, channels = (input.shape[0], input.shape[-1]), input.shape[-1:]
    check_floats("layer_norm", input, tuple(input.shape), residual=residual)
    one_dtype = residual is None or residual.dtype == input.dtype
    require("layer_norm", one_dtype, "residual must have the dtype of input")
    require("layer_norm", gate is None or residual is not None, "gate needs a residual")
    check_floats("layer_norm", input, tuple(channels), weight=weight, bias=bias)
    check_floats("layer_norm", input, sample, gate=gate, scale=scale, shift=shift)


layer_norm_check = layer_norm_fwd_check


def layer_norm_bwd_check(
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
) -> None:
    check_main("layer_norm", "normalized", normalized, dims=2)
    shape = tuple(normalized.shape)
    check_floats("layer_norm", normalized, shape, grad_output=grad_output, grad_sum=grad_sum, branch=branch)
    check_floats("layer_norm", normalized, shape[:-1], mean=mean, rstd=rstd)
    require("layer_norm", (gate is None) == (branch is None), "gate and branch come together")
    check_floats("layer_norm", normalized, shape[-1:], weight=weight, bias=bias)
    check_floats("layer_norm", normalized, (shape[0], shape[-1]), gate=gate, scale=scale, shift=shift)
    for name, t, dtype in (
        *((name, t, normalized.dtype) for name, t in (("grad_output", grad_output), ("branch", branch))),
        *((name, t, opmath_dtype(normalized.dtype)) for name, t in (("mean", mean), ("rstd", rstd))),
        ("grad_sum", grad_sum, normalized.dtype),
    ):
        require("layer_norm", t is None or t.dtype == dtype, f"{name} must have dtype {dtype}")


def layer_norm_fwd_fake(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = input.new_empty(input.shape[:-1], dtype=opmath_dtype(input.dtype))
    output, total = layer_norm_fake(input, residual, gate, weight, bias, scale, shift, eps)
    return output, total, mean, torch.empty_like(mean)


def layer_norm_fake(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(0 if residual is None else input.shape)


def layer_norm_bwd_fake(
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
    n, c = normalized.shape[0], normalized.shape[-1]
    modulated = scale is not None or shift is not None
    d_weight, d_bias = (mean.new_empty(c) for _ in range(2))
    d_scale, d_shift = (mean.new_empty((n, c) if modulated else 0) for _ in range(2))
    d_gate = mean.new_empty((n, c) if gate is not None else 0)
    d_branch = normalized.new_empty(normalized.shape if gate is not None else 0)
    return normalized.new_empty(normalized.shape), d_branch, d_gate, d_weight, d_bias, d_scale, d_shift
