"""Consistency models (Song et al. 2023): a model that goes to the clean sample in one call, and back up for another."""

import math
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from .edm import EDMSolver


def consistency(trace: Trace, path: Path, *, sigma_min: float, sigma_max: float, s_noise: float = 1.0) -> None:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): denoise wholly, then noise up to the next sigma."""
    x = None
    for i in range(len(path)):
        _, x = trace.call(x, *path.point(i))
        if len(path) > 1:
            up = min(max(path.sigmas[i + 1], sigma_min), sigma_max)
            x = x + s_noise * math.sqrt(up**2 - sigma_min**2) * trace.noise()
    trace.finish(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Consistency(EDMSolver):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1)."""

    clip_sample: bool = True

    def prediction(self) -> Prediction:
        return Prediction(sigma_data=self.sigma_data, sigma_min=self.sigma_min, clip=1.0 if self.clip_sample else None)

    def follow(self, trace: Trace, steps: int) -> None:
        consistency(trace, self.sigma_path(steps), sigma_min=self.sigma_min, sigma_max=self.sigma_max)
