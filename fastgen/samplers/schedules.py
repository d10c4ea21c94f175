"""Noise schedules and timestep spacings, in float64 on the host; nothing here touches a sample.

`beta_t` is the variance added by step t of the forward process, `alpha_bar_t` the product of the 1 - beta up to t.
"""

import itertools
import math
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing")


def linear_betas(num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """[T] float64, evenly spaced (Ho et al. 2020, section 4)."""
    _check(num_train_timesteps, beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)


def scaled_linear_betas(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Tensor:
    """[T] float64, whose square roots are evenly spaced (Rombach et al. 2022, latent diffusion)."""
    _check(num_train_timesteps, beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2


def squared_cosine_betas(num_train_timesteps: int = 1000, max_beta: float = 0.999) -> Tensor:
    r"""[T] float64 from :math:`\bar\alpha(t) = \cos^2\big(\frac{t + 0.008}{1.008}\frac\pi2\big)`, capped at ``max_beta``
    (Nichol and Dhariwal 2021, equation 17)."""
    _check(num_train_timesteps, 0.0, max_beta)

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
    betas = [min(1 - alpha_bar(b) / alpha_bar(a), max_beta) for a, b in itertools.pairwise(steps)]
    return torch.tensor(betas, dtype=torch.float64)


def alphas_cumprod(betas: Tensor) -> Tensor:
    r""":math:`\bar\alpha`, [T] float64."""
    return torch.cumprod(1 - betas.double(), dim=0)


def timestep_spacing(
    num_train_timesteps: int, steps: int, spacing: str = "leading", steps_offset: int = 0
) -> list[int]:
    """The timesteps of a trajectory, from noise to image (Lin et al. 2024, table 2; as diffusers' schedulers choose them).

    Args:
        num_train_timesteps: T, the length of the schedule.
        steps: how many to take, 1 <= steps <= T; that many come back, also where the rounding of ``"trailing"`` makes
            diffusers 0.42 append a timestep of -1 (61 steps of 1000, say).
        spacing: ``"linspace"`` (both ends), ``"leading"`` (multiples of T // steps) or ``"trailing"`` (ends at T - 1).
        steps_offset: added to the timesteps of ``"leading"``.

    Raises:
        TypeError: ``steps`` is no integer.
        ValueError: ``spacing`` is not known, or ``steps`` is out of range.
    """
    steps = check_steps(steps, most=num_train_timesteps)
    if spacing == "linspace":
        timesteps: np.ndarray = np.linspace(0, num_train_timesteps - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(0, steps) * (num_train_timesteps // steps)).round()[::-1] + steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / steps))[:steps] - 1
    else:
        raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    return [int(t) for t in timesteps]


SIGMA_SPACINGS = ("karras", "exponential", "polyexponential", "beta", "lu")


def spaced_sigmas(
    steps: int, sigma_min: float, sigma_max: float, spacing: str = "karras", rho: float | None = None
) -> list[float]:
    """Noise levels from ``sigma_max`` down to ``sigma_min``, both among them.

    Args:
        steps: how many; one alone is ``sigma_max``.
        sigma_min, sigma_max: the ends, above 0; two where there are several levels.
        spacing: ``"karras"`` (Karras et al. 2022, equation 5), ``"exponential"`` and ``"lu"`` (evenly in log sigma, Lu et al.
            2022a), ``"polyexponential"`` (a power of that) or ``"beta"`` (quantiles of Beta(0.6, 0.6), Lee et al.
            2024; needs scipy).
        rho: exponent, 7 of ``"karras"`` and 1 of ``"polyexponential"`` where it is None.
    """
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < min <= max, got {sigma_min} and {sigma_max}")
    if steps > 1 and sigma_min == sigma_max:
        raise ValueError(f"sigma_min and sigma_max must differ for {steps} noise levels, both are {sigma_min}")
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        exponent = 1 / (7.0 if rho is None else rho)
        levels = (sigma_max**exponent + ramp * (sigma_min**exponent - sigma_max**exponent)) ** (1 / exponent)
    elif spacing in ("exponential", "polyexponential", "lu"):
        power = 1.0 if rho is None or spacing != "polyexponential" else rho
        levels = np.exp((1 - ramp) ** power * math.log(sigma_max / sigma_min) + math.log(sigma_min))
    elif spacing == "beta":
        try:
            from scipy.stats import beta
        except ImportError:
            raise ImportError("the beta spacing needs scipy: pip install scipy") from None
        levels = sigma_min + beta.ppf(1 - ramp, 0.6, 0.6) * (sigma_max - sigma_min)
    else:
        raise ValueError(f"spacing must be one of {SIGMA_SPACINGS}, got {spacing!r}")
    return [float(level) for level in levels]


def flow_shift(sigma: float, shift: float) -> float:
    """s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, section 5.3.2)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmoid_betas(num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """[T] float64, a sigmoid over [-6, 6] between the ends (Xu et al. 2022, GeoDiff)."""
    _check(num_train_timesteps, beta_start, beta_end)
    ramp = torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64)
    return torch.sigmoid(ramp) * (beta_end - beta_start) + beta_start


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """[T] float64: ``betas`` rescaled so that the last timestep is all noise (Lin et al. 2024, algorithm 1)."""
    root = alphas_cumprod(betas).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = root**2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def check_steps(steps: int, name: str = "steps", least: int = 1, most: int | None = None) -> int:
    """``steps`` as a Python integer; raises TypeError where it is none and ValueError where it is out of range."""
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"{name} must be an integer, got {steps!r}")
    if steps < least or (most is not None and steps > most):
        allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {allowed}, got {steps}")
    return int(steps)


def _check(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if not 0 <= beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 <= start <= end < 1, got {beta_start} and {beta_end}")
