"""A Gaussian mixture in the plane and everything about it in closed form, for samplers that should reproduce it."""

import math

import torch
from torch import Tensor

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.6, -1.4]], dtype=torch.float64)
STDS = torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64)

MEAN = WEIGHTS @ MEANS
COVARIANCE = (
    torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - MEAN, MEANS - MEAN) + (WEIGHTS * STDS**2).sum() * torch.eye(2).double()
)


def components(x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mixture scaled by ``mean`` and blurred by ``std``, both [N]: differences [N, K, 2], variances and log joint [N, K]."""
    means, stds, weights = MEANS.to(x.dtype), STDS.to(x.dtype), WEIGHTS.to(x.dtype)
    mean, std = mean.to(x.dtype)[:, None], std.to(x.dtype)[:, None]
    variance = (mean * stds) ** 2 + std**2
    difference = x[:, None] - mean[..., None] * means
    joint = weights.log() - difference.square().sum(-1) / (2 * variance) - torch.log(2 * math.pi * variance)
    return difference, variance, joint


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return components(x, mean, std)[2].logsumexp(1)


def exact_score(sde):
    """The score of the mixture under ``sde``."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        difference, variance, joint = components(x, *sde.marginal(t))
        return -(joint.softmax(1)[..., None] * difference / variance[..., None]).sum(1)

    return score


def draw(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[k] + STDS[k, None] * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def assert_reproduced(x: Tensor, bias: float = 0.0, sigmas: float = 4.5) -> None:
    """Mean, covariance and weights of ``x`` within ``sigmas`` standard errors of the mixture's, plus ``bias`` of discretisation."""
    x, n = x.double(), len(x)
    error = (x.mean(0) - MEAN).abs()
    assert (error <= sigmas * (COVARIANCE.diagonal() / n).sqrt() + bias).all(), f"mean off by {error}"
    centred = x - MEAN
    products = centred[:, :, None] * centred[:, None]
    error = (products.mean(0) - COVARIANCE).abs()
    assert (error <= sigmas * products.std(0) / math.sqrt(n) + bias).all(), f"covariance off by {error}"
    nearest = torch.cdist(x, MEANS).argmin(1)  # the components are 5 deviations apart and more
    error = (torch.bincount(nearest, minlength=3) / n - WEIGHTS).abs()
    assert (error <= sigmas * (WEIGHTS * (1 - WEIGHTS) / n).sqrt() + bias).all(), f"weights off by {error}"
    within = (x - MEANS[nearest]).square().sum(1) / STDS[nearest].square()  # chi squared with two degrees of freedom
    error = (within.mean() - 2).abs()
    assert error <= sigmas * 2 / math.sqrt(n) + 10 * bias, f"spread within the components off by {error}"
