"""`Plan.step`: what it refuses, that a refused step changes nothing, and that its short way gives what the long one does."""

import numpy as np
import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.samplers import DDIM, DDPM, SOLVERS, make_solver
from fastgen.samplers.engine.plan import Plan

SHAPE = (3, 2, 4, 4)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    output, sample, noise = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return output, sample, noise


def follow(plan: Plan, steps: int, output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor) -> dict:
    """The history that the first steps leave."""
    history: dict = {}
    for i in range(steps):
        sample = plan.step(output, i, sample, history=history, noise=noise)
    return history


WRONG_NOISE = {
    "nothing": (None, ValueError, "draws noise: give noise or seeds"),
    "one sample's": (torch.zeros(1, 2, 4, 4), ValueError, r"noise must have the shape of sample \(3, 2, 4, 4\)"),
    "too few samples'": (torch.zeros(2, 2, 4, 4), ValueError, "noise must have the shape"),
    "a scalar": (torch.zeros(()), ValueError, "noise must have the shape"),
    "on another device": (torch.zeros(SHAPE, device="meta"), ValueError, "noise must be on the device of sample"),
    "integers": (torch.zeros(SHAPE, dtype=torch.int32), TypeError, "noise must be a floating-point tensor"),
    "complex": (torch.zeros(SHAPE, dtype=torch.complex64), TypeError, "noise must be a floating-point tensor"),
    "NumPy's": (np.zeros(SHAPE, dtype=np.float32), TypeError, "noise must be a floating-point tensor, got ndarray"),
    "a list": ([0.0], TypeError, "noise must be a floating-point tensor, got list"),
}


@pytest.mark.parametrize("case", WRONG_NOISE)
@pytest.mark.parametrize("history", [None, {}], ids=["no history", "history"])
def test_wrong_noise_is_refused(case, history):
    noise, error, message = WRONG_NOISE[case]
    output, sample, _ = tensors()
    with pytest.raises(error, match=message):
        DDPM().plan(4).step(output, 0, sample, noise=noise, history=history)


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        ([1, 2], ValueError, "seeds must be one per sample, got 2"),
        (torch.tensor([1, 2]), ValueError, "seeds must be one per sample, got 2"),
        (torch.tensor([[1], [2], [3]]), ValueError, "one-dimensional"),
        (torch.tensor([1, 2, 3], device="meta"), ValueError, "seeds must be on the device of sample"),
        (torch.tensor([1, 2, 3], dtype=torch.int32), TypeError, "int64"),
        ([1.0, 2.0, 3.0], TypeError, "integers"),
        (3, TypeError, "seeds must be a list or tensor"),
    ],
)
def test_wrong_seeds_are_refused(seeds, error, message):
    output, sample, _ = tensors()
    with pytest.raises(error, match=message):
        DDPM().plan(4).step(output, 0, sample, seeds=seeds)


@pytest.mark.parametrize(
    "seeds",
    [np.array([1, 2, 2**63 + 1], dtype=np.uint64), [np.int64(1), 2, np.uint64(2**63 + 1)]],
    ids=["array", "list"],
)
def test_numpy_integers_are_seeds(seeds):
    output, sample, _ = tensors()
    plan = DDPM().plan(4)
    assert torch.equal(plan.step(output, 0, sample, seeds=seeds), plan.step(output, 0, sample, seeds=[1, 2, 2**63 + 1]))


def test_noise_and_seeds_exclude_each_other():
    output, sample, noise = tensors()
    with pytest.raises(ValueError, match="noise or seeds, not both"):
        DDPM().plan(4).step(output, 0, sample, noise=noise, seeds=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model_output": torch.zeros(1, 2, 4, 4)}, ValueError, "model_output must have the shape"),
        ({"model_output": torch.zeros(SHAPE, device="meta")}, ValueError, "model_output must be on the device"),
        (
            {"model_output": np.zeros(SHAPE, dtype=np.float32)},
            TypeError,
            "model_output must be a floating-point tensor",
        ),
        ({"sample": torch.zeros(2, 2, 4, 4)}, ValueError, "must have the shape of sample"),
        ({"sample": np.zeros(SHAPE, dtype=np.float32)}, TypeError, "sample must be a floating-point tensor"),
        ({"sample": torch.zeros(SHAPE, device="meta")}, ValueError, "on the device of sample"),
        ({"sample": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "sample must be a floating-point tensor"),
        ({"uncond": torch.zeros(1, 2, 4, 4)}, ValueError, "uncond must have the shape"),
        ({"known_noise": torch.zeros(SHAPE)}, ValueError, "known_noise comes with mask and known"),
    ],
)
def test_wrong_operands_are_refused(wrong, error, message):
    output, sample, _ = tensors()
    given = {"model_output": output, "sample": sample, **wrong}
    with pytest.raises(error, match=message):
        DDIM().plan(4).step(given.pop("model_output"), 0, given.pop("sample"), **given)


