"""The midpoint method in log sigma, DPM-Solver-2 (Lu et al. 2022a) in Karras' form; diffusers calls it KDPM2."""

from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Linear, Trace
from .stochastic import NO_CHURN, Ancestral, Churn, Churned, ancestral_split, churned_call, halfway


def dpm_2(trace: Trace, path: Path, *, churn: Churn = NO_CHURN) -> None:
    """The midpoint method in log sigma: DPM-Solver-2 (Lu et al. 2022a) in Karras' form."""
    x = None
    for i in range(len(path)):
        x, x0, sigma = churned_call(trace, path, i, x, churn, len(path))
        x = _midpoint(trace, path, x, x0, sigma, path.sigmas[i + 1])
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPM2(Churned):
    """The midpoint method in log sigma (KDPM2), of order 2 with two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        dpm_2(trace, self.sigma_path(steps), churn=self.churn())


def dpm_2_ancestral(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """`dpm_2` down to sigma_down, then noise."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        down, up = ancestral_split(path.sigmas[i], path.sigmas[i + 1], eta)
        x = _midpoint(trace, path, x, x0, path.sigmas[i], down)
        if down > 0 and up > 0:
            x = x + s_noise * up * trace.noise(interval=(path.sigmas[i], path.sigmas[i + 1]))
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPM2Ancestral(Ancestral):
    """`DPM2` down to sigma_down, then noise."""

    def follow(self, trace: Trace, steps: int) -> None:
        dpm_2_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)


def _midpoint(trace: Trace, path: Path, x: Linear, x0: Linear, sigma: float, sigma_next: float) -> Linear:
    d = (x - x0) / sigma
    if sigma_next == 0:
        return x + (sigma_next - sigma) * d
    middle = halfway(sigma, sigma_next)
    ahead, x0 = trace.call(x + (middle - sigma) * d, path.timestep_at(middle), 1.0, middle, between=True)
    return x + (sigma_next - sigma) * ((ahead - x0) / middle)
