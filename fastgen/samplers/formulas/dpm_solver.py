r"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (Lu et al. 2022b), which integrate
exactly what is linear, over :math:`\lambda = \log(\alpha/\sigma)`.

"dpmsolver++" integrates the clean sample, "dpmsolver" the noise; the "sde-" forms are their stochastic counterparts. With
h the step in lambda and D_k the k-th divided difference of what is integrated, all orders are the one series
:math:`x' = A x + B_0 D_0 + B_1 D_1 + B_2 D_2 + S\varepsilon` whose coefficients :class:`Integrator` gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..path import Path, log_ratio
from ..trace import Linear, Trace
from .karras import ancestral_split, halfway

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


def multistep_order(
    i: int, steps: int, seen: int, order: int, lower_order_final: bool, euler_at_final: bool, ends_at_zero: bool
) -> int:
    """The order of step i: as many previous predictions as there are, less at the end of short trajectories."""
    short = lower_order_final and steps < 15
    if i == steps - 1 and (euler_at_final or short or ends_at_zero):
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
    euler_at_final: bool = False,
    ends_at_zero: bool = True,
    halved: bool = False,
    start: int = 0,
) -> None:
    """Multistep DPM-Solver(++) of order 1 to 3 (Lu et al. 2022b, algorithm 2); the third order is always the exact series.

    ``halved``: the third order as the authors' code has it, and after it diffusers and k-diffusion. It takes a divided difference
    for a derivative, which is twice that, and so converges with order 2 only.
    """
    x, past = None, []  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, m0 = integrand(trace, path, i, x, algorithm)
        k = multistep_order(i, len(path), len(past) + 1, order, lower_order_final, euler_at_final, ends_at_zero)
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
    start: int = 0,
) -> None:
    """Singlestep DPM-Solver(++): blocks of steps of order 1, 2, 3, each from where its block began (Lu et al. 2022b)."""
    x, past, base, begin = None, [], None, start  # type: ignore[var-annotated]
    for i in range(start, len(path)):
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


def dpmpp_2s_ancestral(trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0, start: int = 0) -> None:
    """DPM-Solver++(2S) down to sigma_down, then noise, in sigma space (k-diffusion)."""
    x = None
    for i in range(start, len(path)):
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


def towards(x: Linear, x0: Linear, sigma: float, sigma_next: float) -> Linear:
    """From sigma to sigma_next along the line through x0: exact where x0 does not change."""
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * x0


def dpmpp_sde(
    trace: Trace, path: Path, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, start: int = 0
) -> None:
    """DPM-Solver++ for the SDE, singlestep of two stages, in sigma space (k-diffusion)."""
    x = None
    for i in range(start, len(path)):
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


def dpmpp_multistep_sde(
    trace: Trace,
    path: Path,
    *,
    order: int = 2,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    halved: bool = False,
    start: int = 0,
) -> None:
    """DPM-Solver++(2M) and (3M) for the SDE with any eta, in sigma space (k-diffusion); at eta = 0 they are deterministic.

    ``halved``: see :func:`multistep`.
    """
    x, past, steps = None, [], []  # type: ignore[var-annotated]
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        kept = trace.keep(x0)
        sigma, sigma_next = path.sigmas[i], path.sigmas[i + 1]
        h = log_ratio(1.0, sigma_next) - log_ratio(1.0, sigma)
        if sigma_next == 0:
            x = x0
        else:
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


def dpm_fast(
    trace: Trace, sigma_max: float, sigma_min: float, nfe: int, *, eta: float = 0.0, s_noise: float = 1.0
) -> None:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4): ``nfe`` calls of the model in steps of order 3, and less at the end."""
    blocks = nfe // 3 + 1
    ends = [sigma_max ** (1 - i / blocks) * sigma_min ** (i / blocks) for i in range(blocks + 1)]
    orders = [3] * (blocks - 2) + [2, 1] if nfe % 3 == 0 else [3] * (blocks - 1) + [nfe % 3]
    x = None
    for i, order in enumerate(orders):
        sigma, sigma_next = ends[i], ends[i + 1]
        target = max(ancestral_split(sigma, sigma_next, eta)[0], sigma_min) if eta else sigma_next
        x = dpm_step(trace, x, i, sigma, target, order)[1]
        if eta:
            up = math.sqrt(max(sigma_next**2 - target**2, 0.0))
            x = x + s_noise * up * trace.noise(interval=(sigma, sigma_next))
    trace.finish(x)


def dpm_step(
    trace: Trace, x: Linear | None, timestep: float, sigma: float, sigma_next: float, order: int
) -> tuple[Linear, Linear]:
    """A step of DPM-Solver of order 1 to 3 in sigma space (Lu et al. 2022a, algorithms 1 and 2); (x as it stands, x')."""
    h, r1, r2 = math.log(sigma / sigma_next), (1 / 2 if order == 2 else 1 / 3), 2 / 3
    x, x0 = trace.call(x, timestep, 1.0, sigma)
    eps = (x - x0) / sigma
    first = x + (sigma_next - sigma) * eps
    if order == 1:
        return x, first
    kept_eps = trace.keep(eps)
    s1 = sigma * math.exp(-r1 * h)
    u1, x1 = trace.call(x + (s1 - sigma) * eps, timestep, 1.0, s1, between=True)
    change = (u1 - x1) / s1 - kept_eps
    first = x + (sigma_next - sigma) * kept_eps
    if order == 2:
        return x, first - sigma_next / (2 * r1) * math.expm1(h) * change
    s2 = sigma * math.exp(-r2 * h)
    ahead = x + (s2 - sigma) * kept_eps - s2 * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * change
    u2, x2 = trace.call(ahead, timestep, 1.0, s2, between=True)
    return x, first - sigma_next / r2 * (math.expm1(h) / h - 1) * ((u2 - x2) / s2 - kept_eps)
