"""k-diffusion's samplers with a table known beforehand, each a formula of `fastgen.samplers.solvers` and its arguments."""

import math

from torch import Tensor

from ..engine.compile import compile_trace
from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Linear, Trace
from ..solvers.dpm_2 import dpm_2, dpm_2_ancestral
from ..solvers.dpm_solver import SOLVER_TYPES, multistep
from ..solvers.dpm_solver_sde import dpmpp_2s_ancestral, dpmpp_multistep_sde, dpmpp_sde
from ..solvers.euler import euler, euler_ancestral
from ..solvers.heun import heun
from ..solvers.lms import lms
from ..solvers.stochastic import Churn, ancestral_split
from .running import Callback, ExtraArgs, Model, NoiseSampler, brownian_unless_given, check_ends, follow, run


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction)."""
    return run(
        euler, model, x, sigmas, extra_args, callback, disable, None,
        churn=Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Euler's method with ancestral noise."""
    return run(
        euler_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun's method (Karras et al. 2022, algorithm 2)."""
    return run(
        heun, model, x, sigmas, extra_args, callback, disable, None,
        churn=Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """The midpoint method in log sigma."""
    return run(
        dpm_2, model, x, sigmas, extra_args, callback, disable, None,
        churn=Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """`sample_dpm_2` with ancestral noise."""
    return run(
        dpm_2_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep of ``order`` derivatives; the weights are exact, not integrated numerically."""
    return run(lms, model, x, sigmas, extra_args, callback, disable, None, order=order)


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with ancestral noise."""
    return run(
        dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 1 / 2,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE, two calls a step."""
    noise_sampler = brownian_unless_given(x, sigmas, noise_sampler)
    return run(dpmpp_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=eta, s_noise=s_noise, r=r)


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M)."""
    return run(_dpmpp_2m, model, x, sigmas, extra_args, callback, disable, None)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE; ``solver_type`` ``"midpoint"`` or ``"heun"``."""
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type must be one of {SOLVER_TYPES}, got {solver_type!r}")
    noise_sampler = brownian_unless_given(x, sigmas, noise_sampler)
    return run(
        dpmpp_multistep_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, solver_type=solver_type,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) for the SDE."""
    noise_sampler = brownian_unless_given(x, sigmas, noise_sampler)
    return run(
        dpmpp_multistep_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        order=3, halved=True, eta=eta, s_noise=s_noise,
    )  # fmt: skip


def _dpmpp_2m(trace: Trace, path: Path) -> None:
    multistep(trace, path, lower_order_final=False, ends_at_zero=path.sigmas[-1] == 0)


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (Lu et al. 2022a): ``n`` calls of the model."""
    check_ends(sigma_min, sigma_max)
    trace = Trace(Prediction(prediction_type="sample"), scale_inputs=False)
    dpm_fast(trace, float(sigma_max), float(sigma_min), n, eta=eta, s_noise=s_noise)
    return follow(compile_trace(trace), model, x, n // 3 + 1, extra_args, callback, disable, noise_sampler)


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
