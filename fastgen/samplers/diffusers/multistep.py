"""Stand-ins for the multistep family on x = alpha x0 + sigma eps: DEIS, UniPC, SA-Solver, IPNDM; and their base."""

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
from ..solvers.deis import deis
from ..solvers.pndm import ipndm
from ..solvers.sa_solver import sa_solver
from ..solvers.unipc import unipc
from .discrete import BETAS, KARRAS_FAMILY, THRESHOLDING
from .karras import SIGMA_CHOICES, check_sigma_choices
from .noise_levels import (
    ZERO_SNR_ALPHA_BAR,
    converted,
    flow_shifted,
    make_betas,
    sigma_to_timestep,
    spaced_timesteps_with_end,
    stretched_to,
    time_shifted,
    train_sigmas,
)
from .scheduler import Scheduler, Timestep, to_timesteps

FINAL_SIGMAS = ("zero", "sigma_min")


class MultistepScheduler(Scheduler):
    """Base: sigmas of the schedule, from which alpha and sigma of each step come."""

    _compatible_names = KARRAS_FAMILY
    rounds_converted: tuple[str, ...] = ("use_karras_sigmas",)
    synonyms: ClassVar[dict[str, dict[str, str]]] = {}  # values of other schedulers' arguments, and what they mean here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.defaults, args, strict=False)) | kwargs
        for name, meanings in self.synonyms.items():
            if given.get(name) in meanings:
                given[name] = meanings[given[name]]
        super().__init__(**given)

    def _setup(self) -> None:
        check_sigma_choices(self.config)
        self.betas = make_betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = ZERO_SNR_ALPHA_BAR
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self._train_sigmas = train_sigmas(self.alphas_cumprod)
        self.sigmas = torch.from_numpy(self._train_sigmas)
        self.init_noise_sigma = 1.0
        self._flow_shift = self.config.get("flow_shift", 1.0)
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -1, dtype=torch.float32)
        self._restart()

    def _last_timestep(self) -> int:
        clipped = self.config.get("lambda_min_clipped", -math.inf)
        return len(self.betas) - int(torch.searchsorted(torch.flip(self.lambda_t, [0]), clipped))

    def _chosen(
        self, steps: int | None, timesteps: Sequence[int] | None, mu: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(timesteps, sigmas), noise first, without what follows the last step."""
        config, train = self.config, self._train_sigmas
        if (steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, and not both")
        if mu is not None:
            if not (config.get("use_dynamic_shifting") and config["time_shift_type"] == "exponential"):
                raise ValueError("mu needs use_dynamic_shifting=True and time_shift_type='exponential'")
            self._flow_shift = math.exp(mu)
        others = [n for n in (*SIGMA_CHOICES, "use_lu_lambdas") if config.get(n)]
        if timesteps is not None:
            if others:
                raise ValueError(f"timesteps cannot be given with {others[0]}=True, which chooses them")
            at, steps = np.array(timesteps).astype(np.int64), len(timesteps)
        else:
            if isinstance(steps, bool) or int(steps) != steps or steps < 1:  # type: ignore[arg-type, operator]
                raise ValueError(f"num_inference_steps must be a positive integer, got {steps!r}")
            at = self._spaced(steps)  # type: ignore[arg-type]
        levels = converted(config, train[::-1], steps)  # type: ignore[arg-type]
        name = others[0] if others else ""
        if name == "use_lu_lambdas":  # evenly spaced log sigmas (Lu et al. 2022a)
            low, high = np.log(train)[[0, -1]].tolist()
            levels = np.exp(high + np.linspace(0, 1, steps) * (low - high))  # type: ignore[arg-type]
        if levels is not None:
            at = np.array([sigma_to_timestep(sigma, np.log(train)) for sigma in levels])
            return (at.round() if name in self.rounds_converted else at), levels
        if config.get("use_flow_sigmas"):
            levels = self._flow_sigmas(steps, mu)  # type: ignore[arg-type]
            return levels * config["num_train_timesteps"], levels
        return at, np.interp(at, np.arange(len(train)), train)

    def _spaced(self, steps: int) -> np.ndarray:
        return spaced_timesteps_with_end(self.config, steps, self._last_timestep())

    def _flow_sigmas(self, steps: int, mu: float | None) -> np.ndarray:
        sigmas = 1.0 - np.linspace(1, 1 / self.config["num_train_timesteps"], steps + 1)
        return np.flip(flow_shifted(sigmas, self._flow_shift))[:-1].copy()

    def _final_sigma(self, sigmas: np.ndarray) -> float:
        kind = self.config.get("final_sigmas_type")
        if kind is not None:
            return float(self._train_sigmas[0]) if kind == "sigma_min" else 0.0
        replaced = any(self.config.get(n) for n in (*SIGMA_CHOICES, "use_flow_sigmas"))
        return float(sigmas[-1]) if replaced else float(self._train_sigmas[0])

    def _set(self, timesteps: np.ndarray, sigmas: np.ndarray, device: Any) -> None:
        levels = np.concatenate([sigmas, [self._final_sigma(sigmas)]]).astype(np.float32)
        self.sigmas = torch.from_numpy(levels)
        self.timesteps = to_timesteps(timesteps, device, torch.int64)
        self.num_inference_steps = len(timesteps)
        self._restart()

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        timesteps, sigmas = self._chosen(num_inference_steps, None, None)
        self._set(timesteps, sigmas, device)

    def _alpha_sigma(self, sigma: float) -> tuple[float, float]:
        if self.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return alpha, sigma * alpha

    def _path(self) -> Path:
        alphas, sigmas = zip(*map(self._alpha_sigma, self.sigmas.double().tolist()), strict=True)
        return Path(self._values, alphas, sigmas)

    def _without_variance(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The first half of the channels, where the model also predicts a variance that these solvers have no use for."""
        learned = self.config.get("variance_type") in ("learned", "learned_range")
        return (
            model_output[:, : sample.shape[1]]
            if learned and model_output.shape[1] == 2 * sample.shape[1]
            else model_output
        )

    def _marginals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        levels = [self._alpha_sigma(float(self.sigmas[i])) for i in indices]
        alpha, sigma = torch.tensor(levels, dtype=torch.float64).unbind(1)
        return alpha, sigma


def check_choice(config: Any, name: str, known: Sequence[str]) -> None:
    if config[name] not in known:
        raise ValueError(f"{name} must be one of {tuple(known)}, got {config[name]!r}")


SHIFTING = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}


