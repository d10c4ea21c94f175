"""Flow matching (Lipman et al. 2023; Esser et al. 2024): Euler's and Heun's methods on its velocity."""

from dataclasses import dataclass

import numpy as np

from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..schedules import flow_shift
from .base import Solver


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowSolver(Solver):
    r"""Base of the solvers of flow matching, :math:`x = (1 - \sigma) x_0 + \sigma\varepsilon` (Lipman et al. 2023).

    Args:
        shift: of sigma towards noise, s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, section 5.3.2).
        num_train_timesteps: the model is called with sigma times this.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def prediction(self) -> Prediction:
        return Prediction(prediction_type="flow_prediction")

    def flow_path(self, steps: int) -> Path:
        sigmas = [flow_shift(float(s), self.shift) for s in np.linspace(1, 0, steps + 1)]
        return Path([s * self.num_train_timesteps for s in sigmas[:-1]], [1 - s for s in sigmas], sigmas)


def flow_euler(trace: Trace, path: Path, *, stochastic: bool = False) -> None:
    """x' = x + (sigma' - sigma) v; the stochastic form goes to the clean sample and back up with fresh noise."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        if stochastic:
            x = (1 - sigma_next) * x0 + sigma_next * trace.noise()
        else:
            x = x + (sigma_next - sigma) * trace.output
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowEuler(FlowSolver):
    """Euler's method on dx/dsigma = v; ``stochastic`` goes to the clean sample and back up with fresh noise."""

    stochastic: bool = False

    def follow(self, trace: Trace, steps: int) -> None:
        flow_euler(trace, self.flow_path(steps), stochastic=self.stochastic)


def flow_heun(trace: Trace, path: Path) -> None:
    """Heun's method on dx/dsigma = v; Euler's for the last step."""
    x = None
    for i in range(len(path)):
        x, _ = trace.call(x, *path.point(i))
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        step, velocity = sigma_next - sigma, trace.output
        ahead = x + step * velocity
        if i + 1 < len(path):
            half = trace.keep(x + step / 2 * velocity)
            trace.call(ahead, *path.point(i + 1), between=True)
            ahead = half + step / 2 * trace.output
        x = ahead
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowHeun(FlowSolver):
    """Heun's method on dx/dsigma = v, two calls a step and one for the last."""

    def follow(self, trace: Trace, steps: int) -> None:
        flow_heun(trace, self.flow_path(steps))
