"""Arguments of `diffusion_loss` for its tests, and the same losses as their papers and guided-diffusion write them."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, squared_cosine_betas, vlb_table

from .numerics import place, randn

STEPS = 20
BETAS = {"linear": linear_betas(STEPS, 1e-3, 0.3), "cosine": squared_cosine_betas(STEPS)}


def tables(dtype: torch.dtype = torch.float64, betas: str = "linear") -> dict[str, Tensor]:
    """Alphas and sigmas [T] of a variance-preserving process, weights [T] and the table of the bound [T, 3]."""
    bar = alphas_cumprod(BETAS[betas])
    alphas, sigmas = noising_tables(bar)
    weights = 0.3 + randn(STEPS, seed=80).sigmoid()
    named = {"alphas": alphas, "sigmas": sigmas, "weights": weights, "vlb_table": vlb_table(bar)}
    return {name: table.to(dtype) for name, table in named.items()}


def timesteps(n: int) -> Tensor:
    """The second sample stands at t = 0, where the bound is a likelihood."""
    return torch.tensor([(7 * k + 13) % STEPS for k in range(n)], dtype=torch.int64)


def make(
    shape, dtypes, layouts, hybrid: bool = False, prediction_type: str = "epsilon"
) -> tuple[Tensor, Tensor, Tensor]:
    """(model_output, x0, noise): images in [-1, 1], some of them at the ends, and a model that errs a little."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    x0, noise = (1.3 * randn(*shape, seed=2)).clamp(-1, 1), randn(*shape, seed=3)
    target = target_of(x0, noise, timesteps(shape[0]), prediction_type, **noising(tables()))
    model = target + (0.02 if prediction_type == "sample" else 0.1) * randn(*shape, seed=4)
    if hybrid:
        model = torch.cat([model, randn(*shape, seed=5).tanh()], 1)
    model, x0, noise = (place(v.to(next(dtype)), next(layout)) for v in (model, x0, noise))
    return model, x0, noise


def noising(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: named[name] for name in ("alphas", "sigmas")}


def target_of(x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, alphas: Tensor, sigmas: Tensor) -> Tensor:
    alpha, sigma = broadcast(alphas, t, x0), broadcast(sigmas, t, x0)
    return {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "flow_prediction": lambda: noise - x0,
    }[prediction_type]()


def broadcast(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def mean_flat(v: Tensor) -> Tensor:
    return v.reshape(v.shape[0], -1).mean(1)


def plain_simple(
    model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, alphas, sigmas, weights=None
) -> Tensor:
    """As a user writes it: [N], in the dtype of ``model_output``."""
    x0, noise = x0.to(model_output.dtype), noise.to(model_output.dtype)
    target = target_of(x0, noise, t, prediction_type, alphas, sigmas)
    losses = mean_flat((model_output - target) ** 2)
    return losses if weights is None else losses * weights[t].to(losses.dtype)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    centered, inv_stdv = x - means, torch.exp(-log_scales)
    cdf_plus = standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_min = standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    return torch.where(
        x < -0.999,
        cdf_plus.clamp(min=1e-12).log(),
        torch.where(x > 0.999, (1.0 - cdf_min).clamp(min=1e-12).log(), (cdf_plus - cdf_min).clamp(min=1e-12).log()),
    )


def plain_bound(
    model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, betas: Tensor
) -> Tensor:
    """guided-diffusion's `_vb_terms_bpd` of `learned_range` [N], bits per dimension, its mean detached; from betas, float64."""
    dtype = model_output.dtype
    x0, noise = x0.to(dtype), noise.to(dtype)
    bar = torch.cumprod(1.0 - betas, 0)
    bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1.0 - bar_prev) / (1.0 - bar)
    log_variance_clipped = torch.cat([variance[1:2], variance[1:]]).log()
    coef1, coef2 = betas * bar_prev.sqrt() / (1.0 - bar), (1.0 - bar_prev) * (1.0 - betas).sqrt() / (1.0 - bar)

    def at(table: Tensor) -> Tensor:
        return broadcast(table, t, x0)

    x_t = at(bar.sqrt()) * x0 + at((1 - bar).sqrt()) * noise
    prediction, v = model_output.chunk(2, 1)
    prediction = prediction.detach()
    alpha, sigma = at(bar.sqrt()), at((1 - bar).sqrt())
    predicted_x0 = {
        "epsilon": lambda: at((1.0 / bar).sqrt()) * x_t - at((1.0 / bar - 1).sqrt()) * prediction,
        "sample": lambda: prediction,
        "v_prediction": lambda: alpha * x_t - sigma * prediction,
        "flow_prediction": lambda: (x_t - sigma * prediction) / (alpha + sigma),
    }[prediction_type]()
    min_log, max_log = at(log_variance_clipped), at(betas.log())
    fraction = (v + 1) / 2
    log_variance = fraction * max_log + (1 - fraction) * min_log
    mean = at(coef1) * predicted_x0 + at(coef2) * x_t
    true_mean = at(coef1) * x0 + at(coef2) * x_t
    kl = mean_flat(normal_kl(true_mean, min_log, mean, log_variance)) / math.log(2.0)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(t == 0, mean_flat(nll) / math.log(2.0), kl)


def plain_hybrid(
    model_output, x0, noise, t, prediction_type, betas, vlb_weight, alphas, sigmas, weights=None
) -> Tensor:
    simple = plain_simple(model_output.chunk(2, 1)[0], x0, noise, t, prediction_type, alphas, sigmas, weights)
    return simple + vlb_weight * plain_bound(model_output, x0, noise, t, prediction_type, betas)


def example(dtype: torch.dtype) -> dict[str, Any]:
    model, x0, noise = make((3, 4, 5, 7), [dtype], ["contiguous"])
    named = {"model_output": model, "x0": x0, "noise": noise, "t": timesteps(3), **noising(tables())}
    return {**named, "prediction_type": "v_prediction"}
