"""Heun's method in sigma space, of order 2 with two calls of the model a step (Karras et al. 2022, algorithm 2)."""

from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Trace
from .stochastic import NO_CHURN, Churn, Churned, churned_call


def heun(trace: Trace, path: Path, *, churn: Churn = NO_CHURN) -> None:
    """Heun's method (Karras et al. 2022, algorithm 2); Euler's where the step ends at sigma = 0."""
    x = None
    for i in range(len(path)):
        x, x0, sigma = churned_call(trace, path, i, x, churn, len(path))
        sigma_next = path.sigmas[i + 1]
        d = (x - x0) / sigma
        ahead = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            half = trace.keep(x + (sigma_next - sigma) / 2 * d)
            ahead, x0 = trace.call(ahead, path.timestep_at(sigma_next), 1.0, sigma_next, between=True)
            ahead = half + (sigma_next - sigma) / 2 * ((ahead - x0) / sigma_next)
        x = ahead
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class Heun(Churned):
    """Heun's method (Karras et al. 2022, algorithm 2), of order 2 with two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        heun(trace, self.sigma_path(steps), churn=self.churn())
