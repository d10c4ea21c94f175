"""Every solver by name: its order of convergence on a Gaussian mixture whose score is known, its distribution, its noise."""

import functools
import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen._schema import COLUMNS
from fastgen.samplers import SOLVERS, BrownianTree, SigmaSolver, make_solver, sample
from fastgen.samplers.schedules import SIGMA_SPACINGS
from fastgen.samplers.solvers.dpm_solver import multistep

from .convergence import ORDERS, exact_trajectories, integrate
from .mixture import DEVIATIONS, MEANS, WEIGHTS, clean
from .mixture import draw as draw_mixture


class Exact:
    """The exact model of the mixture for a solver: called in the order of its plan, it knows where it is."""

    def __init__(self, name: str, steps: int, **arguments) -> None:
        self.solver = make_solver(name, **arguments)
        plan = self.solver.plan(steps)
        self.stages = [stage for stage in plan.stages if stage.calls_model]
        self.prediction = plan.prediction
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        stage = self.stages[self.calls]
        self.calls += 1
        x0 = clean(x, stage.alpha, stage.sigma)
        kind = self.prediction.prediction_type
        if self.prediction.sigma_data is not None:  # the sample as the model sees it is c_in x
            p, q = self.prediction.to_sample(1.0, stage.sigma / stage.alpha)
            return ((x0 - p * x / stage.alpha) / q).to(x.dtype)
        eps = (x - stage.alpha * x0) / stage.sigma
        if kind == "epsilon":
            return eps.to(x.dtype)
        if kind == "v_prediction":
            return (stage.alpha * eps - stage.sigma * x0).to(x.dtype)
        return (eps - x0).to(x.dtype) if kind == "flow_prediction" else x0.to(x.dtype)


def draw(name: str, steps: int, noise: Tensor, **kwargs) -> Tensor:
    arguments = kwargs.pop("arguments", {})
    model = Exact(name, steps, **arguments)
    return sample(
        model, noise.shape, model.solver, steps=steps, noise=noise, dtype=noise.dtype, progress=False, **kwargs
    )


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    """Halving the step divides the global error by 2 to the order."""
    order, arguments = ORDERS[name]
    x, exact = exact_trajectories()
    errors = [float((integrate(name, n, x, arguments) - exact).norm()) for n in (192, 384)]
    rate = math.log2(errors[0] / errors[1])
    assert order - 0.25 <= rate <= order + 1.3, (errors, rate)


STOCHASTIC = (
    "ddpm",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "sa_solver",
)
FULL = sorted(set(SOLVERS) - {"lcm", "tcd", "consistency"})


