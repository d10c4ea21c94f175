"""Whole trajectories of `DDPM` and `DDIM` against diffusers' schedulers: same model outputs, same generator."""

import itertools

import pytest
import torch
from torch import Tensor

from fastgen.samplers import DDIM, DDPM, draw_normal, linear_betas, scaled_linear_betas, squared_cosine_betas

from ..backends import import_peer

diffusers = import_peer("diffusers")

SCHEDULES = {
    "linear": (linear_betas, {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (scaled_linear_betas, {"beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (squared_cosine_betas, {}),
}
SHAPE = (2, 3, 6, 5)


def model_outputs(steps: int, channels: int = SHAPE[1], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (SHAPE[0], channels, *SHAPE[2:])
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.7 for _ in range(steps)]


def ours(solver, steps: int, outputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = draw_normal(SHAPE, generator, "cpu", dtype)
    plan = solver.plan(steps).to("cpu", dtype)
    xs = []
    for i, output in enumerate(outputs):
        noise = {"noise": draw_normal(SHAPE, generator, "cpu", dtype)} if plan.draws_noise[i] else {}
        x = plan.step(output, i, x, **noise)
        xs.append(x)
    return xs


def theirs(scheduler, steps: int, outputs: list[Tensor], dtype: torch.dtype, **kwargs) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(11)
    x = draw_normal(SHAPE, generator, "cpu", dtype)
    xs = []
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        x = scheduler.step(output, t, x, generator=generator, **kwargs).prev_sample
        xs.append(x)
    return xs


def lift_schedule(scheduler, betas: Tensor) -> None:
    """diffusers keeps 1 - alpha_bar as a float32 difference, wrong by 6e-4 at the first timestep; here in float64."""
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        error = (x - y).abs().max() / y.abs().max().clamp_min(1.0)
        assert error <= tolerance, f"step {i}: {error:.2e}"


def common(schedule: str, prediction_type: str, spacing: str, clip: bool) -> tuple[dict, dict]:
    betas, arguments = SCHEDULES[schedule]
    mine = {
        "betas": betas(1000, **arguments), "prediction_type": prediction_type, "timestep_spacing": spacing, "clip_sample": clip,
    }  # fmt: skip
    other = {
        "num_train_timesteps": 1000, "beta_schedule": schedule, "prediction_type": prediction_type,
        "timestep_spacing": spacing, "clip_sample": clip, **arguments,
    }  # fmt: skip
    return mine, other


CASES = list(
    itertools.product(("epsilon", "sample", "v_prediction"), ("linspace", "leading", "trailing"), (True, False))
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_those_of_diffusers(schedule):
    betas, arguments = SCHEDULES[schedule]
    expected = diffusers.DDPMScheduler(beta_schedule=schedule, **arguments).betas
    torch.testing.assert_close(betas(1000, **arguments).float(), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(("prediction_type", "spacing", "clip"), CASES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm(prediction_type, spacing, clip, variance_type):
    # without clipping, an epsilon model fed with noise it did not predict multiplies rounding by 1 / sqrt(alpha_bar)
    schedule = "scaled_linear" if prediction_type == "epsilon" and not clip else "linear"
    mine, other = common(schedule, prediction_type, spacing, clip)
    steps, outputs = 9, model_outputs(9)
    solver = DDPM(**mine, variance_type=variance_type)
    scheduler = diffusers.DDPMScheduler(**other, variance_type=variance_type)
    assert_same(ours(solver, steps, outputs, torch.float32), theirs(scheduler, steps, outputs, torch.float32), 1e-5)
    assert solver.plan(steps).timesteps == scheduler.timesteps.tolist()


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_variances(variance_type, schedule):
    mine, other = common(schedule, "v_prediction", "leading", True)
    channels = 6 if variance_type == "learned_range" else 3
    outputs = model_outputs(12, channels)
    solver = DDPM(**mine, variance_type=variance_type)
    scheduler = diffusers.DDPMScheduler(**other, variance_type=variance_type)
    lift_schedule(scheduler, SCHEDULES[schedule][0](1000, **SCHEDULES[schedule][1]))
    assert_same(ours(solver, 12, outputs, torch.float32), theirs(scheduler, 12, outputs, torch.float32), 1e-5)


def test_ddpm_learned_variance_is_a_logarithm():
    """diffusers takes the square root of what an improved-DDPM model predicts as a logarithm; we follow the paper's code."""
    mine, _ = common("linear", "epsilon", "leading", True)
    output = model_outputs(1, 6)[0]
    plan = DDPM(**mine, variance_type="learned").plan(10)
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    mean = plan.step(output, 3, x, noise=torch.zeros(SHAPE))
    expected = mean + torch.exp(0.5 * output[:, 3:]) * noise
    torch.testing.assert_close(plan.step(output, 3, x, noise=noise), expected, rtol=1e-5, atol=1e-5)


def test_ddpm_fixed_large_log_is_finite():
    """diffusers 0.42 takes the square root of a negative logarithm here and returns NaN; the log form is the same number."""
    mine, other = common("linear", "epsilon", "leading", True)
    outputs = model_outputs(5)
    log = ours(DDPM(**mine, variance_type="fixed_large_log"), 5, outputs, torch.float32)
    plain = ours(DDPM(**mine, variance_type="fixed_large"), 5, outputs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(log, plain, strict=True))
    assert (
        theirs(diffusers.DDPMScheduler(**other, variance_type="fixed_large_log"), 5, outputs, torch.float32)[0]
        .isnan()
        .any()
    )


@pytest.mark.parametrize(("prediction_type", "spacing", "clip"), CASES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(prediction_type, spacing, clip, eta):
    schedule = "scaled_linear" if prediction_type == "epsilon" and not clip else "linear"
    mine, other = common(schedule, prediction_type, spacing, clip)
    steps, outputs = 9, model_outputs(9)
    solver = DDIM(**mine, eta=eta)
    scheduler = diffusers.DDIMScheduler(**other)
    assert_same(
        ours(solver, steps, outputs, torch.float32), theirs(scheduler, steps, outputs, torch.float32, eta=eta), 1e-5
    )
    assert solver.plan(steps).timesteps == scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_clipped_output_and_last_step(prediction_type, set_alpha_to_one):
    mine, other = common("linear", prediction_type, "leading", True)
    outputs = model_outputs(7)
    solver = DDIM(**mine, set_alpha_to_one=set_alpha_to_one, use_clipped_model_output=True, steps_offset=1)
    scheduler = diffusers.DDIMScheduler(**other, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    expected = theirs(scheduler, 7, outputs, torch.float32, use_clipped_model_output=True)
    assert_same(ours(solver, 7, outputs, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_float64(kind):
    """With diffusers' schedule lifted to float64 the two agree to 1e-10."""
    mine, other = common("linear", "epsilon", "leading", True)
    outputs = model_outputs(10, dtype=torch.float64)
    solver = DDPM(**mine) if kind == "ddpm" else DDIM(**mine, eta=0.5)
    scheduler = (diffusers.DDPMScheduler if kind == "ddpm" else diffusers.DDIMScheduler)(**other)
    lift_schedule(scheduler, linear_betas(1000))
    kwargs = {} if kind == "ddpm" else {"eta": 0.5}
    assert_same(
        ours(solver, 10, outputs, torch.float64), theirs(scheduler, 10, outputs, torch.float64, **kwargs), 1e-10
    )
