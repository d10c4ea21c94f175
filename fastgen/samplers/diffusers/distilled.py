"""Stand-ins for distilled models, LCM and TCD: few timesteps, of those the model was distilled on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.plan import Plan
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..solvers.lcm import lcm, lcm_boundary
from ..solvers.tcd import tcd
from .discrete import THRESHOLDING, DiscreteScheduler, check_descending
from .scheduler import Timestep

DISTILLED = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "trained_betas": None, "original_inference_steps": 50, "clip_sample": False, "clip_sample_range": 1.0,
    "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon", **THRESHOLDING, "timestep_spacing": "leading",
    "timestep_scaling": 10.0, "rescale_betas_zero_snr": False,
}  # fmt: skip


class DistilledScheduler(DiscreteScheduler):
    """Base of LCM and TCD: the timesteps are a subset of those the model was distilled on."""

    _compatible_names = ()

    def _origin(self, original_inference_steps: int | None, strength: float) -> np.ndarray:
        total = self.config["num_train_timesteps"]
        original = original_inference_steps or self.config["original_inference_steps"]
        if original > total:
            raise ValueError(f"original_inference_steps must be at most num_train_timesteps = {total}, got {original}")
        return np.arange(1, int(original * strength) + 1) * (total // original) - 1

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None, strength: float = 1.0,
    ) -> None:  # fmt: skip
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            values = check_descending(timesteps, self.config["num_train_timesteps"])
            self.num_inference_steps = len(values)
            keep = min(int(len(values) * strength), len(values))
            self._set(values[max(len(values) - keep, 0) :], device)
            return
        origin = self._origin(original_inference_steps, strength)[::-1].copy()
        self._check_steps(num_inference_steps)  # type: ignore[arg-type]
        if num_inference_steps > len(origin):  # type: ignore[operator]
            raise ValueError(
                f"num_inference_steps must be at most {len(origin)} (original_inference_steps x strength), "
                f"got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        chosen = np.floor(np.linspace(0, len(origin), num=num_inference_steps, endpoint=False)).astype(np.int64)  # type: ignore[arg-type]
        self._set(origin[chosen], device)

    def _following_path(self, start: int, end: int) -> Path:
        values = [int(t) for t in self._values[start:]]
        return self._path(values, [*values[1:], end])


class LCMScheduler(DistilledScheduler):
    """Latent consistency models (Luo et al. 2023)."""

    defaults = DISTILLED
    second_output = "denoised"

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path = self._following_path(start, int(self._values[-1]))
        lcm(trace, path, timestep_scaling=self.config["timestep_scaling"])

    def _second(self, plan: Plan, i: int, model_output: Tensor, sample: Tensor) -> Tensor:
        c_skip, c_out = lcm_boundary(self._values[self._start + i], self.config["timestep_scaling"])
        return c_out * plan.predicted_sample(model_output, i, sample) + c_skip * sample

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)


class TCDScheduler(DistilledScheduler):
    """Trajectory consistency distillation (Zheng et al. 2024)."""

    defaults = DISTILLED
    second_output = "pred_noised_sample"

    def _origin(self, original_inference_steps: int | None, strength: float) -> np.ndarray:
        if original_inference_steps is None:
            return super()._origin(None, strength)
        return np.arange(int(self.config["num_train_timesteps"] * strength))

    def _prediction(self) -> Prediction:
        return Prediction(prediction_type=self.config["prediction_type"])  # diffusers' does not clip

    def _between(self, start: int, eta: float) -> list[tuple[float, float]]:
        following = [*self._values[start + 1 :], 0]
        return [self._marginal(math.floor((1 - eta) * t)) for t in following]

    def _trace(self, trace: Trace, start: int, *, eta: float = 0.3) -> None:  # type: ignore[override]
        tcd(trace, self._following_path(start, 0), self._between(start, eta), eta=eta)
        self._eta = eta

    def _second(self, plan: Plan, i: int, model_output: Tensor, sample: Tensor) -> Tensor:
        index = self._start + i
        (alpha, sigma), (alpha_s, sigma_s) = (
            self._marginal(int(self._values[index])),
            self._between(index, self._eta)[0],
        )
        clean = plan.predicted_sample(model_output, i, sample)
        return (alpha_s - sigma_s * alpha / sigma) * clean + sigma_s / sigma * sample

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, eta: float = 0.3, generator: Generators = None,
        return_dict: bool = True, *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        return self._advance(
            model_output,
            timestep,
            sample,
            generator=generator,
            seeds=seeds,
            return_dict=return_dict,
            options={"eta": eta},
        )
