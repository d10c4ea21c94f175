"""Euler's method in sigma space, with churn (Karras et al. 2022) or ancestral noise."""

from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Trace
from .stochastic import NO_CHURN, Ancestral, Churn, Churned, ancestral_split, churned_call


def euler(trace: Trace, path: Path, *, churn: Churn = NO_CHURN) -> None:
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction)."""
    x = None
    for i in range(len(path)):
        x, x0, sigma = churned_call(trace, path, i, x, churn, len(path))
        x = x + (path.sigmas[i + 1] - sigma) * ((x - x0) / sigma)
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class Euler(Churned):
    """Euler's method in sigma space, with the churn of Karras et al. 2022; without it the same steps as `DDIM`."""

    def follow(self, trace: Trace, steps: int) -> None:
        euler(trace, self.sigma_path(steps), churn=self.churn())


def euler_ancestral(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """Euler's method down to sigma_down, then noise."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma = path.sigmas[i]
        down, up = ancestral_split(sigma, path.sigmas[i + 1], eta)
        x = x + (down - sigma) * ((x - x0) / sigma)
        if up > 0:
            x = x + s_noise * up * trace.noise(interval=(path.sigmas[i], path.sigmas[i + 1]))
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class EulerAncestral(Ancestral):
    """Euler's method down to sigma_down, then noise."""

    def follow(self, trace: Trace, steps: int) -> None:
        euler_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)
