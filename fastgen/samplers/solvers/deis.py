"""DEIS: the polynomial of the noise in log rho, integrated over rho (Zhang and Chen 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.path import Path
from ..engine.trace import Trace, weighted
from .base import SigmaSolver
from .dpm_solver import integrand


def deis(trace: Trace, path: Path, *, order: int = 2, lower_order_final: bool = True) -> None:
    r"""tAB-DEIS in :math:`\log\rho`, :math:`\rho = \sigma/\alpha` (Zhang and Chen 2023): the noise's polynomial in log rho
    through the last ``order`` steps, integrated over rho."""
    x, past = None, []  # type: ignore[var-annotated]
    rho = [s / a for a, s in zip(path.alphas, path.sigmas, strict=True)]
    for i in range(len(path)):
        x, eps = integrand(trace, path, i, x, "dpmsolver")
        short = lower_order_final and len(path) < 15
        k = 1 if short and i == len(path) - 1 else min(order, 2) if short and i == len(path) - 2 else order
        seen = [eps, *past][: min(k, len(past) + 1)]
        weights = deis_weights(rho, i, len(seen))
        kept = trace.keep(eps)
        x = path.alphas[i + 1] * (x / path.alphas[i] + weighted(weights, seen))
        past = [kept, *past][: order - 1]
    trace.finish(x, *path.end())


def deis_weights(rho: Sequence[float], i: int, order: int) -> list[float]:
    """The integrals over rho, from rho_i to rho_{i+1}, of the Lagrange polynomials in log rho through the last steps."""
    nodes = [math.log(rho[i - k]) for k in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        polynomial = np.poly1d(others, r=True) / np.prod([node - other for other in others])
        weights.append(
            _integral_of_log_polynomial(polynomial, rho[i + 1]) - _integral_of_log_polynomial(polynomial, rho[i])
        )
    return weights


def _integral_of_log_polynomial(polynomial: np.poly1d, rho: float) -> float:
    """The integral from 0 to rho of p(log r) dr: rho times p - p' + p'' - ... at log rho, by parts."""
    if rho == 0:
        return 0.0
    total, sign, derivative = 0.0, 1.0, polynomial
    for _ in range(polynomial.order + 1):
        total += sign * float(derivative(math.log(rho)))
        derivative, sign = derivative.deriv(), -sign
    return rho * total


@dataclass(frozen=True, kw_only=True, eq=False)
class DEIS(SigmaSolver):
    """tAB-DEIS in log rho of ``order`` 1 to 3 (Zhang and Chen 2023)."""

    order: int = 2
    final_sigma: str = "min"
    lower_order_final: bool = True

    def follow(self, trace: Trace, steps: int) -> None:
        deis(trace, self.vp_path(steps), order=self.order, lower_order_final=self.lower_order_final)
