"""UniPC: a predictor, and a corrector that costs no further call of the model (Zhao et al. 2023)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engine.path import Path
from ..engine.trace import ZERO, Linear, Trace, weighted
from .base import SigmaSolver
from .dpm_solver import integrand


def unipc(
    trace: Trace,
    path: Path,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> None:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2): a predictor, and a corrector that costs no further call of the model.

    Predictor and corrector of a step begin alike, so the corrector is the sample it corrects plus differences of predictions.
    """
    algorithm = "dpmsolver++" if predict_x0 else "dpmsolver"
    x, past, used, predicted = None, [], 0, ZERO  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, m = integrand(trace, path, i, x, algorithm)
        if i > 0:
            _, weights = unipc_weights(path, i - 1, used, solver_type, predict_x0)
            _, scale = _unipc_base(path, i - 1, predict_x0)
            differences = [p - past[0] for p in past[1:used]] + [m - past[0]]
            x = x + scale * weighted(weights, differences) - predicted
        kept = trace.keep(m)
        past = [kept, *past][:order]
        used = min(order, len(past), len(path) - i if lower_order_final else order)
        weights, _ = unipc_weights(path, i, used, solver_type, predict_x0)
        base, scale = _unipc_base(path, i, predict_x0)
        x = base(x, m) + scale * weighted(weights, [p - m for p in past[1:used]])
        predicted = scale * weighted(weights, [p - kept for p in past[1:used]])
    trace.finish(x, *path.end())


def _unipc_base(path: Path, i: int, predict_x0: bool) -> tuple[Callable[[Linear, Linear], Linear], float]:
    """The first-order step from i, and what higher orders are multiplied by."""
    h = path.log_snr(i + 1) - path.log_snr(i)
    alpha, sigma = path.alphas[i + 1], path.sigmas[i + 1]
    if predict_x0:
        ratio, scale = sigma / path.sigmas[i], -alpha * math.expm1(-h)
        return lambda x, m: ratio * x + scale * m, -alpha
    ratio, of_noise = alpha / path.alphas[i], -sigma * math.expm1(h)
    return lambda x, m: ratio * x + of_noise * m, -sigma


def unipc_weights(
    path: Path, i: int, order: int, solver_type: str, predict_x0: bool
) -> tuple[list[float], list[float]]:
    """B(h) times the rho of the predictor and of the corrector, each divided by its node's r (equation 5 and appendix)."""
    h = path.log_snr(i + 1) - path.log_snr(i)
    if order > 1 and math.isinf(h):
        raise ValueError(f"a step to sigma = 0 must be of order 1, got order {order}: set lower_order_final=True")
    hh = -h if predict_x0 else h
    nodes = [(path.log_snr(i - k) - path.log_snr(i)) / h for k in range(1, order)] + [1.0]
    bh = hh if solver_type == "bh1" else math.expm1(hh)
    right, factorial, phi = [], 1.0, math.expm1(hh) / hh - 1
    for k in range(1, order + 1):
        right.append(phi * factorial / bh)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    matrix = np.vander(nodes, order, increasing=True).T
    predictor = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1]).tolist() if order > 2 else []
    corrector = [0.5] if order == 1 else np.linalg.solve(matrix, right).tolist()
    return (
        [bh * rho / r for rho, r in zip(predictor, nodes, strict=False)],
        [bh * rho / r for rho, r in zip(corrector, nodes, strict=True)],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class UniPC(SigmaSolver):
    """UniPC of any ``order`` (Zhao et al. 2023); ``solver_type`` "bh1" or "bh2"."""

    order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True

    def follow(self, trace: Trace, steps: int) -> None:
        unipc(
            trace,
            self.vp_path(steps),
            order=self.order,
            solver_type=self.solver_type,
            lower_order_final=self.lower_order_final,
        )