def test_a_table_elsewhere_is_refused():
    output, sample, _ = tensors()
    with pytest.raises(ValueError, match="table must be on the device of sample"):
        DDIM().plan(4).to("meta").step(output, 0, sample)


@pytest.mark.parametrize("i", [-1, 4])
def test_a_step_past_the_end_is_refused(i):
    output, sample, _ = tensors()
    with pytest.raises(IndexError, match=r"step must be in \[0, 4\)"):
        DDIM().plan(4).step(output, i, sample)


def test_values_kept_for_another_batch_are_refused():
    """A history of 3 samples read by a step of 4: out of bounds, were it not looked at."""
    output, sample, noise = tensors()
    plan = make_solver("dpmpp_2m").plan(8)
    history = follow(plan, 2, output, sample, noise)
    larger = torch.zeros(4, *SHAPE[1:])
    with pytest.raises(ValueError, match=r"history\[0\] must have the shape of sample \(4, 2, 4, 4\)"):
        plan.step(larger, 2, larger, history=history)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "sa_solver", "heun"])
def test_a_refused_step_leaves_the_history_alone(name):
    output, sample, noise = tensors()
    plan = make_solver(name).plan(8)
    for steps in range(4):
        history = follow(plan, steps, output, sample, noise)
        before = dict(history)
        with pytest.raises(ValueError, match="must have the shape"):
            plan.step(output[:1], steps, sample, history=history, noise=noise)
        assert history.keys() == before.keys() and all(history[k] is before[k] for k in before)


def test_steps_that_share_values_want_a_history():
    output, sample, _ = tensors()
    plan = make_solver("dpmpp_2m").plan(4)
    with pytest.raises(ValueError, match="give one dict as history to all steps"):
        plan.step(output, 0, sample)
    with pytest.raises(ValueError, match="step 1 reads what earlier steps kept"):
        plan.step(output, 1, sample, history={})


def followed(plan: Plan, mode: str, guided: bool, monkeypatch: pytest.MonkeyPatch, short: bool) -> list[torch.Tensor]:
    """Every sample of a trajectory, by the short way of a step or by the public op alone."""
    output, sample, noise = tensors()
    if not short:
        monkeypatch.setattr(Plan, "_may_have", lambda *operands: False)
    seen, history = [sample], {}
    seeds = torch.tensor([1, 2, 3])
    for i in range(len(plan)):
        drawn = {"noise": philox_normal(seeds, SHAPE, i)} if mode == "noise" else {"seeds": seeds}
        uncond = noise if guided else None
        seen.append(plan.step((i + 1) * output, i, seen[-1], history=history, uncond=uncond, **drawn))
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("mode", ["noise", "seeds"])
@pytest.mark.parametrize(
    "name", sorted(set(SOLVERS) - {"edm_dpmpp_2m", "edm_euler", "edm_heun", "consistency", "repaint"})
)
def test_the_short_way_is_the_long_one(name, mode, monkeypatch):
    """The same kernel and the same bits, whatever a solver keeps for later; with guidance too."""
    for scale in (1.0, 2.5):
        plan = make_solver(name).plan(5, guidance_scale=scale)
        short = followed(plan, mode, scale != 1, monkeypatch, True)
        for a, b in zip(short, followed(plan, mode, scale != 1, monkeypatch, False), strict=True):
            if scale == 1 and any(stage.added is not None for stage in plan.stages):
                torch.testing.assert_close(
                    a, b, rtol=1e-6, atol=1e-5
                )  # x + d g by torch's own kernel: one rounding apart
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_sample_keeps_its_dtype(dtype):
    output, sample, noise = tensors()
    plan = DDPM().plan(4).to("cpu", dtype)
    following = plan.step(output, 0, sample.to(dtype), noise=noise.to(dtype))
    assert following.dtype == dtype
    exact = DDPM().plan(4).step(output.double(), 0, sample.to(dtype).double(), noise=noise.to(dtype).double())
    torch.testing.assert_close(following.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_pass_through_a_step():
    output, sample, noise = (t.requires_grad_() for t in tensors(torch.float64))
    plan = DDPM(clip_sample=False).plan(4)
    plan.step(output, 0, sample, noise=noise).sum().backward()
    row = dict(zip(("sample", "noise"), (sample.grad, noise.grad), strict=True))
    assert output.grad is not None and all(g is not None and (g == g.flatten()[0]).all() for g in row.values())
    with torch.no_grad():
        assert not plan.step(output, 0, sample, noise=noise).requires_grad
