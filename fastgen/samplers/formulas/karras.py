"""Solvers in the sigma space of Karras et al. 2022, where x = x0 + sigma eps and dx/dsigma = (x - x0) / sigma.

Paths have alphas of 1. ``Churn`` adds noise before a call of the model, the ancestral forms add it after.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..path import Path
from ..trace import ZERO, Linear, Trace


@dataclass(frozen=True)
class Churn:
    """Stochasticity of Karras et al. 2022, algorithm 2: S_churn over the whole trajectory, where sigma is within bounds."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def sigma_hat(self, sigma: float, steps: int) -> float:
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        return sigma * (1 + gamma)


NO_CHURN = Churn()


def ancestral_split(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): step down to the first, then add noise of the second, to arrive at ``sigma_next``."""
    if not eta:
        return sigma_next, 0.0
    up = min(sigma_next, eta * math.sqrt(max(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2, 0.0)))
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


def halfway(sigma: float, sigma_next: float, r: float = 0.5) -> float:
    """The sigma at fraction r of the way, in its logarithm."""
    return sigma ** (1 - r) * sigma_next**r


def _churned_call(
    trace: Trace, path: Path, i: int, x: Linear | None, churn: Churn, divisor: int
) -> tuple[Linear, Linear, float]:
    """Add the noise of the churn and call the model there; returns (x, x0, sigma_hat)."""
    sigma, hat = path.sigmas[i], churn.sigma_hat(path.sigmas[i], divisor)
    timestep = path.timesteps[i]
    if hat > sigma:
        if x is None:
            x = trace.renoise(None, timestep, 1.0, sigma)
        x = x + churn.s_noise * math.sqrt(hat**2 - sigma**2) * trace.noise()
        timestep = path.timestep_at(hat)
    x, x0 = trace.call(x, timestep, 1.0, hat)
    return x, x0, hat


def euler(trace: Trace, path: Path, *, churn: Churn = NO_CHURN, start: int = 0) -> None:
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction)."""
    x = None
    for i in range(start, len(path)):
        x, x0, sigma = _churned_call(trace, path, i, x, churn, len(path))
        x = x + (path.sigmas[i + 1] - sigma) * ((x - x0) / sigma)
    trace.finish(x, *path.end())


def euler_ancestral(
    trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0, always_draw: bool = False, start: int = 0
) -> None:
    """Euler's method down to sigma_down, then noise. ``always_draw``: the last step draws noise too and takes 0 of it."""
    x = None
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma = path.sigmas[i]
        down, up = ancestral_split(sigma, path.sigmas[i + 1], eta)
        x = x + (down - sigma) * ((x - x0) / sigma)
        if always_draw or up > 0:
            x = x + s_noise * up * trace.noise(interval=(path.sigmas[i], path.sigmas[i + 1]))
    trace.finish(x, *path.end())


def heun(trace: Trace, path: Path, *, churn: Churn = NO_CHURN, start: int = 0) -> None:
    """Heun's method (Karras et al. 2022, algorithm 2); Euler's where the step ends at sigma = 0."""
    x = None
    for i in range(start, len(path)):
        x, x0, sigma = _churned_call(trace, path, i, x, churn, len(path))
        sigma_next = path.sigmas[i + 1]
        d = (x - x0) / sigma
        ahead = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            half = trace.keep(x + (sigma_next - sigma) / 2 * d)
            ahead, x0 = trace.call(ahead, path.timestep_at(sigma_next), 1.0, sigma_next, between=True)
            ahead = half + (sigma_next - sigma) / 2 * ((ahead - x0) / sigma_next)
        x = ahead
    trace.finish(x, *path.end())


def dpm_2(trace: Trace, path: Path, *, churn: Churn = NO_CHURN, start: int = 0) -> None:
    """The midpoint method in log sigma: DPM-Solver-2 (Lu et al. 2022a) in Karras' form."""
    x = None
    for i in range(start, len(path)):
        x, x0, sigma = _churned_call(trace, path, i, x, churn, len(path))
        x = _midpoint(trace, path, x, x0, sigma, path.sigmas[i + 1])
    trace.finish(x, *path.end())


def dpm_2_ancestral(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0, start: int = 0) -> None:
    """`dpm_2` down to sigma_down, then noise."""
    x = None
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        down, up = ancestral_split(path.sigmas[i], path.sigmas[i + 1], eta)
        x = _midpoint(trace, path, x, x0, path.sigmas[i], down)
        if down > 0 and up > 0:
            x = x + s_noise * up * trace.noise(interval=(path.sigmas[i], path.sigmas[i + 1]))
    trace.finish(x, *path.end())


def _midpoint(trace: Trace, path: Path, x: Linear, x0: Linear, sigma: float, sigma_next: float) -> Linear:
    d = (x - x0) / sigma
    if sigma_next == 0:
        return x + (sigma_next - sigma) * d
    middle = halfway(sigma, sigma_next)
    ahead, x0 = trace.call(x + (middle - sigma) * d, path.timestep_at(middle), 1.0, middle, between=True)
    return x + (sigma_next - sigma) * ((ahead - x0) / middle)


def lms(trace: Trace, path: Path, *, order: int = 4, start: int = 0) -> None:
    """Linear multistep: the derivative's polynomial through the last ``order`` steps, integrated (Karras' k-diffusion)."""
    if not 1 <= order <= 8:
        raise ValueError(f"order must be in [1, 8], got {order}")
    x, derivatives = None, []  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        derivatives = [trace.keep((x - x0) / path.sigmas[i]), *derivatives[: order - 1]]
        now = (x - x0) / path.sigmas[i]
        weights = lms_weights(path.sigmas, i, min(i + 1, order))
        x = x + sum((w * d for w, d in zip(weights, [now, *derivatives[1:]], strict=False)), ZERO)
    trace.finish(x, *path.end())


def lms_weights(sigmas: Sequence[float], i: int, order: int) -> list[float]:
    """The integrals from sigma_i to sigma_{i+1} of the Lagrange polynomials through sigma_i ... sigma_{i-order+1}; exact."""
    nodes, scale = np.array([sigmas[i - k] for k in range(order)]), sigmas[i]
    weights = []
    for j in range(order):
        others = np.delete(nodes, j) / scale
        polynomial = np.poly1d(others, r=True) / np.prod(nodes[j] / scale - others)
        primitive = polynomial.integ()
        weights.append(float(primitive(sigmas[i + 1] / scale) - primitive(1.0)) * scale)
    return weights
