"""Stand-ins for preconditioned models (Karras et al. 2022): EDM, cosine DPM-Solver++ and consistency models."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..solvers.consistency import consistency
from ..solvers.dpm_solver import SOLVER_TYPES, multistep
from ..solvers.stochastic import Churn
from .discrete import THRESHOLDING
from .dpm_solver import DPM_SYNONYMS
from .karras import _euler_churned_after, _positive
from .multistep import FINAL_SIGMAS, check_choice
from .scheduler import _NO_OPTIONS, Scheduler, Timestep, require_float_timestep, to_timesteps

EDM: dict[str, Any] = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rho": 7.0,
}  # fmt: skip
SIGMA_SCHEDULES = ("karras", "exponential")


class PreconditionedScheduler(Scheduler):
    """Base: x = x0 + sigma eps, c_in, c_skip, c_out and c_noise of sigma_data."""

    def _setup(self) -> None:
        check_choice(self.config, "sigma_schedule", SIGMA_SCHEDULES)
        check_choice(self.config, "final_sigmas_type", FINAL_SIGMAS)
        self.is_scale_input_called = False
        self._set_sigmas(self._schedule(torch.linspace(0, 1, self.config["num_train_timesteps"])), None, 0.0)

    @property
    def init_noise_sigma(self) -> float:
        return math.sqrt(self.config["sigma_max"] ** 2 + 1)

    def _schedule(self, ramp: Tensor) -> Tensor:
        low, high, rho = self.config["sigma_min"], self.config["sigma_max"], self.config["rho"]
        if self.config["sigma_schedule"] == "karras":
            return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)

    def precondition_noise(self, sigma: Tensor) -> Tensor:
        """c_noise, the timestep of a sigma."""
        return 0.25 * torch.log(sigma)

    def _set_sigmas(self, sigmas: Tensor, device: Any, last: float) -> None:
        sigmas = sigmas.to(torch.float32)
        self.timesteps = self.precondition_noise(sigmas).to(device)
        self.sigmas = torch.cat([sigmas, torch.tensor([last], dtype=torch.float32)])
        self._restart()

    def _prediction(self) -> Prediction:
        config = self.config
        return Prediction(
            prediction_type=config["prediction_type"],
            sigma_data=config["sigma_data"],
            threshold_ratio=config["dynamic_thresholding_ratio"] if config.get("thresholding") else None,
            sample_max_value=config.get("sample_max_value", 1.0),
        )

    def _path(self) -> Path:
        levels = self.sigmas.double().tolist()
        return Path(self._values, [1.0] * len(levels), levels)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:  # type: ignore[override]
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        sigma = float(self.sigmas[self._step_index])
        return sample * self._prediction().input_scale(1.0, sigma)

    def _marginals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        sigma = self.sigmas[indices].double()
        return torch.ones_like(sigma), sigma


class EDMEulerScheduler(PreconditionedScheduler):
    """Euler's method for EDM models."""

    defaults: ClassVar[dict[str, Any]] = {**EDM, "final_sigmas_type": "zero"}
    second_output = "pred_original_sample"
    needs_set_timesteps = False

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Tensor | Sequence[float] | None = None
    ) -> None:
        """``sigmas`` are, as in diffusers, points of the ramp in [0, 1] that the schedule is evaluated at."""
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("give num_inference_steps or sigmas, and not both")
        if sigmas is None:
            ramp = torch.linspace(0, 1, _positive(num_inference_steps), dtype=torch.float64)
        else:
            ramp = torch.as_tensor(sigmas, dtype=torch.float64)
        self.num_inference_steps = len(ramp)
        levels = self._schedule(ramp).to(torch.float32)
        self._set_sigmas(levels, device, float(levels[-1]) if self.config["final_sigmas_type"] == "sigma_min" else 0.0)

    def _trace(self, trace: Trace, start: int, **churn: float) -> None:  # type: ignore[override]
        _euler_churned_after(trace, self._path(), Churn(**churn), start)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        require_float_timestep(type(self), timestep)
        return self._advance(
            model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict,
            options={"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise} if s_churn else _NO_OPTIONS,
        )  # fmt: skip


class EDMDPMSolverMultistepScheduler(PreconditionedScheduler):
    """DPM-Solver++ for EDM models, order 1 to 3; the third order of the SDE form is there too (diffusers' ignores its noise)."""

    defaults: ClassVar[dict[str, Any]] = {
        **EDM, "solver_order": 2, **THRESHOLDING, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
        "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero",
    }  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.defaults, args, strict=False)) | kwargs
        for name, meanings in DPM_SYNONYMS.items():
            if given.get(name) in meanings:
                given[name] = meanings[given[name]]
        super().__init__(**given)

    def _setup(self) -> None:
        if "algorithm_type" in self.config:
            check_choice(self.config, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
        check_choice(self.config, "solver_type", SOLVER_TYPES)
        super()._setup()

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = _positive(num_inference_steps)
        levels = self._schedule(torch.linspace(0, 1, num_inference_steps))
        last = self.config["sigma_min"] if self.config["final_sigmas_type"] == "sigma_min" else 0.0
        self._set_sigmas(levels, device, last)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        config = self.config
        multistep(
            trace, self._path(), order=config["solver_order"], algorithm=config.get("algorithm_type", "sde-dpmsolver++"),
            solver_type=config["solver_type"], lower_order_final=config["lower_order_final"],
            euler_at_final=config["euler_at_final"], ends_at_zero=config["final_sigmas_type"] == "zero", halved=True, start=start,
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ with the cosine time of Stable Audio; noise of a Brownian path, see `DPMSolverSDEScheduler`."""

    defaults: ClassVar[dict[str, Any]] = {
        "sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0, "sigma_schedule": "exponential", "num_train_timesteps": 1000,
        "solver_order": 2, "prediction_type": "v_prediction", "rho": 7.0, "solver_type": "midpoint", "lower_order_final": True,
        "euler_at_final": False, "final_sigmas_type": "zero",
    }  # fmt: skip

    def _setup(self) -> None:
        self.noise_sampler: Callable[[Any, Any], Tensor] | None = None
        super()._setup()

    def precondition_noise(self, sigma: Tensor) -> Tensor:
        return sigma.atan() / math.pi * 2

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.noise_sampler = None
        super().set_timesteps(num_inference_steps, device)

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index or 0
        noise = None
        if index + 1 < len(self.sigmas):
            if self.noise_sampler is None:
                from ..engine.brownian import BrownianTree

                listed = [generator] if isinstance(generator, torch.Generator) else generator
                seeds = [g.initial_seed() for g in listed] if listed is not None else None
                low, high = self.config["sigma_min"], self.config["sigma_max"]
                self.noise_sampler = BrownianTree.like(
                    sample, low, high, seeds[0] if seeds and len(seeds) == 1 else seeds
                )
            ahead = self.sigmas[index + 1]
            noise = self.noise_sampler(self.sigmas[index], ahead) if ahead > 0 else torch.zeros_like(sample)
        return self._advance(model_output, timestep, sample, noise=noise, return_dict=return_dict)


class CMStochasticIterativeScheduler(PreconditionedScheduler):
    """Multistep sampling of consistency models (Song et al. 2023, algorithm 1)."""

    defaults: ClassVar[dict[str, Any]] = {
        "num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "s_noise": 1.0, "rho": 7.0,
        "clip_denoised": True,
    }  # fmt: skip
    needs_set_timesteps = False

    @property
    def init_noise_sigma(self) -> float:
        return float(self.config["sigma_max"])

    def _setup(self) -> None:
        self.is_scale_input_called = False
        self.custom_timesteps = False
        ramp = np.linspace(0, 1, self.config["num_train_timesteps"])
        self._set_levels(self._karras(ramp), None)

    def _karras(self, ramp: np.ndarray) -> np.ndarray:
        low, high, rho = self.config["sigma_min"], self.config["sigma_max"], self.config["rho"]
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    def sigma_to_t(self, sigmas: np.ndarray) -> np.ndarray:
        """250 log sigma."""
        return 1000 * 0.25 * np.log(np.asarray(sigmas, dtype=np.float64) + 1e-44)

    def _set_levels(self, levels: np.ndarray, device: Any) -> None:
        self.timesteps = to_timesteps(self.sigma_to_t(levels), device, torch.float64)
        self.sigmas = torch.from_numpy(np.concatenate([levels, [self.config["sigma_min"]]]).astype(np.float32))
        self._restart()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        total = self.config["num_train_timesteps"]
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            values = np.array(timesteps, dtype=np.int64)
            if (np.diff(values) >= 0).any() or values[0] >= total:
                raise ValueError(f"timesteps must be descending from below {total}, got {values.tolist()}")
        else:
            steps = _positive(num_inference_steps)
            if steps > total:
                raise ValueError(f"num_inference_steps must be at most {total}, got {steps}")
            values = (np.arange(0, steps) * (total // steps)).round()[::-1].copy().astype(np.int64)
        self.custom_timesteps, self.num_inference_steps = timesteps is not None, len(values)
        self._set_levels(self._karras(values[::-1] / (total - 1)), device)

    def _prediction(self) -> Prediction:
        return Prediction(
            sigma_data=self.config["sigma_data"],
            sigma_min=self.config["sigma_min"],
            clip=1.0 if self.config["clip_denoised"] else None,
        )

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        low, high, s_noise = (self.config[n] for n in ("sigma_min", "sigma_max", "s_noise"))
        consistency(trace, self._path(), sigma_min=low, sigma_max=high, s_noise=s_noise, start=start)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        require_float_timestep(type(self), timestep)
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)
