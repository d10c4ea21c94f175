"""The probability-flow ODE: orders of convergence, tolerances, the way there and back, and likelihoods in closed form."""

import functools
import math

import pytest
import torch

from fastgen.samplers.score import VE, VP, SubVP, bits_per_dim, encode, log_likelihood, perturb, sample_ode

from ..mixture import assert_reproduced, draw, exact_score

SDES = [VP(), SubVP(), VE(0.01, 10.0)]
STD = 0.5
START = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TIGHT = {"atol": 1e-12, "rtol": 1e-12, "dtype": torch.float64, "eps": 0.1}


@functools.cache
def exact_flow(sde):
    """Where the flow of the mixture takes START times the prior's deviation, to 1e-12."""
    return sample_ode(exact_score(sde), sde, (40, 2), noise=START * sde.prior_std, **TIGHT)


def gaussian_score(sde, std=STD):
    def score(x, t):
        mean, noise = sde.marginal(t)
        return -x / ((mean * std) ** 2 + noise**2).reshape(-1, *[1] * (x.dim() - 1))

    return score


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize(("method", "order", "steps"), [("euler", 1, 160), ("heun", 2, 160), ("rk4", 4, 80)])
def test_order_of_convergence(sde, method, order, steps):
    """Against a solution to 1e-12, twice the steps divide the mean error on the mixture by 2^order."""
    score, noise, exact = exact_score(sde), START * sde.prior_std, exact_flow(sde)
    errors = [
        (
            sample_ode(score, sde, (40, 2), n, method=method, noise=noise, eps=0.1, dtype=torch.float64) - exact
        ).abs().mean()
        for n in (steps, 2 * steps)
    ]  # fmt: skip
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_dormand_prince_has_order_five(sde):
    """On a Gaussian, whose flow is known: x(eps) = x(T) S(eps) / S(T), S the deviation of the marginal."""
    wide = [math.hypot(mean * STD, std) for mean, std in (sde.marginal(0.2), sde.marginal(1.0))]
    errors = []
    for n in (40, 80):
        x = sample_ode(gaussian_score(sde), sde, (40, 2), n, method="rk45", noise=START, eps=0.2, dtype=torch.float64)
        errors.append((x - START * wide[0] / wide[1]).abs().mean())
    assert math.log2(errors[0] / errors[1]) > 4.6


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_adaptive_steps_meet_their_tolerance(sde):
    """Global errors stay within 30 tolerances (the control is of each step), and a looser tolerance costs less."""
    score, noise, calls = exact_score(sde), START * sde.prior_std, []

    def counting(x, t):
        calls.append(t)
        return score(x, t)

    exact, costs = exact_flow(sde), []
    for tolerance in (1e-3, 1e-5, 1e-7):
        calls.clear()
        x = sample_ode(
            counting, sde, (40, 2), noise=noise, atol=tolerance, rtol=tolerance, eps=0.1, dtype=torch.float64
        )
        assert (x - exact).abs().max() < 30 * tolerance
        costs.append(len(calls))
    assert costs[0] < costs[1] < costs[2] < 400


@pytest.mark.parametrize(("steps", "method"), [(None, "rk45"), (60, "heun")])
def test_the_flow_reproduces_a_mixture(steps, method):
    """The bias is of the prior and of stopping at eps: below 0.01."""
    sde = VP()
    x = sample_ode(
        exact_score(sde), sde, (10000, 2), steps, method=method, seeds=torch.arange(10000), atol=1e-4, rtol=1e-4
    )
    assert_reproduced(x, bias=0.01)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_encoding_and_back(sde):
    """Data becomes the prior's normals, and comes back from them."""
    score, x = exact_score(sde), draw(3000)
    noised = perturb(x, torch.full((3000,), sde.eps), torch.randn(3000, 2).double(), sde)
    before = noised.clone()
    latent = encode(noised, score, sde, atol=1e-7, rtol=1e-7)
    assert torch.equal(noised, before)
    back = sample_ode(score, sde, (3000, 2), noise=latent, dtype=torch.float64, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(back, noised, rtol=1e-4, atol=1e-4)
    unit = latent / sde.prior_std
    assert unit.mean(0).abs().max() < 4.5 / math.sqrt(3000) + 0.01
    assert (unit.var(0) - 1).abs().max() < 4.5 * math.sqrt(
        2 / 3000
    ) + 0.02  # the variance of VE's prior lacks the data's


def test_denoising_is_tweedies_formula():
    sde, eps = VP(), 0.2
    kwargs = {"steps": 5, "method": "heun", "noise": START, "eps": eps, "dtype": torch.float64}
    x = sample_ode(gaussian_score(sde), sde, (40, 2), **kwargs)
    mean, std = sde.marginal(eps)
    expected = x * mean * STD**2 / ((mean * STD) ** 2 + std**2)  # E[x0 | x] of a Gaussian
    torch.testing.assert_close(sample_ode(gaussian_score(sde), sde, (40, 2), denoise=True, **kwargs), expected)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "rk45"])
