"""The other solvers by name, each a schedule and one of the formulas; `DDPM` and `DDIM` have files of their own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .ddim import DDIM
from .ddpm import DDPM
from .formulas import consistency as _consistency
from .formulas import ddim as _ddim
from .formulas import ddpm as _ddpm
from .formulas import dpm_solver as _dpm
from .formulas import karras as _karras
from .formulas import multistep as _multistep
from .path import Path
from .prediction import Prediction
from .schedules import timestep_spacing
from .solver import DiscreteSolver, EDMSolver, FlowSolver, SigmaSolver, Solver
from .trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class _Churned(SigmaSolver):
    """Arguments of Karras et al. 2022, algorithm 2, beside those of :class:`SigmaSolver`: ``s_churn``, ``s_tmin``, ``s_tmax``,
    ``s_noise``."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def churn(self) -> _karras.Churn:
        return _karras.Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class Euler(_Churned):
    """Euler's method in sigma space, with the churn of Karras et al. 2022; without it the same steps as `DDIM`."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.euler(trace, self.sigma_path(steps), churn=self.churn())


@dataclass(frozen=True, kw_only=True, eq=False)
class Heun(_Churned):
    """Heun's method (Karras et al. 2022, algorithm 2), of order 2 with two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.heun(trace, self.sigma_path(steps), churn=self.churn())


@dataclass(frozen=True, kw_only=True, eq=False)
class DPM2(_Churned):
    """The midpoint method in log sigma (KDPM2), of order 2 with two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.dpm_2(trace, self.sigma_path(steps), churn=self.churn())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stochastic(SigmaSolver):
    """Arguments of the stochastic solvers beside those of :class:`SigmaSolver`: ``eta`` (0 is deterministic) and ``s_noise``."""

    eta: float = 1.0
    s_noise: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class EulerAncestral(_Stochastic):
    """Euler's method down to sigma_down, then noise."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.euler_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class DPM2Ancestral(_Stochastic):
    """`DPM2` down to sigma_down, then noise."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.dpm_2_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class LMS(SigmaSolver):
    """Linear multistep of ``order`` derivatives."""

    order: int = 4

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.lms(trace, self.sigma_path(steps), order=self.order)


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
            ("algorithm", _dpm.ALGORITHMS),
            ("solver_type", _dpm.SOLVER_TYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not self.algorithm.endswith("++") and self.final_sigma == "zero":
            raise ValueError(f"algorithm {self.algorithm!r} needs final_sigma='min': it integrates up to log sigma")

    def follow(self, trace: Trace, steps: int) -> None:
        zero = self.final_sigma == "zero"
        path = self.vp_path(steps)
        if self.singlestep:
            orders = _dpm.singlestep_orders(steps, self.order, self.lower_order_final or steps % self.order != 0, zero)
            _dpm.singlestep(trace, path, orders, algorithm=self.algorithm, solver_type=self.solver_type)
        else:
            _dpm.multistep(
                trace, path, order=self.order, algorithm=self.algorithm, solver_type=self.solver_type,
                lower_order_final=self.lower_order_final, ends_at_zero=zero,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPP2SAncestral(_Stochastic):
    """DPM-Solver++(2S) with ancestral noise, two calls a step."""

    def follow(self, trace: Trace, steps: int) -> None:
        _dpm.dpmpp_2s_ancestral(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPPSDE(_Stochastic):
    """DPM-Solver++ for the SDE, two calls a step, ``r`` of the way to the next sigma."""

    r: float = 0.5

    def follow(self, trace: Trace, steps: int) -> None:
        _dpm.dpmpp_sde(trace, self.sigma_path(steps), eta=self.eta, s_noise=self.s_noise, r=self.r)


@dataclass(frozen=True, kw_only=True, eq=False)
class DPMSolverPPMultistepSDE(_Stochastic):
    """DPM-Solver++(2M) and (3M) for the SDE, with ``order`` 2 or 3; the third order is one at ``eta`` = 0, and with noise, where it
    cannot be, the gentler form of the authors' code."""

    order: int = 2
    solver_type: str = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (2, 3) or self.solver_type not in _dpm.SOLVER_TYPES:
            raise ValueError(
                f"order must be 2 or 3 and solver_type one of {_dpm.SOLVER_TYPES}, got {self.order} and {self.solver_type!r}"
            )

    def follow(self, trace: Trace, steps: int) -> None:
        _dpm.dpmpp_multistep_sde(
            trace,
            self.sigma_path(steps),
            order=self.order,
            eta=self.eta,
            s_noise=self.s_noise,
            solver_type=self.solver_type,
            halved=self.eta > 0,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DEIS(SigmaSolver):
    """tAB-DEIS in log rho of ``order`` 1 to 3 (Zhang and Chen 2023)."""

    order: int = 2
    final_sigma: str = "min"
    lower_order_final: bool = True

    def follow(self, trace: Trace, steps: int) -> None:
        _multistep.deis(trace, self.vp_path(steps), order=self.order, lower_order_final=self.lower_order_final)


@dataclass(frozen=True, kw_only=True, eq=False)
class UniPC(SigmaSolver):
    """UniPC of any ``order`` (Zhao et al. 2023); ``solver_type`` "bh1" or "bh2"."""

    order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True

    def follow(self, trace: Trace, steps: int) -> None:
        _multistep.unipc(
            trace,
            self.vp_path(steps),
            order=self.order,
            solver_type=self.solver_type,
            lower_order_final=self.lower_order_final,
        )


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
        _multistep.sa_solver(trace, self.vp_path(steps), tau, **orders)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class PNDM(DiscreteSolver):
    """Pseudo numerical methods (Liu et al. 2022), without Runge-Kutta steps unless ``warm_up``; not clipped."""

    clip_sample: bool = False
    warm_up: bool = False

    def follow(self, trace: Trace, steps: int) -> None:
        stride, times = self.num_train_timesteps // steps, self.trajectory(steps)
        levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in self.alpha_bars()]
        if self.prediction_type == "sample":
            raise ValueError("prediction_type must be 'epsilon' or 'v_prediction' for PNDM, got 'sample'")

        def marginal(t: int) -> tuple[float, float]:
            return levels[max(t, 0)]

        if not self.warm_up:
            _multistep.pndm_plms(trace, [times[0], *times[1:2], *times[1:]], marginal, stride)
            return
        if steps < 4:
            raise ValueError(f"steps must be at least 4 with warm_up=True, got {steps}")
        half = stride // 2
        stages = [s for i in range(3) for s in (times[i], times[i] - half, times[i] - half, times[i + 1])]
        _multistep.pndm_prk(trace, stages, times[3:], marginal, stride)


