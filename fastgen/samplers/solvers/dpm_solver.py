r"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (Lu et al. 2022b), which integrate
exactly what is linear, over :math:`\lambda = \log(\alpha/\sigma)`.

"dpmsolver++" integrates the clean sample, "dpmsolver" the noise; the "sde-" forms are their stochastic counterparts. With
h the step in lambda and D_k the k-th divided difference of what is integrated, all orders are the one series
:math:`x' = A x + B_0 D_0 + B_1 D_1 + B_2 D_2 + S\varepsilon` whose coefficients :class:`Integrator` gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Linear, Trace
from .base import SigmaSolver

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

SOLVER_TYPES = ("midpoint", "heun")


@dataclass(frozen=True)
class Integrator:
    """The coefficients of one step from (alpha, sigma) of step ``s`` to those of step ``t`` of a path."""

    path: Path
    s: int
    t: int
    algorithm: str
    solver_type: str

    @property
    def h(self) -> float:
        return self.path.log_snr(self.t) - self.path.log_snr(self.s)

    @property
    def of_sample(self) -> float:
        alphas, sigmas, s, t = self.path.alphas, self.path.sigmas, self.s, self.t
        if not self.algorithm.endswith("++"):
            return alphas[t] / alphas[s]
        shrink = math.exp(-self.h) if self.algorithm.startswith("sde") else 1.0
        return sigmas[t] / sigmas[s] * shrink

    def of_difference(self, k: int) -> float:
        """B_k; of k = 1 by the midpoint rule where the solver type says so."""
        h, alpha, sigma = self.h, self.path.alphas[self.t], self.path.sigmas[self.t]
        stochastic = self.algorithm.startswith("sde")
        if h == 0:
            return 0.0
        if self.algorithm.endswith("++"):
            h, scale = (2 * h if stochastic else h), alpha
            first = -math.expm1(-h)
            exact = (first, 1.0 - first / h, 0.5 - (h - first) / h**2) if math.isfinite(h) else (first, 1.0, 0.5)
        else:
            scale = -sigma * (2.0 if stochastic else 1.0)
            first = math.expm1(h)
            exact = (first, first / h - 1.0, (first - h) / h**2 - 0.5)
        return scale * (0.5 * first if k == 1 and self.solver_type == "midpoint" else exact[k])

    @property
    def of_noise(self) -> float:
        sigma = self.path.sigmas[self.t]
        if self.algorithm == "sde-dpmsolver++":
            return sigma * math.sqrt(max(-math.expm1(-2 * self.h), 0.0))
        return sigma * math.sqrt(max(math.expm1(2 * self.h), 0.0)) if self.algorithm == "sde-dpmsolver" else 0.0


def multistep_order(i: int, steps: int, seen: int, order: int, lower_order_final: bool, ends_at_zero: bool) -> int:
    """The order of step i: as many previous predictions as there are, less at the end of short trajectories."""
    short = lower_order_final and steps < 15
    if i == steps - 1 and (short or ends_at_zero):
        return 1
    if i == steps - 2 and short:
        order = min(order, 2)
    return min(order, seen)


def multistep(
    trace: Trace,
    path: Path,
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    ends_at_zero: bool = True,
    halved: bool = False,
) -> None:
    """Multistep DPM-Solver(++) of order 1 to 3 (Lu et al. 2022b, algorithm 2); the third order is always the exact series.

    ``halved``: the third order as the authors' code has it, and after it diffusers and k-diffusion. It takes a divided difference
    for a derivative, which is twice that, and so converges with order 2 only.
    """
    x, past = None, []  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, m0 = integrand(trace, path, i, x, algorithm)
        k = multistep_order(i, len(path), len(past) + 1, order, lower_order_final, ends_at_zero)
        step = Integrator(path, i, i + 1, algorithm, "heun" if k == 3 else solver_type)
        kept = trace.keep(m0)
        x = step.of_sample * x + step.of_difference(0) * m0
        if step.h == 0:
            k = 1  # where the schedule repeats its last sigma: nothing is left to do
        if k == 2:
            r = (path.log_snr(i) - path.log_snr(i - 1)) / step.h
            x = x + step.of_difference(1) / r * (m0 - past[0])
        elif k == 3:
            r0 = (path.log_snr(i) - path.log_snr(i - 1)) / step.h
            r1 = (path.log_snr(i - 1) - path.log_snr(i - 2)) / step.h
            recent, before = (m0 - past[0]) / r0, (past[0] - past[1]) / r1
            first = recent + r0 / (r0 + r1) * (recent - before)
            second = (1.0 if halved else 2.0) / (r0 + r1) * (recent - before)
            x = x + step.of_difference(1) * first + step.of_difference(2) * second
        if algorithm.startswith("sde"):
            x = x + step.of_noise * trace.noise()
        past = [kept, *past][: order - 1]
    trace.finish(x, *path.end())