def test_fixed_steps_a_sample_depends_on_its_seed_alone(method):
    def run(seeds):
        return sample_ode(gaussian_score(VP()), VP(), (len(seeds), 3), 5, method=method, seeds=seeds)

    together = run([5, 6, 7])
    for k, seed in enumerate([5, 6, 7]):
        assert torch.equal(run([seed])[0], together[k])
    assert not torch.equal(together[0], together[1])


def test_a_model_of_the_noise_is_a_score():
    sde = SubVP()
    noise_model = lambda x, t: -gaussian_score(sde)(x, t) * sde.marginal(t)[1].reshape(-1, 1)  # noqa: E731
    for steps, method in ((8, "rk4"), (None, "rk45")):
        kwargs = {"method": method, "noise": START, "dtype": torch.float64, "atol": 1e-9, "rtol": 1e-9}
        a = sample_ode(gaussian_score(sde), sde, (40, 2), steps, **kwargs)
        b = sample_ode(noise_model, sde, (40, 2), steps, prediction_type="epsilon", **kwargs)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    x = START[:5]
    a = log_likelihood(x, gaussian_score(sde), sde, divergence="exact")
    b = log_likelihood(x, noise_model, sde, divergence="exact", prediction_type="epsilon")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gaussian_truth(x, sde, std=STD):
    """log p_eps of Gaussian data, with the prior of the SDE at the end of the exact flow."""
    start, end = (math.hypot(m * std, s) for m, s in (sde.marginal(sde.eps), sde.marginal(1.0)))
    return sde.prior_log_prob(x * end / start) + x[0].numel() * math.log(end / start)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize(("steps", "method"), [(None, "rk45"), (400, "rk4")])
def test_exact_likelihood_of_a_gaussian(sde, steps, method):
    """To 1e-4 nats: the flow's own density always, and the data's where its prior is that of the SDE."""
    x = STD * torch.randn(6, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kwargs = {"divergence": "exact", "steps": steps, "method": method, "atol": 1e-6, "rtol": 1e-6}
    found = log_likelihood(x, gaussian_score(sde), sde, **kwargs)
    assert found.shape == (6,) and found.dtype == torch.float64
    torch.testing.assert_close(found, gaussian_truth(x, sde), rtol=0, atol=1e-4)
    if isinstance(sde, VP) and not isinstance(sde, SubVP):
        mean, std = sde.marginal(sde.eps)
        normal = torch.distributions.Normal(0.0, math.hypot(mean * STD, std))
        torch.testing.assert_close(found, normal.log_prob(x).sum((1, 2)), rtol=0, atol=2e-4, check_dtype=False)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_within_its_standard_error(probe):
    """On a correlated Gaussian, whose Jacobian is not diagonal: the mean over 400 independent probes is the exact value."""
    sde, covariance = VP(), torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def score(x, t):
        mean, std = sde.marginal(t[:1])
        return -torch.linalg.solve(mean**2 * covariance + std**2 * torch.eye(2), x.T).T

    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64).expand(400, 2)
    kwargs = {"steps": 60, "method": "heun"}
    exact = log_likelihood(x[:1], score, sde, divergence="exact", **kwargs)
    found = log_likelihood(x, score, sde, probe=probe, seeds=torch.arange(400), **kwargs)
    assert found.std() > 0.05
    assert abs(found.mean() - exact[0]) < 4.5 * found.std() / 20
    averaged = log_likelihood(x, score, sde, probe=probe, probes=16, seeds=torch.arange(400), **kwargs)
    assert averaged.std() < found.std() / 2.5
    again = log_likelihood(x[:3], score, sde, probe=probe, seeds=[2, 1, 0], **kwargs)
    torch.testing.assert_close(again, found[[2, 1, 0]])


