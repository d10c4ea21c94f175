"""Consistency models (Song et al. 2023) and flow matching (Lipman et al. 2023; Esser et al. 2024)."""

import math

from ..path import Path
from ..trace import Trace
from .karras import NO_CHURN, Churn


def consistency(
    trace: Trace, path: Path, *, sigma_min: float, sigma_max: float, s_noise: float = 1.0, start: int = 0
) -> None:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): denoise wholly, then noise up to the next sigma."""
    x = None
    for i in range(start, len(path)):
        _, x = trace.call(x, *path.point(i))
        if len(path) > 1:
            up = min(max(path.sigmas[i + 1], sigma_min), sigma_max)
            x = x + s_noise * math.sqrt(up**2 - sigma_min**2) * trace.noise()
    trace.finish(x)


def flow_euler(trace: Trace, path: Path, *, stochastic: bool = False, start: int = 0) -> None:
    """x' = x + (sigma' - sigma) v; the stochastic form goes to the clean sample and back up with fresh noise."""
    x = None
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        if stochastic:
            x = (1 - sigma_next) * x0 + sigma_next * trace.noise()
        else:
            x = x + (sigma_next - sigma) * trace.output
    trace.finish(x, *path.end())


def flow_heun(trace: Trace, path: Path, *, churn: Churn = NO_CHURN, divisor: int = 1, start: int = 0) -> None:
    """Heun's method on dx/dsigma = v; Euler's for the last step. ``divisor``: over how many steps the churn is spread."""
    x = None
    for i in range(start, len(path)):
        x, _ = trace.call(x, *path.point(i))
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        hat = churn.sigma_hat(sigma, divisor)
        if hat > sigma:
            x = x + churn.s_noise * math.sqrt(hat**2 - sigma**2) * trace.noise()
        velocity = sigma / hat * trace.output
        ahead = x + (sigma_next - hat) * velocity
        if i + 1 < len(path):
            half = trace.keep(x + (sigma_next - hat) / 2 * velocity)
            trace.call(ahead, *path.point(i + 1), between=True)
            ahead = half + (sigma_next - hat) / 2 * trace.output
            if hat > sigma:  # it cancels out of the derivative, but generators are to stay in step with diffusers
                ahead = ahead + 0.0 * trace.noise()
        x = ahead
    trace.finish(x, *path.end())
