"""Stand-ins that live on the discrete schedule of alpha_bar: DDPM, DDIM and its inverse, PNDM."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.trace import Trace
from ..solvers.ddim import ddim_step
from ..solvers.ddpm import ddpm
from ..solvers.pndm import pndm_plms, pndm_prk
from .noise_levels import SPACINGS, make_betas, spaced_timesteps
from .scheduler import Scheduler, Timestep, combine, to_timesteps

BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
THRESHOLDING: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
KARRAS_FAMILY = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler", "EDMEulerScheduler",
)  # fmt: skip


class DiscreteScheduler(Scheduler):
    """Base: betas, alphas and alphas_cumprod, as attributes too."""

    _compatible_names: tuple[str, ...] = KARRAS_FAMILY

    def _setup(self) -> None:
        self.betas = make_betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        set_alpha_to_one = self.config.get("set_alpha_to_one", True)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -1)
        self._restart()

    def _marginal(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) at a timestep; below 0 those of the end."""
        if t >= len(self.alphas_cumprod):
            raise ValueError(f"timestep {t} is past the schedule of {len(self.alphas_cumprod)}")
        bar = float(self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod)
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _path(self, timesteps: Sequence[int], following: Sequence[int]) -> Path:
        levels = [self._marginal(int(t)) for t in timesteps]
        ends = [self._marginal(int(t)) for t in following]
        if any(abs(a[0] - b[0]) > 0 for a, b in zip(levels[1:], ends[:-1], strict=True)):
            raise ValueError("the steps of a path follow each other")
        alphas, sigmas = zip(*levels, ends[-1], strict=True)
        return Path([int(t) for t in timesteps], alphas, sigmas)

    def _set(self, timesteps: np.ndarray, device: Any) -> None:
        self.timesteps = to_timesteps(timesteps, device, torch.int64)
        self._restart()

    def _check_steps(self, steps: int) -> None:
        total = self.config["num_train_timesteps"]
        if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be in [1, {total}], the length of the schedule, got {steps}")

    def _marginals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        bars = self.alphas_cumprod.to(timesteps.device)[timesteps].double()
        return bars.sqrt(), (1 - bars).sqrt()

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha eps - sigma x0, what a v-prediction model is trained on; arguments as of `add_noise`."""
        alpha, sigma = (m.to(sample.dtype) for m in self._marginals(torch.atleast_1d(timesteps)))
        return combine(alpha, noise, -sigma, sample)


def check_descending(timesteps: Sequence[int], total: int) -> np.ndarray:
    values = np.array(timesteps, dtype=np.int64)
    if (np.diff(values) >= 0).any():
        raise ValueError(f"timesteps must be descending, got {values.tolist()}")
    if values[0] >= total:
        raise ValueError(f"timesteps must begin below num_train_timesteps = {total}, got {values[0]}")
    return values


class DDPMScheduler(DiscreteScheduler):
    """Ancestral sampling (Ho et al. 2020); see :class:`fastgen.samplers.DDPM`.

    ``variance_type="learned"`` takes the model's second half for log sigma^2, as the code of the paper does, where diffusers takes
    its square root; ``"fixed_large_log"`` is the variance of ``"fixed_large"``, where diffusers returns NaN.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "variance_type": "fixed_small", "clip_sample": True, "prediction_type": "epsilon", **THRESHOLDING,
        "clip_sample_range": 1.0, "timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False,
    }  # fmt: skip
    second_output = "pred_original_sample"
    needs_set_timesteps = False
    stateless = True

    def _setup(self) -> None:
        super()._setup()
        types = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
        if self.config["variance_type"] not in types:
            raise ValueError(f"variance_type must be one of {types}, got {self.config['variance_type']!r}")
        self.variance_type = self.config["variance_type"]
        self.custom_timesteps = False

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, and not both")
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            self._set(check_descending(timesteps, self.config["num_train_timesteps"]), device)
            return
        self._check_steps(num_inference_steps)  # type: ignore[arg-type]
        self.num_inference_steps = num_inference_steps
        self._set(spaced_timesteps(self.config, num_inference_steps), device)  # type: ignore[arg-type]

    def previous_timestep(self, timestep: Timestep) -> int:
        """The timestep after this one on the way to the image, -1 after the last."""
        return int([*self._values, -1][self.index_for_timestep(timestep) + 1])

    def _learns_variance(self) -> bool:
        return str(self.config["variance_type"]).startswith("learned")

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        values = [int(t) for t in self._values[start:]]
        ddpm(trace, self._path(values, [*values[1:], -1]), variance_type=self.config["variance_type"])

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(model_output, timestep, sample, generator=generator, seeds=seeds, return_dict=return_dict)


