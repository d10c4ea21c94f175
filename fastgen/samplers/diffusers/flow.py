"""Stand-ins for flow matching (Lipman et al. 2023; Esser et al. 2024): Euler and Heun."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.prediction import Prediction
from ..engine.trace import Trace
from ..solvers.flow import flow_euler, flow_heun
from ..solvers.stochastic import Churn
from .karras import SIGMA_CHOICES, _positive, check_sigma_choices
from .noise_levels import converted, flow_shifted, stretched_to, time_shifted
from .scheduler import _NO_OPTIONS, Scheduler, Timestep, combine, require_float_timestep


class FlowScheduler(Scheduler):
    """Base: x = (1 - sigma) x0 + sigma eps, the model predicts eps - x0."""

    init_noise_sigma = 1.0

    def _setup(self) -> None:
        total, shift = self.config["num_train_timesteps"], self.config["shift"]
        timesteps = torch.from_numpy(np.linspace(1, total, total, dtype=np.float32)[::-1].copy())
        sigmas = timesteps / total
        if not self.config.get("use_dynamic_shifting", False):
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self._shift = shift
        self.sigmas, self.timesteps = sigmas, sigmas * total
        self.sigma_min, self.sigma_max = float(sigmas[-1]), float(sigmas[0])
        self._restart()

    def _prediction(self) -> Prediction:
        return Prediction(prediction_type="flow_prediction")

    @property
    def shift(self) -> float:
        return float(self._shift)

    def _even_timesteps(self, steps: int) -> np.ndarray:
        total = self.config["num_train_timesteps"]
        return np.linspace(self.sigma_max * total, self.sigma_min * total, steps)

    def _flow_path(self, sigmas: list[float]) -> Path:
        return Path([0.0] * (len(sigmas) - 1), [1 - s for s in sigmas], sigmas)

    def scale_noise(self, sample: Tensor, timestep: Timestep, noise: Tensor) -> Tensor:
        """sigma eps + (1 - sigma) x0 at each sample's own timestep."""
        at = torch.atleast_1d(torch.as_tensor(timestep))
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in at]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(at)
        sigma = self.sigmas.cpu()[indices].double()
        return combine((1 - sigma).to(sample.dtype), sample, sigma.to(sample.dtype), noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scale_noise(original_samples, timesteps, noise)


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Euler's method on dx/dsigma = v."""

    defaults: ClassVar[dict[str, Any]] = {
        "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None, **SIGMA_CHOICES,
        "time_shift_type": "exponential", "stochastic_sampling": False,
    }  # fmt: skip
    needs_set_timesteps = False

    def _setup(self) -> None:
        check_sigma_choices(self.config)
        if self.config["time_shift_type"] not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type must be 'exponential' or 'linear', got {self.config['time_shift_type']!r}"
            )
        super()._setup()

    def set_shift(self, shift: float) -> None:
        self._shift = shift

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None, timesteps: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        config, total = self.config, self.config["num_train_timesteps"]
        if config["use_dynamic_shifting"] and mu is None:
            raise ValueError("mu must be given with use_dynamic_shifting=True")
        lengths = {len(v) for v in (sigmas, timesteps) if v is not None}
        lengths |= {_positive(num_inference_steps)} if num_inference_steps is not None else set()
        if len(lengths) != 1:
            raise ValueError(f"give num_inference_steps, sigmas or timesteps, all of one length, got {sorted(lengths)}")
        steps = self.num_inference_steps = lengths.pop()
        at = None if timesteps is None else np.array(timesteps).astype(np.float32)
        if sigmas is None:
            levels = (self._even_timesteps(steps) if at is None else at) / total
        else:
            levels = np.array(sigmas).astype(np.float32)
        if config["use_dynamic_shifting"]:
            levels = time_shifted(levels, mu, config["time_shift_type"])  # type: ignore[arg-type]
        else:
            levels = flow_shifted(levels, self.shift)
        if config["shift_terminal"]:
            levels = stretched_to(levels, config["shift_terminal"])
        other = converted(config, levels, steps)
        values = torch.from_numpy(np.asarray(levels if other is None else other)).to(device, torch.float32)
        final = 0.0
        self.timesteps = values * total if at is None else torch.from_numpy(at).to(device)
        if config["invert_sigmas"]:
            values, final = 1.0 - values, 1.0
            self.timesteps = values * total
        self.sigmas = torch.cat([values, values.new_full((1,), final)])
        self._restart()

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path = self._flow_path(self.sigmas.double().tolist())
        flow_euler(trace, path, stochastic=self.config["stochastic_sampling"], start=start)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None,
        per_token_timesteps: Tensor | None = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        """``s_churn`` and its like are without effect, as in diffusers. ``per_token_timesteps`` is not offered."""
        require_float_timestep(type(self), timestep)
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps must be None: one timestep for all of a sample")
        return self._advance(
            model_output,
            timestep,
            sample,
            generator=generator,
            noise_dtype=sample.dtype,
            seeds=seeds,
            return_dict=return_dict,
        )


class FlowMatchHeunDiscreteScheduler(FlowScheduler):
    """Heun's method on dx/dsigma = v: two calls of the model a step, one for the last."""

    defaults: ClassVar[dict[str, Any]] = {"num_train_timesteps": 1000, "shift": 1.0}
    order = 2
    needs_set_timesteps = False

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = _positive(num_inference_steps)
        total = self.config["num_train_timesteps"]
        levels = flow_shifted(self._even_timesteps(num_inference_steps) / total, self.config["shift"])
        values = torch.from_numpy(levels).to(device, torch.float32)
        at = values * total
        self.timesteps = torch.cat([at[:1], at[1:].repeat_interleave(2)])
        self._levels = torch.cat([values, values.new_zeros(1)])
        self.sigmas = torch.cat([values[:1], values[1:].repeat_interleave(2), values.new_zeros(1)])
        self._restart()

    def _trace(self, trace: Trace, start: int, **churn: float) -> None:  # type: ignore[override]
        if start % 2:
            raise ValueError(f"a trajectory begins with the first call of a step, an even index, got {start}")
        path = self._flow_path(self._levels.double().tolist())
        flow_heun(trace, path, churn=Churn(**churn), divisor=len(self.sigmas) - 1, start=start // 2)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        require_float_timestep(type(self), timestep)
        return self._advance(
            model_output, timestep, sample, generator=generator, return_dict=return_dict,
            options={"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise} if s_churn else _NO_OPTIONS,
        )  # fmt: skip