@dataclass(frozen=True, kw_only=True, eq=False)
class RePaint(DiscreteSolver):
    """RePaint (Lugmayr et al. 2022): inpainting that goes back up ``jump_length`` steps, ``jump_n_sample`` - 1 times each, to
    make the drawn part agree with the known one; give ``known`` and ``mask`` to `sample`. ``eta`` as in :class:`DDIM`."""

    eta: float = 1.0
    jump_length: int = 10
    jump_n_sample: int = 10

    def follow(self, trace: Trace, steps: int) -> None:
        stride = self.num_train_timesteps // steps if isinstance(steps, int) and steps > 0 else 1
        timestep_spacing(self.num_train_timesteps, steps)  # checks steps
        levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in self.alpha_bars()]
        times = [t * stride for t in jumping_timesteps(steps, self.jump_length, self.jump_n_sample)]
        _ddpm.repaint(trace, times, lambda t: levels[t] if t >= 0 else (1.0, 0.0), stride, eta=self.eta)


def jumping_timesteps(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """RePaint's way from ``steps`` - 1 to 0: before every ``jump_length`` steps it goes up as many, some times over."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    values, t = [], steps
    while t >= 1:
        t -= 1
        values.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            values += range(t + 1, t + jump_length + 1)
            t += jump_length
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class LCM(DiscreteSolver):
    """Latent consistency models (Luo et al. 2023), distilled on ``original_steps`` timesteps; not clipped."""

    clip_sample: bool = False
    original_steps: int = 50
    timestep_scaling: float = 10.0

    def path(self, steps: int) -> Path:
        """``steps`` of the timesteps of the distillation, evenly chosen."""
        _require(1 <= steps <= self.original_steps, f"steps must be in [1, {self.original_steps}], got {steps}")
        stride = self.num_train_timesteps // self.original_steps
        origin = [stride * (i + 1) - 1 for i in reversed(range(self.original_steps))]
        times = [origin[i * self.original_steps // steps] for i in range(steps)]
        levels = [self.marginal(t) for t in [*times, -1]]
        return Path(times, [a for a, _ in levels], [s for _, s in levels])

    def follow(self, trace: Trace, steps: int) -> None:
        _ddim.lcm(trace, self.path(steps), timestep_scaling=self.timestep_scaling)


@dataclass(frozen=True, kw_only=True, eq=False)
class TCD(LCM):
    """Trajectory consistency distillation (Zheng et al. 2024); ``eta`` is the gamma of the paper."""

    eta: float = 0.3

    def follow(self, trace: Trace, steps: int) -> None:
        path = self.path(steps)
        between = [self.marginal(int((1 - self.eta) * t)) for t in [*path.timesteps[1:], 0]]
        _ddim.tcd(trace, path, between, eta=self.eta)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowEuler(FlowSolver):
    """Euler's method on dx/dsigma = v; ``stochastic`` goes to the clean sample and back up with fresh noise."""

    stochastic: bool = False

    def follow(self, trace: Trace, steps: int) -> None:
        _consistency.flow_euler(trace, self.flow_path(steps), stochastic=self.stochastic)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowHeun(FlowSolver):
    """Heun's method on dx/dsigma = v, two calls a step and one for the last."""

    def follow(self, trace: Trace, steps: int) -> None:
        _consistency.flow_heun(trace, self.flow_path(steps))


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMEuler(EDMSolver):
    """Euler's method for preconditioned models."""

    def follow(self, trace: Trace, steps: int) -> None:
        _karras.euler(trace, self.sigma_path(steps))


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMHeun(EDMSolver):
    """Heun's method for preconditioned models, the sampler of Karras et al. 2022."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def follow(self, trace: Trace, steps: int) -> None:
        churn = _karras.Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)
        _karras.heun(trace, self.sigma_path(steps), churn=churn)


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMDPMSolverPP(EDMSolver):
    """DPM-Solver++ for preconditioned models."""

    order: int = 2

    def follow(self, trace: Trace, steps: int) -> None:
        _dpm.multistep(trace, self.sigma_path(steps), order=self.order)


@dataclass(frozen=True, kw_only=True, eq=False)
class Consistency(EDMSolver):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1)."""

    clip_sample: bool = True

    def prediction(self) -> Prediction:
        return Prediction(sigma_data=self.sigma_data, sigma_min=self.sigma_min, clip=1.0 if self.clip_sample else None)

    def follow(self, trace: Trace, steps: int) -> None:
        _consistency.consistency(trace, self.sigma_path(steps), sigma_min=self.sigma_min, sigma_max=self.sigma_max)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpm_2": DPM2,
    "dpm_2_ancestral": DPM2Ancestral,
    "lms": LMS,
    "pndm": PNDM,
    "repaint": RePaint,
    "dpmpp_1": lambda **kw: DPMSolverPP(order=1, **kw),
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_3m": lambda **kw: DPMSolverPP(order=3, **kw),
    "dpmpp_2s": lambda **kw: DPMSolverPP(singlestep=True, **kw),
    "dpmpp_3s": lambda **kw: DPMSolverPP(order=3, singlestep=True, **kw),
    "dpmpp_2s_ancestral": DPMSolverPP2SAncestral,
    "dpmpp_sde": DPMSolverPPSDE,
    "dpmpp_2m_sde": DPMSolverPPMultistepSDE,
    "dpmpp_3m_sde": lambda **kw: DPMSolverPPMultistepSDE(order=3, **kw),
    "deis": DEIS,
    "unipc": UniPC,
    "sa_solver": SASolver,
    "lcm": LCM,
    "tcd": TCD,
    "flow_euler": FlowEuler,
    "flow_heun": FlowHeun,
    "edm_euler": EDMEuler,
    "edm_heun": EDMHeun,
    "edm_dpmpp_2m": EDMDPMSolverPP,
    "consistency": Consistency,
}


def make_solver(name: str, **arguments: object) -> Solver:
    """A solver by its name in :data:`SOLVERS`, with the arguments of its class."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {name!r}")
    return SOLVERS[name](**arguments)
