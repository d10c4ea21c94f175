"""Every stand-in against the diffusers 0.42 scheduler of its name, over options, spacings, predictions and step counts.

float64 within 1e-10 once the peer's levels, which it keeps in float32, are taken in float64. float32 within 1e-5, or, where a
trajectory multiplies rounding, as far off the float64 one as its conditioning or twice the peer's own error allows.
"""

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch

from fastgen.samplers import diffusers as ours
from fastgen.samplers.engine.path import Path
from fastgen.samplers.solvers.dpm_solver import Integrator

from ...backends import import_peer
from ..rounding import ROUNDINGS, UNIT, assert_as_exact, of_levels
from .parity import error, in_float64, pair, run

import_peer("diffusers")

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
MIN = {"final_sigmas_type": "sigma_min"}
GENTLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(class, configuration, options of step)."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def add(name: str, *configs: dict[str, Any], **options: Any) -> None:
        found.extend((name, config, options) for config in configs)

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


def name_of(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    name, config, options = case
    return "-".join([name.removesuffix("Scheduler"), *(f"{k}={v}" for k, v in {**config, **options}.items())])


CASES = cases()


def check(name: str, config: dict[str, Any], options: dict[str, Any], steps: int, begin: int | None = None) -> None:
    """Timesteps and samples of a trajectory, as the docstring of this file has it."""
    channels = 2 if config.get("variance_type") == "learned_range" else 1
    samples, expected, rounded = {}, {}, []
    for dtype in (torch.float32, torch.float64):
        mine, peer = pair(name, **config)
        mine.set_timesteps(steps)
        peer.set_timesteps(steps)
        assert_same_timesteps(mine, peer, name)
        kwargs = {"channels": channels, "begin": begin, **options}
        if "variance_noise" in mine.step.__code__.co_varnames and config.get("algorithm_type", "").startswith("sde"):
            kwargs["variance_noise"] = torch.randn((2, 3, 6, 5), generator=torch.Generator().manual_seed(1)).to(dtype)
        samples[dtype] = run(mine, dtype, **kwargs)
        with in_float64(peer) if dtype == torch.float64 else contextlib.nullcontext():
            expected[dtype] = run(peer, dtype, clock=mine, **kwargs)
        if dtype == torch.float64:
            mine.set_timesteps(steps)
            rounded = run(mine, dtype, rounds=True, **kwargs)
    exact = expected[torch.float64]
    assert error(samples[torch.float64], exact) <= 1e-10
    of_storage = error(rounded, exact)
    for i, (a, b, c) in enumerate(zip(samples[torch.float32], expected[torch.float32], exact, strict=True)):
        assert_as_exact(a, b, c, of_storage, f"step {i}: ")


def assert_same_timesteps(mine: Any, peer: Any, name: str) -> None:
    """Whole ones are equal; the others are found from noise levels in float32, and as close as those let them be."""
    if not peer.timesteps.is_floating_point():
        assert torch.equal(mine.timesteps, peer.timesteps)
        return
    allowed = of_levels(
        peer.timesteps,
        getattr(peer, "alphas_cumprod", None),
        interpolated=name.startswith("KDPM2"),
        ancestral="Ancestral" in name,
    )
    apart = (mine.timesteps.double() - peer.timesteps.double()).abs()
    assert mine.timesteps.shape == peer.timesteps.shape and (apart <= allowed).all(), (
        f"{apart / allowed} of what is allowed"
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_trajectory(case):
    check(*case, steps=10)


SOLVERS = sorted({case[0] for case in CASES})


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 16, 20])
@pytest.mark.parametrize("name", SOLVERS)
def test_step_counts(name, steps):
    """Warm-up, the last steps of short and long trajectories, odd counts."""
    if (name == "PNDMScheduler" and steps < 4) or (name in ("FlowMatchHeunDiscreteScheduler",) and steps == 1):
        pytest.skip("diffusers fails for so few steps")
    check(name, {}, {}, steps=steps)


LATE = [n for n in SOLVERS if hasattr(getattr(ours, n), "set_begin_index") and n not in (
    "DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler", "DPMSolverMultistepInverseScheduler")]  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_trajectory_that_begins_later(name):
    """Image to image: multistep solvers warm up where the trajectory begins."""
    order = getattr(ours, name).order
    check(name, {}, {}, steps=12, begin=4 * order)


@pytest.mark.parametrize("name", SOLVERS)
def test_levels(name):
    """Noise levels, and the noise a pipeline begins with."""
    mine, peer = pair(name)
    mine.set_timesteps(13)
    peer.set_timesteps(13)
    if hasattr(peer, "init_noise_sigma"):
        assert math.isclose(float(mine.init_noise_sigma), float(peer.init_noise_sigma), rel_tol=ROUNDINGS * UNIT)
    for attribute in ("sigmas", "alphas_cumprod", "betas"):
        if hasattr(peer, attribute) and name not in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
            torch.testing.assert_close(
                getattr(mine, attribute), getattr(peer, attribute), rtol=ROUNDINGS * UNIT, atol=UNIT
            )


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("IPNDMScheduler", "DDIMInverseScheduler")])
def test_add_noise(name):
    mine, peer = pair(name)
    mine.set_timesteps(10)
    peer.set_timesteps(10)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    at = mine.timesteps[[2, 5]]
    if name.startswith("FlowMatchHeun"):
        at = mine.timesteps[2:3]
        expected = peer.scale_noise(x, peer.timesteps[2], noise)
    else:
        expected = peer.scale_noise(x, at, noise) if name.startswith("Flow") else peer.add_noise(x, noise, at)
    torch.testing.assert_close(mine.add_noise(x, noise, at), expected, rtol=1e-5, atol=1e-5)


def test_unipc_bh1_ends_at_zero():
    """diffusers multiplies an infinite B(h) by zero in the last step and returns NaN; the limit is the clean sample."""
    mine, peer = pair("UniPCMultistepScheduler", solver_type="bh1")
    mine.set_timesteps(6)
    peer.set_timesteps(6)
    samples = run(mine, torch.float32)
    assert all(x.isfinite().all() for x in samples)
    with pytest.raises(AssertionError):
        error(samples, run(peer, torch.float32))


def test_third_order_sde_has_the_series_coefficient():
    """The second difference is multiplied by an integral that vanishes with the step; diffusers has -1/2 in it for +1/2, and its
    coefficient tends to -1."""
    for h in (1e-1, 1e-2, 1e-3):
        path = Path([1.0], [1.0, 1.0], [1.0, math.exp(-h)])
        coefficient = Integrator(path, 0, 1, "sde-dpmsolver++", "heun").of_difference(2)
        assert math.isclose(coefficient, 2 * h / 6, rel_tol=h)