class DEISMultistepScheduler(MultistepScheduler):
    """tAB-DEIS in log rho, of order 1 to 3 (Zhang and Chen 2023)."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "solver_order": 2, "prediction_type": "epsilon", **THRESHOLDING, "algorithm_type": "deis",
        "solver_type": "logrho", "lower_order_final": True, **SIGMA_CHOICES, "use_flow_sigmas": False, "flow_shift": 1.0,
        "timestep_spacing": "linspace", "steps_offset": 0, **SHIFTING,
    }  # fmt: skip
    synonyms: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    def _setup(self) -> None:
        check_choice(self.config, "algorithm_type", ("deis",))
        check_choice(self.config, "solver_type", ("logrho",))
        if self.config["solver_order"] not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {self.config['solver_order']!r}")
        super()._setup()

    def set_timesteps(self, num_inference_steps: int, device: Any = None, mu: float | None = None) -> None:  # type: ignore[override]
        self._set(*self._chosen(num_inference_steps, None, mu), device)

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        order, lower = self.config["solver_order"], self.config["lower_order_final"]
        deis(trace, self._path(), order=order, lower_order_final=lower, start=start)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)


class UniPCMultistepScheduler(MultistepScheduler):
    """UniPC of any order (Zhao et al. 2023). ``solver_p``, another scheduler as the predictor, is not offered."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "solver_order": 2, "prediction_type": "epsilon", **THRESHOLDING, "predict_x0": True, "solver_type": "bh2",
        "lower_order_final": True, "disable_corrector": (), "solver_p": None, **SIGMA_CHOICES, "use_flow_sigmas": False,
        "flow_shift": 1.0, "timestep_spacing": "linspace", "steps_offset": 0, "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False, **SHIFTING, "sigma_min": None, "sigma_max": None, "shift_terminal": None,
    }  # fmt: skip
    synonyms: ClassVar[dict[str, dict[str, str]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    }

    def _setup(self) -> None:
        check_choice(self.config, "solver_type", ("bh1", "bh2"))
        check_choice(self.config, "final_sigmas_type", FINAL_SIGMAS)
        if self.config["solver_p"] is not None:
            raise ValueError("solver_p must be None: another predictor than UniP is not offered")
        if self.config["shift_terminal"] is not None and not self.config["use_flow_sigmas"]:
            raise ValueError("shift_terminal needs use_flow_sigmas=True")
        super()._setup()

    def _prediction(self) -> Prediction:
        prediction = super()._prediction()
        if self.config["predict_x0"]:
            return prediction
        return Prediction(prediction_type=prediction.prediction_type)  # thresholds are of the clean sample

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        config = self.config
        if config["use_dynamic_shifting"] and mu is None:
            raise ValueError("mu must be given with use_dynamic_shifting=True")
        if sigmas is not None and not config["use_flow_sigmas"]:
            raise ValueError("sigmas can be given with use_flow_sigmas=True only")
        steps = num_inference_steps if sigmas is None else len(sigmas)
        flow = config["use_flow_sigmas"] and not any(config[n] for n in SIGMA_CHOICES)
        self._mu = mu
        if not flow:
            timesteps, levels = self._chosen(steps, None, None)
            if config["use_flow_sigmas"] and config["use_karras_sigmas"]:
                levels = levels / (levels + 1)
                timesteps = levels * config["num_train_timesteps"]
            self._set(timesteps, levels, device)
            return
        total = config["num_train_timesteps"]
        levels = np.linspace(1, 1 / total, steps + 1)[:-1] if sigmas is None else np.array(sigmas, dtype=np.float64)  # type: ignore[operator]
        if config["use_dynamic_shifting"]:
            levels = time_shifted(levels, mu, config["time_shift_type"])  # type: ignore[arg-type]
        else:
            levels = flow_shifted(levels, config["flow_shift"])
        if config["shift_terminal"]:
            levels = stretched_to(levels, config["shift_terminal"])
        if abs(levels[0] - 1) < 1e-6:  # at sigma = 1 there is no signal, and its logarithm is wanted
            levels[0] -= 1e-6
        self._set(levels * total, levels, device)

    def _final_sigma(self, sigmas: np.ndarray) -> float:
        if self.config["final_sigmas_type"] == "zero":
            return 0.0
        replaced = any(self.config[n] for n in (*SIGMA_CHOICES, "use_flow_sigmas"))
        return float(sigmas[-1]) if replaced else float(self._train_sigmas[0])

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        config = self.config
        unipc(
            trace, self._path(), order=config["solver_order"], solver_type=config["solver_type"],
            predict_x0=config["predict_x0"], lower_order_final=config["lower_order_final"],
            disable_corrector=config["disable_corrector"], from_last_sample=True, start=start,
        )  # fmt: skip

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)