@pytest.mark.parametrize("name", FULL)
def test_distribution(name):
    """100 steps with the exact score: mean, covariance and weights of the mixture, within 5 standard errors and a stated bias.

    The bias of the discretisation and of starting from a unit normal is allowed 0.02 in means and weights, 0.04 in covariances.
    """
    n = 4000
    arguments = {"clip_sample": False} if name in ("ddpm", "ddim", "repaint") else {}
    arguments |= {"jump_n_sample": 3} if name == "repaint" else {}
    seeds = torch.arange(n)
    model = Exact(name, 100, **arguments)
    x = sample(model, (n, 2), model.solver, steps=100, seeds=seeds, progress=False).double()
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    spread = (
        WEIGHTS[:, None, None] * (DEVIATIONS[:, None, None] ** 2 * torch.eye(2) + MEANS[:, :, None] * MEANS[:, None, :])
    ).sum(0)
    covariance = spread - mean[:, None] * mean
    errors = x.std(0) / math.sqrt(n)
    assert ((x.mean(0) - mean).abs() <= 5 * errors + 0.02).all(), x.mean(0) - mean
    fourth = (x - x.mean(0)).pow(4).mean(0).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() <= 5 * fourth.outer(fourth).sqrt() / math.sqrt(n) + 0.04).all()
    nearest = ((x[:, None] - MEANS).square().sum(-1) / DEVIATIONS**2 + 4 * DEVIATIONS.log()).argmin(1)
    fractions = torch.bincount(nearest, minlength=3) / n
    truth = draw_mixture(200_000)
    expected = torch.bincount(
        ((truth[:, None] - MEANS).square().sum(-1) / DEVIATIONS**2 + 4 * DEVIATIONS.log()).argmin(1), minlength=3
    ) / len(truth)
    assert ((fractions - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 0.02).all()


def test_the_authors_third_order_is_the_second():
    """What diffusers and k-diffusion compute, kept in their stand-ins: half the second derivative."""
    x, exact = exact_trajectories()
    true = float((integrate("dpmpp_3m", 192, x, {"lower_order_final": False}) - exact).norm())
    with mock.patch("fastgen.samplers.solvers.dpm_solver.multistep", functools.partial(multistep, halved=True)):
        errors = [float((integrate("dpmpp_3m", n, x, {"lower_order_final": False}) - exact).norm()) for n in (96, 192)]
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.3
    assert errors[1] > 3 * true


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_an_image_depends_on_its_seed_alone(name):
    shape, seeds = (3, 2, 4, 4), [7, 8, 9]

    def model(x, t):
        return torch.tanh(x)

    together = sample(model, shape, name, steps=6, seeds=seeds, progress=False)
    assert together.isfinite().all()
    for k, seed in enumerate(seeds):
        alone = sample(model, (1, *shape[1:]), name, steps=6, seeds=[seed], progress=False)
        assert torch.equal(alone[0], together[k])


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_who_keeps_a_sample_does_not_change_it(name):
    """Written over its sample or into fresh memory, as where a callback is shown it: the same bits."""
    shape, seen = (2, 3, 16, 16), []
    run = functools.partial(sample, lambda x, t: torch.tanh(x), shape, name, steps=5, seeds=[1, 2], progress=False)
    assert torch.equal(run(), run(callback=lambda i, t, x: seen.append(x)))
    assert torch.equal(run(), seen[-1])


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_one_kernel_a_call_of_the_model(name):
    """Nothing of the sample's size beside `sampler_step`, its noise included; x + d g alone is one `aten.add`."""
    shape = (3, 2, 32, 32)

    class Count(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and first.shape == shape and "detach" not in str(func):
                self.names.append(str(func))
            if func is torch.ops.fastgen.sampler_step_out.default:
                self.names.append(str(func))
            return out

    fixed, start = torch.randn(shape), torch.randn(shape)
    calls = len(make_solver(name).plan(5))
    with Count() as count:
        sample(lambda x, t: fixed, shape, name, steps=5, seeds=[1, 2, 3], noise=start, progress=False)
    steps = [n for n in count.names if "sampler_step" in n or (name.startswith("flow_") and n.startswith("aten.add."))]
    assert len(steps) == calls
    assert set(count.names) <= {*steps, "aten.empty_like.default"}  # memory for a value that later steps read


def test_brownian_paths_do_not_depend_on_the_steps():
    tree = BrownianTree([1, 2], (2, 500), 0.01, 10.0, dtype=torch.float64)
    sigmas = [10.0, 3.0, 1.0, 0.4, 0.01]
    logs = [math.log(s) for s in sigmas]
    parts = [
        tree(a, b) * math.sqrt(x - y) for a, b, x, y in zip(sigmas[:-1], sigmas[1:], logs[:-1], logs[1:], strict=True)
    ]
    whole = tree(sigmas[0], sigmas[-1]) * math.sqrt(logs[0] - logs[-1])
    # between the finest points the path is a line, whose variance is short by up to 2^-14 of the range in each part
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=2e-3)
    stacked = torch.stack([p.flatten() / p.std() for p in parts])
    assert (torch.corrcoef(stacked) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.15
    assert all(abs(float(tree(a, b).std()) - 1) < 0.1 for a, b in itertools.pairwise(sigmas))
    torch.testing.assert_close(tree(3.0, 1.0), -tree(1.0, 3.0), rtol=0, atol=1e-5)


def test_brownian_noise_follows_one_path():
    """With more steps the samples of the same seeds come closer to each other than with independent noise."""
    shape, seeds = (64, 2), list(range(64))

    def end(steps: int, brownian: bool) -> Tensor:
        model = Exact("dpmpp_2m_sde", steps)
        return sample(model, shape, model.solver, steps=steps, seeds=seeds, brownian=brownian, progress=False)

    followed = float((end(60, True) - end(120, True)).norm())
    independent = float((end(60, False) - end(120, False)).norm())
    assert followed < 0.5 * independent


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nothing", {}, "solver must be one of"),
        ("dpmpp_2m", {"order": 4}, "order must be one of"),
        ("dpmpp_2m", {"algorithm": "dpmsolver"}, "needs final_sigma='min'"),
        ("euler", {"sigma_spacing": "even"}, "sigma_spacing must be one of"),
        ("euler", {"final_sigma": "none"}, "final_sigma must be"),
        ("flow_euler", {"shift": 0.0}, "shift must be positive"),
        ("dpmpp_2m_sde", {"order": 1}, "order must be 2 or 3"),
        ("euler_ancestral", {"eta": -1.0}, "eta must be at least 0 and finite, got -1.0"),
        ("dpmpp_2m_sde", {"eta": math.nan}, "eta must be at least 0 and finite, got nan"),
        ("dpm_2_ancestral", {"s_noise": math.inf}, "s_noise must be"),
        ("heun", {"s_churn": -2.0}, "s_churn must be"),
        ("edm_heun", {"s_noise": math.nan}, "s_noise must be"),
        ("tcd", {"eta": -1.0}, r"eta must be in \[0, 1\]"),
        ("repaint", {"eta": 2.0}, r"eta must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_solver(name, **arguments)


@pytest.mark.parametrize("spacing", SIGMA_SPACINGS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if isinstance(make_solver(name), SigmaSolver)])
def test_a_schedule_of_one_timestep_has_one_noise_level(name, spacing):
    solver = make_solver(name, betas=torch.tensor([0.3], dtype=torch.float64), sigma_spacing=spacing)
    with pytest.raises(
        ValueError, match=r"steps must be in \[1, 1\]|sigma_min and sigma_max must differ for \d noise levels"
    ):
        solver.plan(2)
    with pytest.raises(ValueError, match=r"final_sigma='min' is .*, where the trajectory begins|steps must be"):
        replace(solver, final_sigma="min").plan(1)


def test_a_last_step_of_no_length_changes_nothing():
    """Karras' levels end in the first timestep of the schedule, and so does ``final_sigma="min"``."""
    table = make_solver("dpmpp_2m_sde", sigma_spacing="karras", final_sigma="min").plan(5).to("cpu").table
    assert table[-1, COLUMNS.index("prediction")] == table[-1, COLUMNS.index("noise")] == 0


def test_bad_steps_and_brownian():
    with pytest.raises(ValueError, match="steps must be"):
        make_solver("lcm").plan(51)
    with pytest.raises(ValueError, match="steps must be"):
        make_solver("euler").plan(0)
    with pytest.raises(ValueError, match="at least 4"):
        make_solver("pndm", warm_up=True).plan(3)
    with pytest.raises(ValueError, match="brownian=True needs seeds"):
        sample(lambda x, t: x, (1, 2), "dpmpp_sde", steps=3, brownian=True, progress=False)
    with pytest.raises(ValueError, match="needs a stochastic solver"):
        sample(lambda x, t: x, (1, 2), "euler", steps=3, seeds=[1], brownian=True, progress=False)
