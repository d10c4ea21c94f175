"""A mixture of Gaussians in the plane in closed form: denoiser, score, draws, and whether samples are its."""

import functools
import math

import torch
from torch import Tensor

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.6, -1.4]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64)

MEAN = WEIGHTS @ MEANS
COVARIANCE = (
    torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - MEAN, MEANS - MEAN)
    + (WEIGHTS * DEVIATIONS**2).sum() * torch.eye(2).double()
)


def components(
    x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor = MEANS, deviations: Tensor = DEVIATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled by ``alpha`` and blurred by ``sigma``, both [N]: differences [N, K, 2], variances and log joint [N, K]."""
    means, deviations, weights = means.to(x.dtype), deviations.to(x.dtype), WEIGHTS.to(x.dtype)
    alpha, sigma = alpha.to(x.dtype)[:, None], sigma.to(x.dtype)[:, None]
    variance = (alpha * deviations) ** 2 + sigma**2
    difference = x[:, None] - alpha[..., None] * means
    joint = weights.log() - difference.square().sum(-1) / (2 * variance) - torch.log(2 * math.pi * variance)
    return difference, variance, joint


def clean(x: Tensor, alpha: float, sigma: float, means: Tensor = MEANS, deviations: Tensor = DEVIATIONS) -> Tensor:
    """E[x0 | x] of the mixture at x = alpha x0 + sigma eps, [N, 2] float64: by Tweedie's formula (x + sigma^2 score) / alpha,
    written so that it is exact at sigma = 0."""
    x = x.double()
    at = x.new_full((len(x),), alpha), x.new_full((len(x),), sigma)
    difference, variance, joint = components(x, *at, means, deviations)
    component = means + (alpha * deviations**2 / variance)[..., None] * difference
    return (joint.softmax(1)[..., None] * component).sum(1)


def exact_score(sde):
    """The score of the mixture under ``sde``."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        difference, variance, joint = components(x, *sde.marginal(t))
        return -(joint.softmax(1)[..., None] * difference / variance[..., None]).sum(1)

    return score


@functools.cache
def draw(n: int, seed: int = 0) -> Tensor:
    """[n, 2] float64."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[k] + DEVIATIONS[k, None] * torch.randn(n, 2, generator=generator, dtype=torch.float64)


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
    within = (x - MEANS[nearest]).square().sum(1) / DEVIATIONS[nearest].square()  # chi squared, two degrees of freedom
    error = (within.mean() - 2).abs()
    assert error <= sigmas * 2 / math.sqrt(n) + 10 * bias, f"spread within the components off by {error}"
