"""Stand-ins for DPM-Solver and DPM-Solver++: multistep, its inverse, and singlestep."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..engine.noise import Generators
from ..engine.path import Path
from ..engine.trace import Trace
from ..solvers.dpm_solver import ALGORITHMS, SOLVER_TYPES, multistep, singlestep, singlestep_orders
from .discrete import BETAS, THRESHOLDING
from .karras import SIGMA_CHOICES
from .multistep import FINAL_SIGMAS, SHIFTING, MultistepScheduler, check_choice
from .noise_levels import converted, sigma_to_timestep
from .scheduler import Timestep, to_timesteps

DPM_COMMON: dict[str, Any] = {
    **BETAS, "solver_order": 2, "prediction_type": "epsilon", **THRESHOLDING, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
}  # fmt: skip
DPM_SYNONYMS = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}
SIGMA_LAMBDA = {**SIGMA_CHOICES, "use_lu_lambdas": False, "use_flow_sigmas": False, "flow_shift": 1.0}


class DPMSolverMultistepScheduler(MultistepScheduler):
    """DPM-Solver++ of order 1 to 3, multistep (Lu et al. 2022b), and its SDE forms.

    At order 3, ``"sde-dpmsolver++"`` uses the series' own coefficient of the second difference; diffusers 0.42 has a wrong sign in
    its constant, and returns nothing at all for ``"sde-dpmsolver"``, which is refused here.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **DPM_COMMON, "lower_order_final": True, "euler_at_final": False, **SIGMA_LAMBDA, "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf, "variance_type": None, "timestep_spacing": "linspace", "steps_offset": 0,
        "rescale_betas_zero_snr": False, **SHIFTING,
    }  # fmt: skip
    synonyms: ClassVar[dict[str, dict[str, str]]] = DPM_SYNONYMS

    def _setup(self) -> None:
        config = self.config
        check_choice(config, "algorithm_type", ALGORITHMS)
        check_choice(config, "solver_type", SOLVER_TYPES)
        if config["solver_order"] not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {config['solver_order']!r}")
        if config["algorithm_type"] == "sde-dpmsolver" and config["solver_order"] == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no third order: use 'sde-dpmsolver++'")
        if "final_sigmas_type" in config:
            check_choice(config, "final_sigmas_type", FINAL_SIGMAS)
            if config["final_sigmas_type"] == "zero" and not config["algorithm_type"].endswith("++"):
                raise ValueError(f"algorithm_type={config['algorithm_type']!r} needs final_sigmas_type='sigma_min'")
        super()._setup()

    @property
    def rounds_converted(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.config["beta_schedule"] == "squaredcos_cap_v2" else ("use_karras_sigmas", "use_lu_lambdas")

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: Any = None, mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._set(*self._chosen(num_inference_steps, timesteps, mu), device)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        config = self.config
        multistep(
            trace, self._path(), order=config["solver_order"], algorithm=config["algorithm_type"],
            solver_type=config["solver_type"], lower_order_final=config["lower_order_final"],
            euler_at_final=config["euler_at_final"], ends_at_zero=config.get("final_sigmas_type") == "zero", halved=True,
            start=start,
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(
            self._without_variance(model_output, sample), timestep, sample, generator=generator, noise=variance_noise,
            noise_dtype=torch.float32, seeds=seeds, return_dict=return_dict,
        )  # fmt: skip


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """The same from image to noise."""

    defaults: ClassVar[dict[str, Any]] = {
        **DPM_COMMON, "lower_order_final": True, "euler_at_final": False, **SIGMA_CHOICES, "use_flow_sigmas": False,
        "flow_shift": 1.0, "lambda_min_clipped": -math.inf, "variance_type": None, "timestep_spacing": "linspace",
        "steps_offset": 0,
    }  # fmt: skip

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
        config, train, steps = self.config, self._train_sigmas, num_inference_steps
        noisiest = self._last_timestep() - 1
        if config["timestep_spacing"] == "linspace":
            at = np.linspace(0, noisiest, steps + 1).round()[:-1].astype(np.int64)
        elif config["timestep_spacing"] == "leading":
            at = (np.arange(0, steps + 1) * ((noisiest + 1) // (steps + 1))).round()[:-1].astype(np.int64)
            at = at + config["steps_offset"]
        else:
            at = np.arange(noisiest + 1, 0, -len(self.betas) / steps).round()[::-1].astype(np.int64) - 1
        levels = converted(config, train, steps)
        if levels is not None:
            at = np.array([sigma_to_timestep(s, np.log(train)) for s in levels])
            at = at.round() if config["use_karras_sigmas"] else at
            last = float(levels[-1])
        elif config["use_flow_sigmas"]:
            levels = self._flow_sigmas(steps, None)
            at, last = levels * config["num_train_timesteps"], float(levels[-1])
        else:
            levels, last = np.interp(at, np.arange(len(train)), train), float(train[noisiest])
        self.sigmas = torch.from_numpy(np.concatenate([levels, [last]]).astype(np.float32))
        _, first = np.unique(at.astype(np.int64), return_index=True)
        self.timesteps = to_timesteps(at[np.sort(first)], device, torch.int64)
        self.num_inference_steps = len(self.timesteps)
        self._restart()

    def _path(self) -> Path:
        levels = self.sigmas.double().tolist()[: len(self._values) + 1]
        alphas, sigmas = zip(*map(self._alpha_sigma, levels), strict=True)
        return Path(self._values, alphas, sigmas)


class DPMSolverSinglestepScheduler(MultistepScheduler):
    """DPM-Solver++ of order 1 to 3, singlestep (Lu et al. 2022b)."""

    defaults: ClassVar[dict[str, Any]] = {
        **DPM_COMMON, "lower_order_final": False, **SIGMA_CHOICES, "use_flow_sigmas": False, "flow_shift": 1.0,
        "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None, **SHIFTING,
    }  # fmt: skip
    synonyms: ClassVar[dict[str, dict[str, str]]] = DPM_SYNONYMS

    def _setup(self) -> None:
        check_choice(self.config, "algorithm_type", ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"))
        check_choice(self.config, "solver_type", SOLVER_TYPES)
        check_choice(self.config, "final_sigmas_type", FINAL_SIGMAS)
        if self.config["final_sigmas_type"] == "zero" and not self.config["algorithm_type"].endswith("++"):
            raise ValueError(f"algorithm_type={self.config['algorithm_type']!r} needs final_sigmas_type='sigma_min'")
        super()._setup()
        self.order_list = self.get_order_list(len(self.betas))

    def _spaced(self, steps: int) -> np.ndarray:
        return np.linspace(0, self._last_timestep() - 1, steps + 1).round()[::-1][:-1].copy().astype(np.int64)

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: Any = None, mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._set(*self._chosen(num_inference_steps, timesteps, mu), device)
        self.order_list = self.get_order_list(len(self.timesteps))

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of each step; ends at lower orders where the steps do not divide, or the last sigma is zero."""
        config = self.config
        zero = config["final_sigmas_type"] == "zero"
        lower = config["lower_order_final"] or zero or num_inference_steps % config["solver_order"] != 0
        return singlestep_orders(num_inference_steps, config["solver_order"], lower, zero)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        singlestep(
            trace, self._path(), self.order_list, algorithm=self.config["algorithm_type"],
            solver_type=self.config["solver_type"], start=start,
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(
            self._without_variance(model_output, sample), timestep, sample, generator=generator, seeds=seeds,
            return_dict=return_dict,
        )  # fmt: skip
