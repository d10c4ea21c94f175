"""Betas, timesteps and sigmas exactly as diffusers computes them, in float32 where it does: its trajectories depend on it.

For schedules in float64 see ``fastgen.samplers.schedules``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
ZERO_SNR_ALPHA_BAR = 2**-24  # the sigma of the last timestep must be finite

Array = np.ndarray


def make_betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float32, of ``beta_schedule`` or ``trained_betas``."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(np.asarray(config["trained_betas"]), dtype=torch.float32)
    steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    schedule = config["beta_schedule"]
    if schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    elif schedule in ("squaredcos_cap_v2", "laplace", "exp"):
        betas = _betas_for_alpha_bar(steps, schedule)
    else:
        raise ValueError(f"beta_schedule must be one of {BETA_SCHEDULES}, got {schedule!r}")
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _betas_for_alpha_bar(steps: int, schedule: str, max_beta: float = 0.999) -> Tensor:
    def alpha_bar(t: float) -> float:
        if schedule == "exp":
            return math.exp(t * -12.0)
        if schedule == "laplace":
            lmb = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
            return math.sqrt(math.exp(lmb) / (1 + math.exp(lmb)))
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2024, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[0:1], alpha_bar[1:] / alpha_bar[:-1]])


def spaced_timesteps(config: Mapping[str, Any], steps: int, dtype: Any = np.int64) -> Array:
    """``steps`` timesteps from noise to image, over the whole schedule (DDPM, DDIM, the Karras family)."""
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        exact = np.linspace(0, total - 1, steps, dtype=np.float32 if dtype == np.float32 else None)
        return (exact.round() if dtype == np.int64 else exact)[::-1].copy().astype(dtype)
    if spacing == "leading":
        timesteps = (np.arange(0, steps) * (total // steps)).round()[::-1].copy().astype(dtype)
        return timesteps + np.asarray(config["steps_offset"], dtype=dtype)
    if spacing == "trailing":
        # [:steps] leaves out the timestep -1 that rounding appends at 61 steps of 1000, say
        return np.arange(total, 0, -total / steps).round()[:steps].copy().astype(dtype) - np.asarray(1, dtype=dtype)
    raise ValueError(f"timestep_spacing must be one of {SPACINGS}, got {spacing!r}")


def spaced_timesteps_with_end(config: Mapping[str, Any], steps: int, last: int) -> Array:
    """``steps`` timesteps of a grid of one more, whose end is left out (the multistep family); ``last`` - 1 is the first."""
    spacing = config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].copy().astype(np.int64)
    if spacing == "leading":
        timesteps = (np.arange(0, steps + 1) * (last // (steps + 1))).round()[::-1][:-1].copy().astype(np.int64)
        return timesteps + config["steps_offset"]
    if spacing == "trailing":
        return np.arange(last, 0, -config["num_train_timesteps"] / steps).round().copy().astype(np.int64) - 1
    raise ValueError(f"timestep_spacing must be one of {SPACINGS}, got {spacing!r}")


def train_sigmas(alphas_cumprod: Tensor) -> Array:
    """[T] float32, sqrt((1 - alpha_bar) / alpha_bar)."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def sigma_to_timestep(sigma: Array | float, log_sigmas: Array) -> Array:
    """The (fractional) timestep whose sigma this is, by interpolation of the logarithms."""
    log_sigma = np.log(np.maximum(sigma, 1e-10))
    distances = log_sigma - log_sigmas[:, np.newaxis]
    low = np.cumsum(distances >= 0, axis=0).argmax(axis=0).clip(max=len(log_sigmas) - 2)
    weight = np.clip((log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return ((1 - weight) * low + weight * (low + 1)).reshape(np.shape(sigma))


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Array:
    """Karras et al. 2022, equation 5."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """Evenly spaced logarithms."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def beta_quantiles(sigma_min: float, sigma_max: float, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Quantiles of the Beta distribution (Lee et al. 2024); needs scipy."""
    try:
        from scipy.stats import beta as distribution
    except ImportError:
        raise ImportError("use_beta_sigmas needs scipy: pip install scipy") from None
    points = 1 - np.linspace(0, 1, steps)
    return np.array([sigma_min + p * (sigma_max - sigma_min) for p in distribution.ppf(points, alpha, beta)])


def converted(config: Mapping[str, Any], sigmas: Array, steps: int) -> Array | None:
    """The sigmas between the ends of ``sigmas`` (noise first) that ``use_karras_sigmas`` and its like ask for; or None."""
    ends = [config.get("sigma_min"), config.get("sigma_max")]
    low = sigmas[-1].item() if ends[0] is None else ends[0]
    high = sigmas[0].item() if ends[1] is None else ends[1]
    if config.get("use_karras_sigmas"):
        return karras(low, high, steps)
    if config.get("use_exponential_sigmas"):
        return exponential(low, high, steps)
    return beta_quantiles(low, high, steps) if config.get("use_beta_sigmas") else None


def flow_shifted(sigmas: Array, shift: float) -> Array:
    """sigma -> s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shifted(sigmas: Array, mu: float, kind: str) -> Array:
    """The shift by image size, as Flux and its like do it."""
    shift = math.exp(mu) if kind == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1))


def stretched_to(sigmas: Array, terminal: float) -> Array:
    """Stretched so that the last sigma is ``terminal``."""
    rest = 1 - sigmas
    return 1 - rest / (rest[-1] / (1 - terminal))
