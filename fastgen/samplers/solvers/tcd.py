"""TCD: trajectory consistency distillation (Zheng et al. 2024)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Trace
from .ddim import unclipped_epsilon
from .lcm import LCM


def tcd(trace: Trace, path: Path, between: Sequence[tuple[float, float]], *, eta: float = 0.3) -> None:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, its gamma is ``eta``): DDIM to the marginals
    (alpha, sigma) of ``between``, then noise up to the next level."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        alpha, sigma = between[i]
        x = alpha * x0 + sigma * unclipped_epsilon(trace, x, path.alphas[i], path.sigmas[i])
        if eta > 0 and i + 1 < len(path):
            ratio = path.alphas[i + 1] / alpha
            x = ratio * x + math.sqrt(max(1 - ratio**2, 0.0)) * trace.noise()
    trace.finish(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class TCD(LCM):
    """Trajectory consistency distillation (Zheng et al. 2024); ``eta`` is the gamma of the paper."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def follow(self, trace: Trace, steps: int) -> None:
        path = self.path(steps)
        between = [self.marginal(int((1 - self.eta) * t)) for t in [*path.timesteps[1:], 0]]
        tcd(trace, path, between, eta=self.eta)