def default_tau(t: float) -> float:
    """The stochasticity of SA-Solver where none is given: 1 between timesteps 200 and 800."""
    return 1.0 if 200 <= t <= 800 else 0.0


class SASolverScheduler(MultistepScheduler):
    """SA-Solver (Xue et al. 2023): stochastic Adams-Bashforth and Adams-Moulton of order up to 4."""

    defaults: ClassVar[dict[str, Any]] = {
        **BETAS, "predictor_order": 2, "corrector_order": 2, "prediction_type": "epsilon", "tau_func": None, **THRESHOLDING,
        "algorithm_type": "data_prediction", "lower_order_final": True, **SIGMA_CHOICES, "use_flow_sigmas": False,
        "flow_shift": 1.0, "lambda_min_clipped": -math.inf, "variance_type": None, "timestep_spacing": "linspace",
        "steps_offset": 0,
    }  # fmt: skip
    synonyms: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"dpmsolver++": "data_prediction", "deis": "data_prediction"}
    }

    def _setup(self) -> None:
        check_choice(self.config, "algorithm_type", ("data_prediction", "noise_prediction"))
        self.tau_func: Callable[[float], float] = self.config["tau_func"] or default_tau
        super()._setup()

    def _trace(self, trace: Trace, start: int, *, seeded: bool = False) -> None:  # type: ignore[override]
        config = self.config
        sa_solver(
            trace, self._path(), self.tau_func, predictor_order=config["predictor_order"],
            corrector_order=config["corrector_order"], predict_x0=config["algorithm_type"] == "data_prediction",
            lower_order_final=config["lower_order_final"], from_last_sample=not seeded, start=start,
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: Tensor | Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        return self._advance(
            self._without_variance(model_output, sample), timestep, sample, generator=generator, seeds=seeds,
            return_dict=return_dict, options={"seeded": seeds is not None},
        )  # fmt: skip


class IPNDMScheduler(Scheduler):
    """Improved PNDM for models that predict v over a continuous time."""

    defaults: ClassVar[dict[str, Any]] = {"num_train_timesteps": 1000, "trained_betas": None}

    def _setup(self) -> None:
        self.init_noise_sigma = 1.0
        self.set_timesteps(self.config["num_train_timesteps"])

    def _prediction(self) -> Prediction:
        return Prediction(prediction_type="v_prediction")

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        steps = torch.cat([torch.linspace(1, 0, num_inference_steps + 1)[:-1], torch.tensor([0.0])])
        trained = self.config["trained_betas"]
        self.betas = (
            torch.sin(steps * math.pi / 2) ** 2 if trained is None else torch.tensor(trained, dtype=torch.float32)
        )
        self.alphas = (1.0 - self.betas**2) ** 0.5
        self.timesteps = (torch.atan2(self.betas, self.alphas) / math.pi * 2)[:-1].to(device)
        self._restart()

    def _trace(self, trace: Trace, start: int, **options: Any) -> None:
        path = Path(self._values, self.alphas.double().tolist(), self.betas.double().tolist())
        ipndm(trace, path, start=start)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        return self._advance(model_output, timestep, sample, return_dict=return_dict)
