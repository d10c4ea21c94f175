"""SA-Solver: stochastic Adams-Bashforth predictor and Adams-Moulton corrector (Xue et al. 2023)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engine.path import Path
from ..engine.trace import ZERO, Trace, weighted
from .base import SigmaSolver
from .dpm_solver import integrand


def sa_solver(
    trace: Trace,
    path: Path,
    tau: Callable[[float], float],
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> None:
    """SA-Solver (Xue et al. 2023, algorithm 1): stochastic Adams-Bashforth predictor and Adams-Moulton corrector.

    Both take the same noise, so the corrector is its predictor plus differences of predictions.
    """
    algorithm = "dpmsolver++" if predict_x0 else "dpmsolver"
    length = max(predictor_order, corrector_order - 1)
    x, past, predicted = None, [], ZERO  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, m = integrand(trace, path, i, x, algorithm)
        if i > 0:
            used = min(corrector_order, len(past) + 1)
            if lower_order_final:
                used = min(used, len(path) - i + 2)
            level = tau(path.timesteps[i - 1])
            weights = sa_weights(path, i - 1, i, used, level, predict_x0, corrector=True)
            x = x + weighted(weights, [m, *past][:used]) - predicted
        kept = trace.keep(m)
        past = [kept, *past][:length]
        used = min(predictor_order, len(past))
        if lower_order_final:
            used = min(used, len(path) - i)
        level = tau(path.timesteps[i])
        weights = sa_weights(path, i, i, used, level, predict_x0, corrector=False)
        of_sample, of_noise = _sa_base(path, i, level, predict_x0)
        x = of_sample * x + of_noise * trace.noise() + weighted(weights, [m, *past[1:]][:used])
        predicted = weighted(weights, past[:used])
    trace.finish(x, *path.end())


def _sa_base(path: Path, i: int, tau: float, predict_x0: bool) -> tuple[float, float]:
    h = path.log_snr(i + 1) - path.log_snr(i)
    sigma = path.sigmas[i + 1]
    if predict_x0:
        return math.exp(-(tau**2) * h) * sigma / path.sigmas[i], sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return path.alphas[i + 1] / path.alphas[i], tau * sigma * math.sqrt(math.expm1(2 * h))


def sa_weights(
    path: Path, i: int, newest: int, order: int, tau: float, predict_x0: bool, *, corrector: bool
) -> list[float]:
    """The coefficients of the predictions at newest, newest - 1, ... in the step from i to i + 1 (propositions 4.1, 4.2).

    At order 2 with clean-sample prediction, the corrected coefficients of the authors' code, which its appendix explains.
    """
    newest = i + 1 if corrector else newest
    start, end = path.log_snr(i), path.log_snr(i + 1)
    h, rate = end - start, (1 + tau**2 if predict_x0 else -1.0)
    nodes = [path.log_snr(newest - k) for k in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        others = [other - end for k, other in enumerate(nodes) if k != j]
        polynomial = np.poly1d(others, r=True) / np.prod([node - end - other for other in others])
        weights.append(_integral_of_exponential(polynomial, rate, h))
    if predict_x0 and order == 2:
        slope = h**2 / 2 - (h * rate - 1 + math.exp(-rate * h)) / rate**2
        change = slope / h if corrector else slope / (start - path.log_snr(i - 1))
        weights = [weights[0] + change, weights[1] - change]
    # exp((1 + tau^2) lambda_end) stands before the integral: exp(-tau^2 lambda) sigma of it is alpha, exp(-lambda) alpha is sigma
    scale = rate * path.alphas[i + 1] if predict_x0 else -(1 + tau**2) * path.sigmas[i + 1]
    return [scale * w for w in weights]


def _integral_of_exponential(polynomial: np.poly1d, rate: float, h: float) -> float:
    """The integral of p(u) exp(rate u) over u in [-h, 0]."""

    def primitive(u: float) -> float:
        total, sign, derivative = 0.0, 1.0, polynomial
        for k in range(polynomial.order + 1):
            total += sign * float(derivative(u)) / rate ** (k + 1)
            derivative, sign = derivative.deriv(), -sign
        return total * math.exp(rate * u)

    return primitive(0.0) - primitive(-h)


@dataclass(frozen=True, kw_only=True, eq=False)
class SASolver(SigmaSolver):
    """SA-Solver (Xue et al. 2023); ``tau`` gives the stochasticity at a timestep, 1 between 200 and 800 where None."""

    predictor_order: int = 2
    corrector_order: int = 2
    tau: Callable[[float], float] | None = None
    final_sigma: str = "min"

    def follow(self, trace: Trace, steps: int) -> None:
        tau = self.tau or (lambda t: 1.0 if 200 <= t <= 800 else 0.0)
        orders = {"predictor_order": self.predictor_order, "corrector_order": self.corrector_order}
        sa_solver(trace, self.vp_path(steps), tau, **orders)  # type: ignore[arg-type]
