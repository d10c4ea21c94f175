"""What `diffusion_loss` means, in plain torch: the squared error of Ho et al. 2020, equation 14, and the hybrid loss of Nichol and
Dhariwal 2021, equations 15 and 16, with the discretised likelihood of Ho et al., equation 13, at t = 0.

All of it follows from the residual r = model - target. The x0 that a model's output stands for is off by a multiple of r
that depends on the timestep alone, and the mean of the model's Gaussian is off by the posterior's coefficient of x0 times that.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._schema import PREDICTION_TYPES, VLB_COLUMNS
from ._check import check_floats, check_main, check_noising, check_prediction
from ._layout import copy_like, empty_like_layout, opmath_dtype
from ._timesteps import at_timesteps, check_range, per_sample, target_of

BIN = 1 / 255  # half the width of a bin of an image of 256 levels in [-1, 1]
LEAST_PROBABILITY = 1e-12


def x0_error(prediction: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x0 that a model's output stands for, less the true one, as a multiple of the residual."""
    return {
        "epsilon": -sigma / alpha,
        "sample": torch.ones_like(alpha),
        "v_prediction": -sigma / (alpha * alpha + sigma * sigma),
        "flow_prediction": -sigma / (alpha + sigma),
    }[PREDICTION_TYPES[prediction]]


def divergence(
    r: Tensor, v: Tensor, mean: Tensor, inverse_deviation: Tensor, half_range: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergence KL(q || p) of the two Gaussians, in nats, and its derivative by ``v``.

    With u = half_range (v + 1), the log of the ratio of variances, and d the squared difference of the means over the
    variance of q: (u - 1 + exp(-u) (1 + d)) / 2.
    """
    u = half_range * (v + 1)
    d = (mean * inverse_deviation * r) ** 2
    e = torch.expm1(-u)
    return (u + e + (e + 1) * d) / 2, -half_range * (e + (e + 1) * d) / 2


def likelihood(
    x0: Tensor, r: Tensor, v: Tensor, mean: Tensor, inverse_deviation: Tensor, half_range: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p(x0) in the bin of ``x0`` under the model's Gaussian, in nats, and its derivative by ``v``.

    The normal cdf is (1 + tanh(sqrt(2 / pi) (p + 0.044715 p^3))) / 2, a logistic function of twice that argument.
    """
    inverse = inverse_deviation * torch.exp(-half_range * (v + 1) / 2)
    upper, lower = (inverse * (-mean * r + side) for side in (BIN, -BIN))
    scale = 2 * math.sqrt(2 / math.pi)
    a, b = (scale * (p + 0.044715 * p**3) for p in (upper, lower))
    a_slope, b_slope = (scale * (1 + 3 * 0.044715 * p**2) * p * (-half_range / 2) for p in (upper, lower))
    inside = -torch.sigmoid(a) * torch.sigmoid(-b) * torch.expm1(b - a)  # sigmoid(a) - sigmoid(b), not cancelled
    inside_slope = torch.sigmoid(a) * torch.sigmoid(-a) * a_slope - torch.sigmoid(b) * torch.sigmoid(-b) * b_slope
    low, high = x0 < -0.999, x0 > 0.999
    probability = torch.where(low, torch.sigmoid(a), torch.where(high, torch.sigmoid(-b), inside))
    outside_slope = torch.where(low, torch.sigmoid(-a) * a_slope, -torch.sigmoid(b) * b_slope)
    slope = torch.where(low | high, outside_slope, inside_slope / inside)
    slope = torch.where(probability < LEAST_PROBABILITY, torch.zeros_like(slope), slope)
    return -torch.log(probability.clamp_min(LEAST_PROBABILITY)), -slope


def _parts(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(residual, weight, bound in nats, derivative of the bound by v): an element each, but for the weight."""
    dtype = opmath_dtype(model_output.dtype)
    ones = torch.ones_like(alphas) if weights is None else weights
    check_range("diffusion_loss", t, alphas.shape[0])
    tables = at_timesteps(t, dtype, alphas, sigmas, ones)
    alpha, sigma, weight = (per_sample(c, x0) for c in tables)
    model, clean = model_output.to(dtype), x0.to(dtype)
    v = None
    if vlb_table is not None:
        model, v = model.chunk(2, dim=1)
    r = model - target_of(prediction, clean, noise.to(dtype), alpha, sigma)
    if vlb_table is None or v is None:
        return r, weight, None, None
    (rows,) = at_timesteps(t, dtype, vlb_table)
    mean, inverse_deviation, value_range = (per_sample(c, x0) for c in rows[:, : len(VLB_COLUMNS)].unbind(1))
    gaussian = (mean * x0_error(prediction, alpha, sigma), inverse_deviation, value_range / 2)
    decodes = per_sample(t == 0, x0)
    pairs = zip(likelihood(clean, r, v, *gaussian), divergence(r, v, *gaussian), strict=True)
    bound, by_v = (torch.where(decodes, decoded, diverged) for decoded, diverged in pairs)
    return r, weight, bound, by_v


def diffusion_loss_fwd(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> Tensor:
    """weight * mean(r^2) + vlb_weight * mean(bound) / ln 2 of every sample [N], in fp32, or fp64 for fp64 model output."""
    r, weight, bound, _ = _parts(model_output, x0, noise, t, alphas, sigmas, weights, vlb_table, prediction)
    terms = weight * r.square()
    if bound is not None:
        terms = terms + vlb_weight / math.log(2) * bound
    return terms.reshape(x0.shape[0], math.prod(x0.shape[1:])).mean(1)


def diffusion_loss_bwd(
    grad: Tensor,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> Tensor:
    """In the bound the mean does not count as a function of the model's output: only v learns from it."""
    r, weight, _, by_v = _parts(model_output, x0, noise, t, alphas, sigmas, weights, vlb_table, prediction)
    factor = per_sample(grad.to(r.dtype) / max(math.prod(x0.shape[1:]), 1), x0)
    gradient = 2 * factor * weight * r
    if by_v is not None:
        gradient = torch.cat([gradient, vlb_weight / math.log(2) * factor * by_v], dim=1)
    return copy_like(gradient, model_output)


def diffusion_loss_fwd_check(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> None:
    op = "diffusion_loss"
    check_main(op, "model_output", model_output)
    check_main(op, "x0", x0, dims=1 if vlb_table is None else 2)
    doubled = tuple(x0.shape) if vlb_table is None else (x0.shape[0], 2 * x0.shape[1], *x0.shape[2:])
    check_floats(op, x0, doubled, model_output=model_output)
    check_floats(op, x0, tuple(x0.shape), noise=noise)
    check_noising(op, x0, t, alphas, sigmas=sigmas, weights=weights)
    check_floats(op, x0, (alphas.shape[0], len(VLB_COLUMNS)), vlb_table=vlb_table)
    check_prediction(op, "prediction", prediction)


def diffusion_loss_bwd_check(grad: Tensor, model_output: Tensor, x0: Tensor, *rest: Any) -> None:
    diffusion_loss_fwd_check(model_output, x0, *rest)
    check_floats("diffusion_loss", x0, (x0.shape[0],), grad=grad)


def diffusion_loss_fwd_fake(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> Tensor:
    return model_output.new_empty(x0.shape[0], dtype=opmath_dtype(model_output.dtype))


def diffusion_loss_bwd_fake(
    grad: Tensor,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    weights: Tensor | None,
    vlb_table: Tensor | None,
    prediction: int,
    vlb_weight: float,
) -> Tensor:
    return empty_like_layout(model_output)