def test_rademacher_is_exact_on_a_diagonal_jacobian():
    x = STD * START[:4]
    kwargs = {"score": gaussian_score(VP()), "sde": VP(), "steps": 20, "method": "heun"}
    exact = log_likelihood(x, divergence="exact", **kwargs)
    found = log_likelihood(x, generator=torch.Generator().manual_seed(0), **kwargs)
    torch.testing.assert_close(found, exact)


def test_bits_per_dim():
    """Against the likelihood in nats, by hand: bytes in [-1, 1] add 7 bits, 32 levels in an interval of 1 add 5."""
    sde, x = VP(), 0.1 * START[:4]
    kwargs = {"divergence": "exact", "steps": 50, "method": "heun"}
    nats = log_likelihood(x, gaussian_score(sde), sde, **kwargs)
    bits = bits_per_dim(x, gaussian_score(sde), sde, **kwargs)
    torch.testing.assert_close(bits, 7 - nats / (2 * math.log(2)))
    torch.testing.assert_close(
        bits_per_dim(x, gaussian_score(sde), sde, levels=32, width=1.0, **kwargs), 5 - nats / (2 * math.log(2))
    )


@pytest.mark.parametrize(("steps", "method"), [(6, "heun"), (None, "rk45")])
def test_half_precision_and_no_samples(steps, method):
    kwargs = {"steps": steps, "method": method, "atol": 1e-2, "rtol": 1e-2}
    x = sample_ode(gaussian_score(VP()), VP(), (3, 8), seeds=[1, 2, 3], dtype=torch.bfloat16, **kwargs)
    assert x.dtype == torch.bfloat16 and x.isfinite().all()
    found = log_likelihood(x, gaussian_score(VP()), VP(), seeds=[1, 2, 3], **kwargs)
    assert found.dtype == torch.float32 and found.shape == (3,) and found.isfinite().all()
    assert log_likelihood(x[:0], gaussian_score(VP()), VP(), seeds=[], **kwargs).shape == (0,)
    assert encode(x[:0], gaussian_score(VP()), VP(), **kwargs).shape == (0, 8)


def test_one_kernel_an_evaluation():
    from torch.utils._python_dispatch import TorchDispatchMode

    shape, names, output = (3, 2, 32, 32), [], torch.randn(3, 2, 32, 32)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(a, torch.Tensor) and a.shape == shape for a in args):
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        sample_ode(lambda x, t: output, VP(), shape, 3, method="rk4", seeds=[1, 2, 3])
    assert [name for name in names if "detach" not in name] == ["fastgen.sampler_step_fwd.default"] * 12


SCORE = gaussian_score(VP())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sample_ode(SCORE, VP(), (2, 2), 3, method="rk3"), ValueError, "method must be one of .* got 'rk3'"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), method="heun"), ValueError, "method='heun' does not adapt"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), atol=-1.0), ValueError, "atol must be at least 0, got -1.0"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), atol=0.0, rtol=0.0), ValueError, "must not both be 0"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), max_evaluations=3), ValueError, "max_evaluations must be at least 8"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), max_evaluations=20), RuntimeError, "gave up at t=.* evaluations"),
        (lambda: sample_ode(lambda x, t: x * math.nan, VP(), (2, 2)), RuntimeError, "gave up"),
        (lambda: sample_ode(SCORE, VP(), (2, 2), prediction_type="v"), ValueError, "prediction_type"),
        (
            lambda: sample_ode(SCORE, VP(), (2, 2), 3, method="heun", eps=0.0, prediction_type="epsilon"),
            ValueError,
            "stop at eps > 0",
        ),
        (lambda: encode(torch.zeros(2, 2).long(), SCORE, VP()), TypeError, "encode: x must be a floating-point"),
        (lambda: log_likelihood(torch.tensor(1.0), SCORE, VP()), ValueError, "x must be .* got a scalar"),
        (lambda: log_likelihood(START, SCORE, VP(), divergence="trace"), ValueError, "divergence must be one of"),
        (lambda: log_likelihood(START, SCORE, VP(), probe="cauchy"), ValueError, "probe must be one of"),
        (lambda: log_likelihood(START, SCORE, VP(), probes=0), ValueError, "probes must be at least 1"),
        (lambda: log_likelihood(START, SCORE, VP(), seeds=[1]), ValueError, r"seeds must be one a sample \(40\)"),
        (
            lambda: log_likelihood(START, lambda x, t: torch.zeros_like(x), VP()),
            ValueError,
            "does not depend differentiably on x",
        ),
        (lambda: bits_per_dim(START, SCORE, VP(), width=0.0), ValueError, "width must be positive"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
