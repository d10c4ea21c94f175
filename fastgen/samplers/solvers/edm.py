"""Models preconditioned as in Karras et al. 2022, table 1: their schedule, and the formulas of other pages on it."""

import math
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..schedules import spaced_sigmas
from .base import Solver
from .dpm_solver import multistep
from .euler import euler
from .heun import heun
from .stochastic import Churn, check_noise


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMSolver(Solver):
    """Base of the solvers of models preconditioned as in Karras et al. 2022, table 1.

    Args:
        sigma_data: the deviation of the data.
        sigma_min, sigma_max, rho: of Karras' schedule (equation 5).
        prediction_type: ``"epsilon"`` for c_out of the paper, ``"v_prediction"`` for its negative.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    prediction_type: str = "epsilon"

    def prediction(self) -> Prediction:
        return Prediction(prediction_type=self.prediction_type, sigma_data=self.sigma_data)

    def sigma_path(self, steps: int) -> Path:
        sigmas = [*spaced_sigmas(steps, self.sigma_min, self.sigma_max, "karras", self.rho), 0.0]
        return Path([edm_timestep(s) for s in sigmas[:-1]], [1.0] * len(sigmas), sigmas, edm_timestep)


def edm_timestep(sigma: float) -> float:
    """c_noise."""
    return 0.25 * math.log(sigma)


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMEuler(EDMSolver):
    """Euler's method for preconditioned models."""

    def follow(self, trace: Trace, steps: int) -> None:
        euler(trace, self.sigma_path(steps))


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMHeun(EDMSolver):
    """Heun's method for preconditioned models, the sampler of Karras et al. 2022."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_noise(s_churn=self.s_churn, s_noise=self.s_noise)

    def follow(self, trace: Trace, steps: int) -> None:
        churn = Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)
        heun(trace, self.sigma_path(steps), churn=churn)


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMDPMSolverPP(EDMSolver):
    """DPM-Solver++ for preconditioned models."""

    order: int = 2

    def follow(self, trace: Trace, steps: int) -> None:
        multistep(trace, self.sigma_path(steps), order=self.order)
