"""k-diffusion's samplers by their own names and signatures, each step one kernel.

``model(x, sigma, **extra_args)`` predicts the clean sample from x = x0 + sigma eps, [N, *], and sigma [N]; ``sigmas`` [steps + 1]
go down to 0, or not quite. ``callback`` is called after each step's first call of the model with a dict of ``x``, ``i``, ``sigma``,
``sigma_hat`` and ``denoised``. k-diffusion need not be installed. The differences, all on purpose: ``BrownianTreeNoiseSampler`` is
fastgen's own tree (torchsde is not needed; other numbers for the same seed, and more steps follow the same path), and samplers draw
no noise where they use none, so that torch's generator is left alone.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adaptive import (
    Callback,
    ExtraArgs,
    Model,
    NoiseSampler,
    PIDStepSizeController,
    check_ends,
    default_noise_sampler,
    sample_dpm_adaptive,
)
from .brownian import BrownianTree
from .formulas import dpm_solver as _dpm
from .formulas import karras as _karras
from .path import Path
from .plan import Plan, compile_trace
from .prediction import Prediction
from .schedules import spaced_sigmas
from .trace import Symbol, Trace

__all__ = [
    "BrownianTreeNoiseSampler",
    "PIDStepSizeController",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]


def append_zero(x: Tensor) -> Tensor:
    """x [n] with a 0 after it."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], Karras et al. 2022, equation 5, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "karras", rho), device=device))


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """[n + 1], evenly in log sigma, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "exponential"), device=device))


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], a power of the even steps in log sigma, and a 0."""
    return append_zero(torch.tensor(spaced_sigmas(n, sigma_min, sigma_max, "polyexponential", rho), device=device))


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1], the continuous VP schedule, and a 0."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def get_ancestral_step(sigma_from: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up)."""
    return _karras.ancestral_split(float(sigma_from), float(sigma_to), eta)


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The derivative dx / dsigma, [N, *]; sigma [N] or a scalar."""
    return (x - denoised) / torch.as_tensor(sigma, device=x.device).reshape(-1, *([1] * (x.dim() - 1)))


class BrownianTreeNoiseSampler:
    """``f(sigma, sigma_next)``: noise of one Brownian path a seed; see :class:`fastgen.samplers.BrownianTree`.

    Args:
        x: [N, *], whose shape, dtype and device the noise has.
        sigma_min, sigma_max: the ends.
        seed: one, from which sample n takes seed + n, or one a sample; drawn by torch where None.
    """

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seed: int | Sequence[int] | None = None) -> None:
        self.tree = BrownianTree.like(x, float(sigma_min), float(sigma_max), seed)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        return self.tree(sigma, sigma_next)


# ---- running a formula ----------------------------------------------------------------------------------------------------


def _run(
    formula: Callable[..., None],
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    **options: Any,
) -> Tensor:
    """Trace ``formula`` over ``sigmas`` and follow it."""
    levels = _checked(sigmas)
    plan = _planned(formula, tuple(levels), tuple(options.items()))
    churn = options.get("churn", _karras.NO_CHURN)
    unused = set()
    if churn.s_churn > 0:  # steps whose noise k-diffusion draws and leaves
        unused = {i for i, s in enumerate(levels[:-1]) if churn.sigma_hat(s, len(levels)) == s}
    return _follow(plan, model, x, len(levels) - 1, extra_args, callback, disable, noise_sampler, sigmas, unused)


def _checked(sigmas: Tensor) -> list[float]:
    """The levels on the host; the one wait for the device."""
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be a tensor of at least two levels, got {sigmas!r}")
    levels = sigmas.detach().double().tolist()
    if any(b >= a for a, b in itertools.pairwise(levels)) or levels[-1] < 0:
        raise ValueError(f"sigmas must go down, to 0 or above, got {levels}")
    return levels


@functools.lru_cache(maxsize=64)
def _planned(formula: Callable[..., None], levels: tuple[float, ...], options: tuple[tuple[str, Any], ...]) -> Plan:
    trace = Trace(Prediction(prediction_type="sample"), scale_inputs=False)
    formula(trace, Path(levels[:-1], [1.0] * len(levels), levels, float), **dict(options))
    return compile_trace(trace)


@torch.no_grad()
def _follow(
    plan: Plan,
    model: Model,
    x: Tensor,
    steps: int,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
    sigmas: Tensor | None = None,
    unused_noise: AbstractSet[int] = frozenset(),
) -> Tensor:
    plan = plan.to(x.device, x.dtype)
    kwargs = dict(extra_args or {})
    at = torch.tensor([stage.sigma for stage in plan.stages], dtype=x.dtype, device=x.device)
    history: dict[Symbol, Tensor] = {}
    step = -1
    with tqdm(total=steps, disable=disable) as bar:
        for j, stage in enumerate(plan.stages):
            denoised = x
            if stage.calls_model:
                if not stage.between and step + 1 in unused_noise:
                    torch.randn_like(x)
                denoised = model(x, at[j].expand(len(x)), **kwargs)
                if not stage.between:
                    step += 1
                    bar.update()
                    if callback is not None:
                        sigma = at[j] if sigmas is None else sigmas[step]
                        callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": at[j], "denoised": denoised})
            noise = None
            if plan.draws_noise[j]:
                if noise_sampler is None or stage.interval is None:
                    noise = torch.randn_like(x)
                else:
                    noise = noise_sampler(*(x.new_tensor(s) for s in stage.interval))
            x = plan.advance(denoised, j, x, history, noise)
    return x


def _tree(x: Tensor, sigmas: Tensor, noise_sampler: NoiseSampler | None) -> NoiseSampler:
    if noise_sampler is not None:
        return noise_sampler
    return BrownianTreeNoiseSampler(x, float(sigmas[sigmas > 0].min()), float(sigmas.max()))


# ---- the samplers ---------------------------------------------------------------------------------------------------------


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction)."""
    return _run(
        _karras.euler, model, x, sigmas, extra_args, callback, disable, None,
        churn=_karras.Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Euler's method with ancestral noise."""
    return _run(
        _karras.euler_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun's method (Karras et al. 2022, algorithm 2)."""
    return _run(
        _karras.heun, model, x, sigmas, extra_args, callback, disable, None,
        churn=_karras.Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """The midpoint method in log sigma."""
    return _run(
        _karras.dpm_2, model, x, sigmas, extra_args, callback, disable, None,
        churn=_karras.Churn(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """`sample_dpm_2` with ancestral noise."""
    return _run(
        _karras.dpm_2_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep of ``order`` derivatives; the weights are exact, not integrated numerically."""
    return _run(_karras.lms, model, x, sigmas, extra_args, callback, disable, None, order=order)


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with ancestral noise."""
    return _run(
        _dpm.dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 1 / 2,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE, two calls a step."""
    noise_sampler = _tree(x, sigmas, noise_sampler)
    return _run(
        _dpm.dpmpp_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=eta, s_noise=s_noise, r=r
    )


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M)."""
    return _run(_dpmpp_2m, model, x, sigmas, extra_args, callback, disable, None)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE; ``solver_type`` ``"midpoint"`` or ``"heun"``."""
    if solver_type not in _dpm.SOLVER_TYPES:
        raise ValueError(f"solver_type must be one of {_dpm.SOLVER_TYPES}, got {solver_type!r}")
    noise_sampler = _tree(x, sigmas, noise_sampler)
    return _run(
        _dpm.dpmpp_multistep_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, solver_type=solver_type,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, callback: Callback | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) for the SDE."""
    noise_sampler = _tree(x, sigmas, noise_sampler)
    return _run(
        _dpm.dpmpp_multistep_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        order=3, halved=True, eta=eta, s_noise=s_noise,
    )  # fmt: skip


def _dpmpp_2m(trace: Trace, path: Path) -> None:
    _dpm.multistep(trace, path, lower_order_final=False, ends_at_zero=path.sigmas[-1] == 0)


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (Lu et al. 2022a): ``n`` calls of the model."""
    check_ends(sigma_min, sigma_max)
    trace = Trace(Prediction(prediction_type="sample"), scale_inputs=False)
    _dpm.dpm_fast(trace, float(sigma_max), float(sigma_min), n, eta=eta, s_noise=s_noise)
    return _follow(compile_trace(trace), model, x, n // 3 + 1, extra_args, callback, disable, noise_sampler)
