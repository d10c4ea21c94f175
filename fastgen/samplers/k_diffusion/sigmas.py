"""k-diffusion's noise levels and the small functions on them, by their own names."""

import torch
from torch import Tensor

from ..schedules import spaced_sigmas
from ..solvers.stochastic import ancestral_split


def append_zero(x: Tensor) -> Tensor:
    """x [n] with a 0 after it."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], Karras et al. 2022, equation 5, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "karras", rho), device=device))


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """[n + 1], evenly in log sigma, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "exponential"), device=device))


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], a power of the even steps in log sigma, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "polyexponential", rho), device=device))


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], the continuous VP schedule, and a 0."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def get_ancestral_step(sigma_from: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up)."""
    return ancestral_split(float(sigma_from), float(sigma_to), eta)


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative dx / dsigma, [N, *]; sigma [N] or a scalar."""
    return (x - denoised) / torch.as_tensor(sigma, device=x.device).reshape(-1, *([1] * (x.dim() - 1)))
