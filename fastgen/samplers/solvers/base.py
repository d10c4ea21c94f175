"""What all solvers share: the schedule they are built on, and how their formula becomes a `Plan`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..engine.compile import compile_trace
from ..engine.path import Path
from ..engine.plan import Plan
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..guidance.base import Call
from ..schedules import SIGMA_SPACINGS, alphas_cumprod, check_steps, linear_betas, spaced_sigmas, timestep_spacing


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors inside have no single truth value to compare by
class Solver(ABC):
    """A sampler: a schedule, a parameterisation of the model, and a formula."""

    @abstractmethod
    def prediction(self) -> Prediction:
        """What the model predicts, and how that is clipped."""

    @abstractmethod
    def follow(self, trace: Trace, steps: int) -> None:
        """Trace a trajectory of ``steps`` steps."""

    def learns_variance(self) -> bool:
        """Whether the model's output has a second half of channels, the variance."""
        return False

    def plan(self, steps: int, *, guidance_scale: float | Callable[[Call], float] = 1.0) -> Plan:
        """Work out a trajectory of ``steps`` steps.

        Args:
            steps: as many as the schedule allows; a step of a solver of order 2 calls the model twice.
            guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond), applied where ``uncond`` is given; one
                number, or one for each call of the model.

        Raises:
            TypeError: ``steps`` is no integer.
            ValueError: ``steps`` is out of range.
        """
        trace = Trace(self.prediction())
        self.follow(trace, check_steps(steps))
        scales: float | list[float]
        if callable(guidance_scale):
            scales = [guidance_scale(call) for call in compile_trace(trace).calls()]
        else:
            scales = guidance_scale
        return compile_trace(trace, guidance_scales=scales, learned_variance=self.learns_variance())


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscreteSolver(Solver):
    """Base of the solvers on a schedule of betas.

    Args:
        betas: [T] float64, see :mod:`fastgen.samplers.schedules`; above 0 at the first timestep, 1 at most at the last.
        prediction_type: what the model predicts: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        clip_sample: clip the predicted clean sample to +- ``clip_sample_range``.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"``.
        steps_offset: added to the timesteps of ``"leading"``.
        thresholding: clip at a quantile of each sample's own values instead (dynamic thresholding, Saharia et al. 2022).
        dynamic_thresholding_ratio: that quantile.
        sample_max_value: the largest bound it may choose.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    betas: Tensor = field(default_factory=linear_betas)
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        if self.betas.dim() != 1 or not ((self.betas >= 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be [T] within [0, 1], got shape {tuple(self.betas.shape)}")
        alpha_bars = self.alpha_bars()
        if alpha_bars[:1] == [1.0]:
            raise ValueError("betas must begin above 0: at alpha_bar = 1 there is no noise to predict")
        if 0.0 in alpha_bars[:-1]:
            raise ValueError(f"betas lead to alpha_bar = 0 at timestep {alpha_bars.index(0.0)}; only the last may be 0")
        if not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {self.clip_sample_range}")
        if self.prediction_type == "flow_prediction":
            raise ValueError("prediction_type 'flow_prediction' is for FlowEuler and FlowHeun")
        self.prediction()

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    def prediction(self) -> Prediction:
        return Prediction(
            prediction_type=self.prediction_type,
            clip=self.clip_sample_range if self.clip_sample and not self.thresholding else None,
            threshold_ratio=self.dynamic_thresholding_ratio if self.thresholding else None,
            sample_max_value=self.sample_max_value,
        )

    def alpha_bars(self) -> list[float]:
        """The cumulative products of 1 - beta, as Python floats."""
        return alphas_cumprod(self.betas).tolist()

    def marginal(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) at timestep t; below 0 the clean sample."""
        bar = self.alpha_bars()[t] if t >= 0 else 1.0
        return math.sqrt(bar), math.sqrt(1 - bar)

    def trajectory(self, steps: int) -> list[int]:
        """The timesteps of ``steps`` steps; raises ValueError where an offset leads out of the schedule."""
        timesteps = timestep_spacing(self.num_train_timesteps, steps, self.timestep_spacing, self.steps_offset)
        if timesteps[0] >= self.num_train_timesteps or timesteps[-1] < 0:
            raise ValueError(
                f"steps_offset={self.steps_offset} leads to timesteps {timesteps[-1]} to {timesteps[0]}, "
                f"the schedule has {self.num_train_timesteps}"
            )
        return timesteps


