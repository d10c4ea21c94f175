"""Stand-ins that call the model twice a step: Heun, KDPM2 and its ancestral form, DPM-Solver-SDE."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.trace import Trace
from ..solvers.dpm_2 import dpm_2, dpm_2_ancestral
from ..solvers.dpm_solver_sde import dpmpp_sde
from ..solvers.heun import heun
from ..solvers.stochastic import ancestral_split, halfway
from .discrete import BETAS
from .karras import SIGMA_CHOICES, SigmaScheduler
from .noise_levels import sigma_to_timestep
from .scheduler import Scheduler, Timestep, to_timesteps

SECOND_ORDER = {**BETAS, "beta_start": 0.00085, "beta_end": 0.012}


class HeunDiscreteScheduler(SigmaScheduler):
    """Heun's method: two calls of the model a step, one for the last."""

    defaults: ClassVar[dict[str, Any]] = {
        **SECOND_ORDER, "prediction_type": "epsilon", **SIGMA_CHOICES, "clip_sample": False, "clip_sample_range": 1.0,
        "timestep_spacing": "linspace", "steps_offset": 0,
    }  # fmt: skip
    order = calls_a_step = 2
    needs_set_timesteps = False

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        _same_training_length(self, num_train_timesteps)
        self._choose(num_inference_steps, device, timesteps)

    @property
    def state_in_first_order(self) -> bool:
        return (self._step_index or 0) % 2 == 0

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path, begin = self._karras_path(start)
        heun(trace, path, start=begin)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)


def _same_training_length(scheduler: Scheduler, given: int | None) -> None:
    expected = scheduler.config["num_train_timesteps"]
    if given not in (None, expected):
        raise ValueError(f"num_train_timesteps must be that of the configuration, {expected}, got {given}")


class KDPM2DiscreteScheduler(SigmaScheduler):
    """DPM-Solver-2 in Karras' form: the second call is half way in log sigma."""

    defaults: ClassVar[dict[str, Any]] = {
        **SECOND_ORDER, **SIGMA_CHOICES, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
    }  # fmt: skip
    order = calls_a_step = 2
    needs_set_timesteps = False
    state_in_first_order = HeunDiscreteScheduler.state_in_first_order

    def _setup(self) -> None:
        if self.config["prediction_type"] == "sample":
            raise ValueError("prediction_type must be 'epsilon' or 'v_prediction', got 'sample'")
        super()._setup()

    def set_timesteps(
        self, num_inference_steps: int, device: Any = None, num_train_timesteps: int | None = None
    ) -> None:
        _same_training_length(self, num_train_timesteps)
        self._choose(num_inference_steps, device)

    def _set_sigmas(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Any, last: float) -> None:
        if self.config["use_karras_sigmas"]:
            timesteps = timesteps.round()
        super()._set_sigmas(sigmas, timesteps, device, last)

    def _second_sigma(self, sigma: float, sigma_next: float) -> float:
        return halfway(sigma, sigma_next)

    def _interleaved(self, timesteps: np.ndarray, device: Any) -> Tensor:
        log_sigmas = np.log(self._train_sigmas)
        between = [
            sigma_to_timestep(np.asarray(second, dtype=np.float32), log_sigmas) for _, second in self._pairs()[:-1]
        ]
        at = np.stack([np.array(between), np.asarray(timesteps)[1:]], axis=-1).reshape(-1) if between else np.zeros(0)
        return to_timesteps(np.concatenate([timesteps[:1], at]), device, torch.float32)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path, begin = self._karras_path(start)
        dpm_2(trace, path, start=begin)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """`KDPM2DiscreteScheduler` down to sigma_down, then noise."""

    defaults = KDPM2DiscreteScheduler.defaults

    def _second_sigma(self, sigma: float, sigma_next: float) -> float:
        return halfway(sigma, ancestral_split(sigma, sigma_next)[0])

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path, begin = self._karras_path(start)
        dpm_2_ancestral(trace, path, start=begin)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)


class DPMSolverSDEScheduler(SigmaScheduler):
    """DPM-Solver++ for the SDE (Lu et al. 2022b), two calls of the model a step, noise of a Brownian path.

    ``noise_sampler`` is any ``f(sigma, sigma_next) -> Tensor``: that of diffusers or k-diffusion where the same images are wanted;
    by default fastgen's own Brownian tree, seeded with ``noise_sampler_seed``.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **SECOND_ORDER, "prediction_type": "epsilon", **SIGMA_CHOICES, "noise_sampler_seed": None,
        "timestep_spacing": "linspace", "steps_offset": 0,
    }  # fmt: skip
    order = calls_a_step = 2
    needs_set_timesteps = False
    state_in_first_order = HeunDiscreteScheduler.state_in_first_order

    def _setup(self) -> None:
        if self.config["prediction_type"] == "sample":
            raise ValueError("prediction_type must be 'epsilon' or 'v_prediction', got 'sample'")
        self.noise_sampler: Callable[[Any, Any], Tensor] | None = None
        super()._setup()

    def set_timesteps(
        self, num_inference_steps: int, device: Any = None, num_train_timesteps: int | None = None
    ) -> None:
        _same_training_length(self, num_train_timesteps)
        self.noise_sampler = None
        self._choose(num_inference_steps, device)

    def _second_sigma(self, sigma: float, sigma_next: float) -> float:
        return halfway(sigma, sigma_next)

    def _interleaved(self, timesteps: np.ndarray, device: Any) -> Tensor:
        at = torch.from_numpy(np.ascontiguousarray(timesteps)).double()
        doubled = torch.cat([at[:1], at[1:].repeat_interleave(2)])
        log_sigmas = np.log(self._train_sigmas)
        between = [sigma_to_timestep(second, log_sigmas) for _, second in self._pairs()[:-1]]
        doubled[1::2] = torch.tensor(np.array(between)) if between else doubled[1::2]
        return doubled.to(device=device)

    def _trace(self, trace: Trace, start: int, *, s_noise: float = 1.0) -> None:  # type: ignore[override]
        path, begin = self._karras_path(start)
        dpmpp_sde(trace, path, s_noise=s_noise, start=begin)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0
    ) -> Any:
        if self._step_index is None:
            self._init_step_index(timestep)
        noise = self._brownian_noise(sample)
        return self._advance(
            model_output, timestep, sample, noise=noise, return_dict=return_dict, options={"s_noise": s_noise}
        )

    def _brownian_noise(self, sample: Tensor) -> Tensor | None:
        index = self._step_index or 0
        levels = self._levels
        whole = index // 2
        if whole >= len(levels) - 1 or levels[whole + 1] == 0:
            return None
        if self.noise_sampler is None:
            from ..engine.brownian import BrownianTree

            positive = levels[levels > 0]
            self.noise_sampler = BrownianTree.like(
                sample, float(positive.min()), float(positive.max()), self.config["noise_sampler_seed"]
            )
        ahead = levels[whole + 1] if index % 2 else (levels[whole] * levels[whole + 1]).sqrt()
        return self.noise_sampler(levels[whole], ahead)
