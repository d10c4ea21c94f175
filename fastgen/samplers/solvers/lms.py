"""Linear multistep in sigma space (k-diffusion), its weights integrated exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.path import Path
from ..engine.trace import ZERO, Trace
from .base import SigmaSolver


def lms(trace: Trace, path: Path, *, order: int = 4) -> None:
    """Linear multistep: the derivative's polynomial through the last ``order`` steps, integrated (Karras' k-diffusion)."""
    if not 1 <= order <= 8:
        raise ValueError(f"order must be in [1, 8], got {order}")
    x, derivatives = None, []  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        derivatives = [trace.keep((x - x0) / path.sigmas[i]), *derivatives[: order - 1]]
        now = (x - x0) / path.sigmas[i]
        weights = lms_weights(path.sigmas, i, min(i + 1, order))
        x = x + sum((w * d for w, d in zip(weights, [now, *derivatives[1:]], strict=False)), ZERO)
    trace.finish(x, *path.end())


def lms_weights(sigmas: Sequence[float], i: int, order: int) -> list[float]:
    """The integrals from sigma_i to sigma_{i+1} of the Lagrange polynomials through sigma_i ... sigma_{i-order+1}; exact."""
    nodes, scale = np.array([sigmas[i - k] for k in range(order)]), sigmas[i]
    weights = []
    for j in range(order):
        others = np.delete(nodes, j) / scale
        polynomial = np.poly1d(others, r=True) / np.prod(nodes[j] / scale - others)
        primitive = polynomial.integ()
        weights.append(float(primitive(sigmas[i + 1] / scale) - primitive(1.0)) * scale)
    return weights


@dataclass(frozen=True, kw_only=True, eq=False)
class LMS(SigmaSolver):
    """Linear multistep of ``order`` derivatives."""

    order: int = 4

    def follow(self, trace: Trace, steps: int) -> None:
        lms(trace, self.sigma_path(steps), order=self.order)