@dataclass(frozen=True, kw_only=True, eq=False)
class SigmaSolver(DiscreteSolver):
    """Base of the solvers that choose their noise levels by sigma = sqrt((1 - alpha_bar) / alpha_bar).

    Args:
        sigma_spacing: ``"timesteps"``, those of ``timestep_spacing``; or between the ends of the schedule ``"karras"``,
            ``"exponential"``, ``"polyexponential"``, ``"beta"`` (needs scipy) or ``"lu"`` (evenly in log sigma).
        rho: the exponent of ``"karras"`` (7 where None) and ``"polyexponential"`` (1).
        sigma_min, sigma_max: the ends; those of the schedule where None.
        final_sigma: ``"zero"``, the clean sample, or ``"min"``, the first timestep of the schedule.

    The other arguments are those of :class:`DiscreteSolver`; here nothing is clipped unless asked for, and timesteps are spaced
    from one end of the schedule to the other.
    """

    clip_sample: bool = False
    timestep_spacing: str = "linspace"
    sigma_spacing: str = "timesteps"
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigma: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_spacing not in ("timesteps", *SIGMA_SPACINGS):
            raise ValueError(
                f"sigma_spacing must be one of {('timesteps', *SIGMA_SPACINGS)}, got {self.sigma_spacing!r}"
            )
        if self.final_sigma not in ("zero", "min"):
            raise ValueError(f"final_sigma must be 'zero' or 'min', got {self.final_sigma!r}")

    def train_sigmas(self) -> np.ndarray:
        """[T] float64, finite: where the last alpha_bar is 0, it counts as 2^-24."""
        bars = np.maximum(np.array(self.alpha_bars()), 2.0**-24)
        return np.sqrt((1 - bars) / bars)

    def sigmas(self, steps: int) -> tuple[list[float], list[float]]:
        """(timesteps, sigmas) of a trajectory, and what it ends in."""
        train = self.train_sigmas()
        last = float(train[0]) if self.final_sigma == "min" else 0.0
        if self.sigma_spacing == "timesteps":
            at = self._spaced(steps)
            return at, self._ending(np.interp(at, np.arange(len(train)), train).tolist(), last)
        timestep_spacing(self.num_train_timesteps, min(steps, self.num_train_timesteps))  # checks steps
        low = float(train[0]) if self.sigma_min is None else self.sigma_min
        high = float(train[-1]) if self.sigma_max is None else self.sigma_max
        levels = spaced_sigmas(steps, low, high, self.sigma_spacing, self.rho)
        return [self.timestep_at(s) for s in levels], self._ending(levels, last)

    def _ending(self, levels: list[float], last: float) -> list[float]:
        if not levels[0] > last * (1 + 1e-9):  # Karras' levels are rounded
            raise ValueError(
                f"final_sigma={self.final_sigma!r} is {last:.6g}, where the trajectory begins: it leads nowhere"
            )
        return [*levels, last]

    def _spaced(self, steps: int) -> list[float]:
        """The timesteps; at ``"min"`` the trajectory ends in the first timestep, so that is not one of them."""
        if self.final_sigma == "min" and self.timestep_spacing == "linspace":
            return [float(t) for t in self.trajectory(steps + 1)[:-1]]
        return [float(t) for t in self.trajectory(steps)]

    def timestep_at(self, sigma: float) -> float:
        """The (fractional) timestep of a sigma, by interpolation in log sigma."""
        train = self.train_sigmas()
        return float(np.interp(math.log(max(sigma, 1e-10)), np.log(train), np.arange(len(train))))

    def sigma_path(self, steps: int) -> Path:
        """x = x0 + sigma eps."""
        timesteps, sigmas = self.sigmas(steps)
        return Path(timesteps, [1.0] * len(sigmas), sigmas, self._cached_timestep_at())

    def _cached_timestep_at(self) -> Callable[[float], float]:
        logs = np.log(self.train_sigmas())
        places = np.arange(len(logs))
        return lambda sigma: float(np.interp(math.log(max(sigma, 1e-10)), logs, places))

    def vp_path(self, steps: int) -> Path:
        """x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1."""
        timesteps, sigmas = self.sigmas(steps)
        norms = [math.hypot(1.0, s) for s in sigmas]
        return Path(timesteps, [1 / n for n in norms], [s / n for s, n in zip(sigmas, norms, strict=True)])