class DDIMScheduler(DiscreteScheduler):
    """Implicit sampling (Song et al. 2021); see :class:`fastgen.samplers.DDIM`."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon", **THRESHOLDING,
        "clip_sample_range": 1.0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
    }  # fmt: skip
    second_output = "pred_original_sample"
    stateless = True

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._check_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._set(spaced_timesteps(self.config, num_inference_steps), device)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        stepwise_ddim(self, trace, start, **options)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False,
        generator: Generators = None, variance_noise: Tensor | None = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        if variance_noise is not None and generator is not None:
            raise ValueError("give generator or variance_noise, not both")
        return self._advance(
            model_output, timestep, sample, generator=generator, noise=variance_noise, seeds=seeds, return_dict=return_dict,
            options={"eta": eta, "use_clipped_model_output": use_clipped_model_output},
        )  # fmt: skip


def stepwise_ddim(scheduler: DiscreteScheduler, trace: Trace, start: int, **options: Any) -> None:
    """Each timestep's own step, `num_train_timesteps // num_inference_steps` down: with some spacings that is not quite where the
    next one begins."""
    stride = scheduler.config["num_train_timesteps"] // (scheduler.num_inference_steps or 1)
    x = None
    for t in scheduler._values[start:]:
        (alpha, sigma), (alpha_next, sigma_next) = scheduler._marginal(int(t)), scheduler._marginal(int(t) - stride)
        x = ddim_step(trace, x, (t, alpha, sigma), (alpha_next, sigma_next), **options)
    trace.finish(x, alpha_next, sigma_next)


class DDIMInverseScheduler(DiscreteScheduler):
    """DDIM from image to noise (as diffusers' pix2pix-zero pipeline inverts)."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon",
        "clip_sample_range": 1.0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
    }  # fmt: skip
    second_output = "pred_original_sample"
    stateless = True

    def _setup(self) -> None:
        super()._setup()
        self.initial_alpha_cumprod = self.final_alpha_cumprod
        self.timesteps = torch.arange(len(self.betas))
        self._restart()

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._check_steps(num_inference_steps)
        if self.config["timestep_spacing"] == "linspace":
            raise ValueError(f"timestep_spacing must be one of {SPACINGS[1:]}, got 'linspace'")
        self.num_inference_steps = num_inference_steps
        self._set(spaced_timesteps(self.config, num_inference_steps)[::-1], device)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        total = self.config["num_train_timesteps"]
        stride = total // (self.num_inference_steps or 1)
        x = None
        for t in self._values[start:]:
            here, there = self._marginal(min(int(t) - stride, total - 1)), self._marginal(int(t))
            x = ddim_step(trace, x, (t, *here), there)
        trace.finish(x, *there)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)


class PNDMScheduler(DiscreteScheduler):
    """Pseudo numerical methods (Liu et al. 2022)."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "skip_prk_steps": False, "set_alpha_to_one": False, "prediction_type": "epsilon",
        "timestep_spacing": "leading", "steps_offset": 0,
    }  # fmt: skip

    def _setup(self) -> None:
        super()._setup()
        if self.config["prediction_type"] not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type must be 'epsilon' or 'v_prediction' for PNDM, got {self.config['prediction_type']!r}"
            )

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self._check_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        up = spaced_timesteps(self.config, num_inference_steps)[::-1]
        if self.config["skip_prk_steps"]:
            self.prk_timesteps = np.array([], dtype=np.int64)
            self.plms_timesteps = np.concatenate([up[:-1], up[-2:-1], up[-1:]])[::-1].copy()
        else:
            if num_inference_steps < 4:
                raise ValueError(
                    f"num_inference_steps must be at least 4 with skip_prk_steps=False, got {num_inference_steps}"
                )
            half = self.config["num_train_timesteps"] // num_inference_steps // 2
            pairs = np.array(up[-4:]).repeat(2) + np.tile(np.array([0, half]), 4)
            self.prk_timesteps = pairs[:-1].repeat(2)[1:-1][::-1].copy()
            self.plms_timesteps = up[:-3][::-1].copy()
        self._set(np.concatenate([self.prk_timesteps, self.plms_timesteps]).astype(np.int64), device)

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Timesteps repeat in the warm-up: the first place is where a trajectory begins."""
        place = self._place_in_memory(timestep)
        if place is not None:
            return place
        value = int(timestep)
        if value not in self._values:
            raise ValueError(f"timestep {value} is not in the schedule {[int(t) for t in self._values]}")
        return self._values.index(value)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        stride = self.config["num_train_timesteps"] // (self.num_inference_steps or 1)
        values = [int(t) for t in self._values]
        if self.config["skip_prk_steps"]:
            pndm_plms(trace, values, self._marginal, stride, start=start)
        elif start == 0:
            warm_up = len(self.prk_timesteps)
            pndm_prk(trace, values[:warm_up], values[warm_up:], self._marginal, stride)
        else:
            raise ValueError("a trajectory that begins later (image to image) needs skip_prk_steps=True")

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)