def integrand(trace: Trace, path: Path, i: int, x: Linear | None, algorithm: str) -> tuple[Linear, Linear]:
    """Call the model at step i; (x, what the algorithm integrates)."""
    x, x0 = trace.call(x, *path.point(i))
    if algorithm.endswith("++"):
        return x, x0
    return x, epsilon(trace, x, x0, path.alphas[i], path.sigmas[i])


def epsilon(trace: Trace, x: Linear, x0: Linear, alpha: float, sigma: float) -> Linear:
    """The predicted noise: the model's own where that is what it predicts and nothing clips it."""
    prediction = trace.prediction
    if prediction.prediction_type == "epsilon" and prediction.clip is None and prediction.threshold_ratio is None:
        return trace.output
    return (x - alpha * x0) / sigma


def singlestep(
    trace: Trace,
    path: Path,
    orders: Sequence[int],
    *,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
) -> None:
    """Singlestep DPM-Solver(++): blocks of steps of order 1, 2, 3, each from where its block began (Lu et al. 2022b)."""
    x, past, base, begin = None, [], None, 0  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, m = integrand(trace, path, i, x, algorithm)
        kept = trace.keep(m)
        seen = [m, *past]
        order = min(orders[i], len(seen))
        if order == 1:
            base, begin = x, i
        step = Integrator(path, i - order + 1, i + 1, algorithm, solver_type)
        origin = seen[order - 1]
        if base is None or i - order + 1 < begin:
            raise ValueError(f"step {i} of order {order} needs the steps before it")
        result = step.of_sample * base + step.of_difference(0) * origin
        if order == 2:
            r = (path.log_snr(i) - path.log_snr(i - 1)) / step.h
            result = result + step.of_difference(1) / r * (seen[0] - origin)
        elif order == 3:
            r0 = (path.log_snr(i) - path.log_snr(i - 2)) / step.h
            r1 = (path.log_snr(i - 1) - path.log_snr(i - 2)) / step.h
            near, far = (seen[1] - origin) / r1, (seen[0] - origin) / r0
            exact = Integrator(path, i - 2, i + 1, algorithm, "heun")
            if solver_type == "midpoint":
                result = result + exact.of_difference(1) * far
            else:
                first = (r0 * near - r1 * far) / (r0 - r1)
                second = 2.0 * (far - near) / (r0 - r1)
                result = result + exact.of_difference(1) * first + exact.of_difference(2) * second
        if algorithm.startswith("sde"):
            result = result + step.of_noise * trace.noise()
        x, past = result, [kept, *past][:2]
    trace.finish(x, *path.end())


def singlestep_orders(steps: int, order: int, lower_order_final: bool, ends_at_zero: bool) -> list[int]:
    """The order of each step (Lu et al. 2022b, appendix; as diffusers chooses them)."""
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    block = list(range(1, order + 1))
    orders = block * (steps // order)
    if lower_order_final and order > 1:
        rest = steps % order
        if order == 3:
            orders = block * (steps // 3 - 1) + [1, 2, 1] if rest == 0 else block * (steps // 3) + [1, 2][:rest]
        else:
            orders = block * (steps // 2 - 1) + [1, 1] if rest == 0 else block * (steps // 2) + [1]
    if ends_at_zero and orders:
        orders[-1] = 1
    return orders


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPP(SigmaSolver):
    """DPM-Solver++ (Lu et al. 2022b), multistep or singlestep.

    Args:
        order: 1, 2 or 3.
        algorithm: ``"dpmsolver++"``, ``"dpmsolver"`` (which ends above zero), ``"sde-dpmsolver++"`` or ``"sde-dpmsolver"``.
        solver_type: ``"midpoint"`` or ``"heun"``.
        singlestep: blocks of 1, 2, ... ``order`` steps instead of a memory.
        lower_order_final: lower orders at the end of trajectories under 15 steps.

    The other arguments are those of :class:`SigmaSolver`.
    """

    order: int = 2
    algorithm: str = "dpmsolver++"
    solver_type: str = "midpoint"
    singlestep: bool = False
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("order", (1, 2, 3)),
            ("algorithm", ALGORITHMS),
            ("solver_type", SOLVER_TYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not self.algorithm.endswith("++") and self.final_sigma == "zero":
            raise ValueError(f"algorithm {self.algorithm!r} needs final_sigma='min': it integrates up to log sigma")

    def follow(self, trace: Trace, steps: int) -> None:
        zero = self.final_sigma == "zero"
        path = self.vp_path(steps)
        if self.singlestep:
            orders = singlestep_orders(steps, self.order, self.lower_order_final or steps % self.order != 0, zero)
            singlestep(trace, path, orders, algorithm=self.algorithm, solver_type=self.solver_type)
        else:
            multistep(
                trace, path, order=self.order, algorithm=self.algorithm, solver_type=self.solver_type,
                lower_order_final=self.lower_order_final, ends_at_zero=zero,
            )  # fmt: skip
