"""Stand-ins in the sigma space of Karras et al.: Euler, its ancestral form and LMS; and their base."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.trace import Trace
from ..solvers.euler import euler_ancestral
from ..solvers.lms import lms
from ..solvers.stochastic import Churn
from .discrete import BETAS, KARRAS_FAMILY
from .noise_levels import (
    SPACINGS,
    ZERO_SNR_ALPHA_BAR,
    converted,
    make_betas,
    sigma_to_timestep,
    spaced_timesteps,
    train_sigmas,
)
from .scheduler import _NO_OPTIONS, Scheduler, Timestep, require_float_timestep, to_timesteps

SIGMA_CHOICES: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def check_sigma_choices(config: Any) -> None:
    chosen = [name for name in SIGMA_CHOICES if config.get(name)]
    if len(chosen) > 1:
        raise ValueError(f"at most one of {list(SIGMA_CHOICES)} can be True, got {chosen}")


class SigmaScheduler(Scheduler):
    """Base: x = x0 + sigma eps, which the model wants to see divided by sqrt(sigma^2 + 1)."""

    _compatible_names = KARRAS_FAMILY
    second_output = "pred_original_sample"
    calls_a_step = 1  # of the model; the timesteps repeat accordingly
    float_timesteps = False  # whether integers are refused

    def _setup(self) -> None:
        check_sigma_choices(self.config)
        self.betas = make_betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = ZERO_SNR_ALPHA_BAR
        self._train_sigmas = train_sigmas(self.alphas_cumprod)
        self.is_scale_input_called = False
        total = self.config["num_train_timesteps"]
        timesteps = np.arange(total - 1, -1, -1, dtype=np.float32)
        self._set_sigmas(self._train_sigmas[::-1], timesteps, None, 0.0)

    @property
    def init_noise_sigma(self) -> Tensor:
        """What the first noise is multiplied by."""
        largest = self.sigmas.max()
        if self.config["timestep_spacing"] in ("linspace", "trailing"):
            return largest
        return (largest**2 + 1) ** 0.5

    def _choose(
        self, num_inference_steps: int | None, device: Any, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """Timesteps and sigmas of ``num_inference_steps``, or those given."""
        asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of num_inference_steps, timesteps and sigmas, got {given}")
        chosen = [name for name in SIGMA_CHOICES if self.config.get(name)]
        if timesteps is not None and chosen:
            raise ValueError(f"timesteps cannot be given with {chosen[0]}=True, which chooses them")
        train, config = self._train_sigmas, self.config
        if sigmas is not None:
            values = np.array(sigmas).astype(np.float32)
            at = np.array([sigma_to_timestep(s, np.log(train)) for s in values[:-1]])
            self.num_inference_steps = len(values) - 1
            self._set_sigmas(values[:-1], at, device, float(values[-1]))
            return
        steps = len(timesteps) if timesteps is not None else _positive(num_inference_steps)
        self.num_inference_steps = steps
        at = (
            np.array(timesteps, dtype=np.float32)
            if timesteps is not None
            else spaced_timesteps(config, steps, np.float32)
        )
        if config.get("interpolation_type") == "log_linear":
            levels = torch.linspace(np.log(train[-1]), np.log(train[0]), steps + 1).exp().numpy()
        else:
            levels = np.interp(at, np.arange(len(train)), train)
        other = converted(config, levels, steps)
        if other is not None:
            levels, at = other, np.array([sigma_to_timestep(s, np.log(train)) for s in other])
        last = float(train[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0
        self._set_sigmas(levels, at, device, last)

    def _set_sigmas(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Any, last: float) -> None:
        """Take these levels; a step of two calls has its timestep twice, the last one only once."""
        levels = torch.from_numpy(np.concatenate([sigmas, [last]]).astype(np.float32))
        self._levels = levels
        at = to_timesteps(timesteps, device, torch.float32)
        if self.calls_a_step == 2:
            levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
            at = self._interleaved(timesteps, device)
        self.sigmas, self.timesteps = levels, at
        self._input_levels = self._input_sigmas()
        self._restart()

    def _interleaved(self, timesteps: np.ndarray, device: Any) -> Tensor:
        at = torch.from_numpy(np.ascontiguousarray(timesteps))
        return torch.cat([at[:1], at[1:].repeat_interleave(2)]).to(device=device, dtype=torch.float32)

    def _input_sigmas(self) -> list[float]:
        """The sigma at which each call of the model is made."""
        levels = self.sigmas.tolist()
        if self.calls_a_step == 1:
            return levels
        return [level for pair in self._pairs() for level in pair]

    def _pairs(self) -> list[tuple[float, ...]]:
        levels = self._levels.tolist()
        return [(a, self._second_sigma(a, b)) for a, b in itertools.pairwise(levels)]

    def _second_sigma(self, sigma: float, sigma_next: float) -> float:
        return sigma_next

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:  # type: ignore[override]
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        sigma = self._input_levels[self._step_index]  # type: ignore[index]
        return sample / math.sqrt(sigma**2 + 1)

    def _karras_path(self, start: int) -> tuple[Path, int]:
        """The path in whole steps, and the step to begin with."""
        if start % self.calls_a_step:
            raise ValueError(f"a trajectory begins with the first call of a step, an even index, got {start}")
        levels = self._levels.double().tolist()
        steps = len(levels) - 1
        return Path([0.0] * steps, [1.0] * (steps + 1), levels), start // self.calls_a_step

    def _check_call(self, timestep: Timestep) -> None:
        if self.float_timesteps:
            require_float_timestep(type(self), timestep)

    def _marginals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            place = self._begin_index if self._step_index is None else self._step_index
            indices = [place] * len(timesteps)
        sigma = self.sigmas[indices].double()
        return torch.ones_like(sigma), sigma


def _positive(steps: int | None) -> int:
    if steps is None or isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"num_inference_steps must be a positive integer, got {steps!r}")
    return int(steps)


class EulerDiscreteScheduler(SigmaScheduler):
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction)."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "prediction_type": "epsilon", "interpolation_type": "linear", **SIGMA_CHOICES, "sigma_min": None,
        "sigma_max": None, "timestep_spacing": "linspace", "timestep_type": "discrete", "steps_offset": 0,
        "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
    }  # fmt: skip
    needs_set_timesteps = False
    float_timesteps = True

    def _setup(self) -> None:
        for name, known in (
            ("interpolation_type", ("linear", "log_linear")),
            ("timestep_type", ("discrete", "continuous")),
            ("final_sigmas_type", ("zero", "sigma_min")),
            ("timestep_spacing", SPACINGS),
        ):
            if self.config[name] not in known:
                raise ValueError(f"{name} must be one of {known}, got {self.config[name]!r}")
        super()._setup()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self._choose(num_inference_steps, device, timesteps, sigmas)

    def _set_sigmas(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Any, last: float) -> None:
        super()._set_sigmas(sigmas, timesteps, device, last)
        if self.config["timestep_type"] == "continuous" and self.config["prediction_type"] == "v_prediction":
            self.timesteps = torch.tensor([0.25 * s.log() for s in self.sigmas[:-1]], device=device)
            self._restart()

    def _trace(self, trace: Trace, start: int, **churn: float) -> None:  # type: ignore[override]
        path, begin = self._karras_path(start)
        _euler_churned_after(trace, path, Churn(**churn), begin)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        self._check_call(timestep)
        return self._advance(
            model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict,
            options={"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise} if s_churn else _NO_OPTIONS,
        )  # fmt: skip


def _euler_churned_after(trace: Trace, path: Path, churn: Churn, start: int) -> None:
    """Euler's method with the churn's noise added after the model has seen the sample, as diffusers' step can only do it."""
    x = None
    for i in range(start, len(path)):
        sigma, hat = path.sigmas[i], churn.sigma_hat(path.sigmas[i], len(path))
        x, x0 = trace.call(x, *path.point(i))
        if hat > sigma:
            prediction = trace.prediction
            x = x + churn.s_noise * math.sqrt(hat**2 - sigma**2) * trace.noise()
            p, q = prediction.to_sample(1.0, hat if prediction.prediction_type == "epsilon" else sigma)
            x0 = p * x + q * trace.output
        x = x + (path.sigmas[i + 1] - hat) * ((x - x0) / hat)
    trace.finish(x)


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Euler's method down to sigma_down, then noise."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }  # fmt: skip
    needs_set_timesteps = False
    float_timesteps = True

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._choose(num_inference_steps, device)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path, begin = self._karras_path(start)
        euler_ancestral(trace, path, always_draw=True, start=begin)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        self._check_call(timestep)
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)


class LMSDiscreteScheduler(SigmaScheduler):
    """Linear multistep of up to 8 derivatives, its weights exact integrals."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, **SIGMA_CHOICES, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
    }  # fmt: skip
    needs_set_timesteps = False

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._choose(num_inference_steps, device)

    def _trace(self, trace: Trace, start: int, *, order: int = 4) -> None:  # type: ignore[override]
        path, begin = self._karras_path(start)
        lms(trace, path, order=order, start=begin)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict, options={"order": order})
