"""The configurations of every class that parity is held over: schedules, spacings, predictions, solver options."""

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
MIN = {"final_sigmas_type": "sigma_min"}
GENTLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Case(NamedTuple):
    name: str  # of the class
    config: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})  # of step

    @property
    def channels(self) -> int:
        """Of the model's output, for each of the sample's."""
        return 2 if self.config.get("variance_type") in ("learned", "learned_range") else 1

    def __str__(self) -> str:
        options = {**self.config, **self.options}
        return "-".join([self.name.removesuffix("Scheduler"), *(f"{k}={v}" for k, v in options.items())])


def cases() -> list[Case]:
    found: list[Case] = []

    def add(name: str, *configs: dict[str, Any], **options: Any) -> None:
        found.extend(Case(name, config, options) for config in configs)

    def grid(**axes: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    both = grid(timestep_spacing=SPACINGS, prediction_type=PREDICTIONS)
    without_sample = [c for c in both if c["prediction_type"] != "sample"]
    gentle = [{**GENTLE, "clip_sample": False, **c} for c in both]
    schedules = grid(beta_schedule=("scaled_linear", "squaredcos_cap_v2"), prediction_type=("v_prediction",))

    add(
        "DDPMScheduler",
        *both,
        *gentle,
        *schedules,
        {"beta_schedule": "sigmoid"},
        {"thresholding": True, "sample_max_value": 1.5},
    )
    add(
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "learned_range"},
    )
    add(
        "DDPMScheduler",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    )
    add(
        "DDIMScheduler",
        *both,
        *gentle,
        *schedules,
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"thresholding": True},
    )
    add("DDIMScheduler", *both, eta=0.7)
    add("DDIMScheduler", {}, {"prediction_type": "v_prediction"}, use_clipped_model_output=True, eta=0.3)
    add("DDIMInverseScheduler", *grid(timestep_spacing=SPACINGS[1:], prediction_type=PREDICTIONS[::2]))
    add(
        "EulerDiscreteScheduler",
        *both,
        *SIGMAS,
        *schedules,
        MIN,
        {"interpolation_type": "log_linear"},
        {"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True},
    )
    add(
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    )
    add("EulerDiscreteScheduler", {}, {"prediction_type": "v_prediction"}, s_churn=3.0, s_noise=1.01)
    add("EulerAncestralDiscreteScheduler", *without_sample, *schedules)
    add("HeunDiscreteScheduler", *both, *SIGMAS, {"clip_sample": True}, {"beta_schedule": "exp"})
    add("KDPM2DiscreteScheduler", *without_sample, *SIGMAS)
    add("KDPM2AncestralDiscreteScheduler", *without_sample, *SIGMAS)
    add("LMSDiscreteScheduler", *both, *SIGMAS)
    add("LMSDiscreteScheduler", {}, order=2)
    add("PNDMScheduler", *without_sample, {"set_alpha_to_one": True, **GENTLE}, {"steps_offset": 1})
    add("PNDMScheduler", *({**c, "skip_prk_steps": True} for c in without_sample))
    add("IPNDMScheduler", {})
    orders = grid(solver_order=(1, 2, 3), solver_type=("midpoint", "heun"))
    add(
        "DPMSolverMultistepScheduler",
        *both,
        *SIGMAS,
        *schedules,
        *orders,
        {"use_lu_lambdas": True},
        {"euler_at_final": True},
        {"thresholding": True, "sample_max_value": 1.5},
    )
    add(
        "DPMSolverMultistepScheduler",
        *({**o, **MIN, "lower_order_final": False} for o in orders),
        {"lambda_min_clipped": -5.1},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    )
    add(
        "DPMSolverMultistepScheduler",
        *({**o, **MIN, "algorithm_type": "dpmsolver", "prediction_type": p} for o in orders for p in PREDICTIONS),
    )
    add(
        "DPMSolverMultistepScheduler",
        *({**o, "algorithm_type": "sde-dpmsolver++"} for o in orders if o["solver_order"] < 3),
    )
    add(
        "DPMSolverMultistepScheduler",
        *({**o, **MIN, "algorithm_type": "sde-dpmsolver"} for o in orders if o["solver_order"] < 3),
    )
    add(
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    )
    add("DPMSolverMultistepInverseScheduler", *({**c, "solver_order": 2} for c in both), {"solver_order": 3})
    add(
        "DPMSolverSinglestepScheduler",
        *grid(prediction_type=PREDICTIONS),
        *SIGMAS,
        *orders,
        *({**o, **MIN, "algorithm_type": "dpmsolver"} for o in orders),
    )
    add(
        "DPMSolverSinglestepScheduler",
        *(
            {**o, "algorithm_type": "sde-dpmsolver++"}
            for o in orders
            if o != {"solver_order": 3, "solver_type": "heun"}
        ),
        {"lower_order_final": True, **MIN, "solver_order": 3},
    )
    add(
        "DEISMultistepScheduler",
        *both,
        *SIGMAS,
        *grid(solver_order=(1, 2, 3)),
        {"lower_order_final": False, "solver_order": 3},
    )
    add(
        "UniPCMultistepScheduler",
        *both,
        *SIGMAS,
        *schedules,
        *grid(solver_order=(1, 2, 3, 4)),
        *({**c, **MIN} for c in grid(solver_order=(1, 2, 3), solver_type=("bh1",))),
        {"disable_corrector": [0, 2]},
    )
    add(
        "UniPCMultistepScheduler",
        *({"predict_x0": False, **MIN, "solver_order": o, "prediction_type": p} for o in (2, 3) for p in PREDICTIONS),
    )
    add(
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"},
    )
    add("SASolverScheduler", *both, *SIGMAS, *grid(predictor_order=(1, 2, 3), corrector_order=(1, 2, 3, 4)))
    add(
        "SASolverScheduler", *grid(algorithm_type=("noise_prediction",), predictor_order=(2, 3), corrector_order=(2, 3))
    )
    add("LCMScheduler", *grid(prediction_type=PREDICTIONS), {"clip_sample": True}, {"timestep_scaling": 1.0})
    add("TCDScheduler", *grid(prediction_type=PREDICTIONS))
    add("TCDScheduler", {}, eta=0.0)
    edm = (
        {},
        {"sigma_schedule": "exponential"},
        MIN,
        {"prediction_type": "v_prediction"},
        {"sigma_data": 1.0, "sigma_max": 20.0},
    )
    add("EDMEulerScheduler", *edm)
    add("EDMEulerScheduler", {}, s_churn=3.0)
    add(
        "EDMDPMSolverMultistepScheduler",
        *edm,
        *orders,
        {"thresholding": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    )
    add("CMStochasticIterativeScheduler", {}, {"clip_denoised": False, "s_noise": 0.9})
    add(
        "FlowMatchEulerDiscreteScheduler",
        {},
        {"shift": 3.0},
        {"stochastic_sampling": True},
        {"shift_terminal": 0.1},
        {"invert_sigmas": True},
        *SIGMAS[1:],
    )
    add("FlowMatchHeunDiscreteScheduler", {}, {"shift": 3.0})
    add("FlowMatchHeunDiscreteScheduler", {}, s_churn=3.0)
    return found


CASES = cases()
CLASSES = sorted({case.name for case in CASES})
