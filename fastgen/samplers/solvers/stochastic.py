"""The noise of stochastic solvers in the sigma space of Karras et al. 2022: x = x0 + sigma eps, dx/dsigma = (x - x0) / sigma.

Paths have alphas of 1. ``Churn`` adds noise before a call of the model, the ancestral forms add it after.
"""

import math
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Linear, Trace
from .base import SigmaSolver


def check_noise(**amounts: float) -> None:
    """Raises ValueError where one of these is negative, infinite or NaN."""
    for name, value in amounts.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


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


def churned_call(
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Churned(SigmaSolver):
    """Arguments of Karras et al. 2022, algorithm 2, beside those of :class:`SigmaSolver`: ``s_churn``, ``s_tmin``, ``s_tmax``,
    ``s_noise``."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise(s_churn=self.s_churn, s_noise=self.s_noise)

    def churn(self) -> Churn:
        return Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)


def ancestral_split(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): step down to the first, then add noise of the second, to arrive at ``sigma_next``."""
    if not eta:
        return sigma_next, 0.0
    up = min(sigma_next, eta * math.sqrt(max(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2, 0.0)))
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


def halfway(sigma: float, sigma_next: float, r: float = 0.5) -> float:
    """The sigma at fraction r of the way, in its logarithm."""
    return sigma ** (1 - r) * sigma_next**r


@dataclass(frozen=True, kw_only=True, eq=False)
class Ancestral(SigmaSolver):
    """Arguments of the stochastic solvers beside those of :class:`SigmaSolver`: ``eta`` (0 is deterministic) and ``s_noise``."""

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise(eta=self.eta, s_noise=self.s_noise)
