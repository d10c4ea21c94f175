"""DPM-Solver++ for the SDE with any eta, in sigma space, as k-diffusion has it: ancestral, in two stages, and multistep."""

import math
from dataclasses import dataclass

from ..engine.path import Path, log_ratio
from ..engine.trace import Linear, Trace
from .dpm_solver import SOLVER_TYPES
from .stochastic import Ancestral, ancestral_split, halfway


def dpmpp_2s_ancestral(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """DPM-Solver++(2S) down to sigma_down, then noise, in sigma space (k-diffusion)."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma = path.sigmas[i]
        down, up = ancestral_split(sigma, path.sigmas[i + 1], eta)
        if down == 0:
            x = x0
        else:
            middle = halfway(sigma, down)
            ahead = towards(x, x0, sigma, middle)
            _, x0_middle = trace.call(ahead, path.timestep_at(middle), 1.0, middle, between=True)
            x = towards(x, x0_middle, sigma, down)
        if up > 0:
            x = x + s_noise * up * trace.noise(interval=(sigma, path.sigmas[i + 1]))
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPP2SAncestral(Ancestral):
    """DPM-Solver++(2S) with ancestral noise, two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        dpmpp_2s_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)


def dpmpp_sde(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> None:
    """DPM-Solver++ for the SDE, singlestep of two stages, in sigma space (k-diffusion)."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        if sigma_next == 0:
            x = x0
            continue
        middle, weight = halfway(sigma, sigma_next, r), 1 / (2 * r)
        down, up = ancestral_split(sigma, middle, eta)
        ahead = towards(x, x0, sigma, down)
        if up > 0:
            ahead = ahead + s_noise * up * trace.noise(interval=(sigma, middle))
        _, x0_middle = trace.call(ahead, path.timestep_at(middle), 1.0, middle, between=True)
        down, up = ancestral_split(sigma, sigma_next, eta)
        mixed = weight * x0_middle if weight == 1 else (1 - weight) * x0 + weight * x0_middle
        x = towards(x, mixed, sigma, down)
        if up > 0:
            x = x + s_noise * up * trace.noise(interval=(sigma, sigma_next))
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPPSDE(Ancestral):
    """DPM-Solver++ for the SDE, two calls a step, ``r`` of the way to the next sigma."""

    r: float = 0.5

    def follow(self, trace: Trace, steps: int) -> None:
        dpmpp_sde(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise, r=self.r)


def dpmpp_multistep_sde(
    trace: Trace,
    path: Path,
    *,
    order: int = 2,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    halved: bool = False,
) -> None:
    """DPM-Solver++(2M) and (3M) for the SDE with any eta, in sigma space (k-diffusion); at eta = 0 they are deterministic.

    ``halved``: see :func:`multistep`.
    """
    x, past, steps = None, [], []  # type: ignore[var-annotated]
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        kept = trace.keep(x0)
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        h = log_ratio(1.0, sigma_next) - log_ratio(1.0, sigma)
        if sigma_next == 0:
            x = x0
        elif h > 0:
            total = h * (1 + eta)
            first = -math.expm1(-total)
            x = math.exp(-total) * x + first * x0
            phi_2 = 1 - first / total
            if order == 3 and len(past) == 2:
                r0, r1 = steps[0] / h, steps[1] / h
                recent, before = (x0 - past[0]) / r0, (past[0] - past[1]) / r1
                x = x + phi_2 * (recent + r0 / (r0 + r1) * (recent - before))
                x = x - (1.0 if halved else 2.0) * (phi_2 / total - 0.5) / (r0 + r1) * (recent - before)
            elif past:
                weight = 0.5 * first if order == 2 and solver_type == "midpoint" else phi_2
                x = x + weight * h / steps[0] * (x0 - past[0])
            if eta:
                noise = trace.noise(interval=(sigma, sigma_next))
                x = x + s_noise * sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * noise
        past, steps = [kept, *past][: order - 1], [h, *steps][:2]
    trace.finish(x, *path.end())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPPMultistepSDE(Ancestral):
    """DPM-Solver++(2M) and (3M) for the SDE, with ``order`` 2 or 3; the third order is one at ``eta`` = 0, and with noise, where it
    cannot be, the gentler form of the authors' code."""

    order: int = 2
    solver_type: str = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (2, 3) or self.solver_type not in SOLVER_TYPES:
            raise ValueError(
                f"order must be 2 or 3 and solver_type one of {SOLVER_TYPES}, got {self.order} and {self.solver_type!r}"
            )

    def follow(self, trace: Trace, steps: int) -> None:
        dpmpp_multistep_sde(
            trace,
            self.sigma_path(steps),
            order=self.order,
            eta=self.eta,
            s_noise=self.s_noise,
            solver_type=self.solver_type,
            halved=self.eta > 0,
        )


def towards(x: Linear, x0: Linear, sigma: float, sigma_next: float) -> Linear:
    """From sigma to sigma_next along the line through x0: exact where x0 does not change."""
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * x0
