"""Reverse SDEs and predictor-corrector sampling with exact scores: of a Gaussian, where every step is known, and of a mixture."""

import math

import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.ops.philox_normal import INITIAL_NOISE_STEP
from fastgen.samplers.score import VE, VP, SubVP, predictor_corrector, reverse_sde

from ..mixture import DEVIATIONS, MEANS, assert_reproduced, exact_score

SDES = [VP(), SubVP(), VE(0.01, 10.0)]
N = 10000
STD = 0.5  # of the Gaussian data


def gaussian_score(sde):
    def score(x, t):
        mean, std = sde.marginal(t)
        return -x / ((mean * STD) ** 2 + std**2).reshape(-1, 1)

    return score


def as_noise(score, sde):
    return lambda x, t: -score(x, t) * sde.marginal(t)[1].reshape(-1, 1)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "none"])
def test_variance_of_every_step_on_a_gaussian(sde, predictor):
    """With a linear score the variance obeys v' = (a + b c)^2 v + s^2, whatever the step size: no bias to allow for."""
    steps, snr, eps, expected, seen = 12, 0.3, 0.05, [], []
    variance, h = sde.prior_std**2, (1 - eps) / steps
    for i in range(steps):
        t, after = 1 - i * h, 1 - (i + 1) * h
        (m, s), (m_after, s_after) = sde.marginal(t), sde.marginal(max(after, 0.0))
        c = -1 / ((m * STD) ** 2 + s**2)
        delta = 2 * (m / m_after) ** 2 * snr**2 * s**2
        variance = (1 + delta * c) ** 2 * variance + 2 * delta
        f, g = sde.drift_and_diffusion(t)
        if predictor == "euler_maruyama":
            variance = (1 - h * f + h * g**2 * c) ** 2 * variance + g**2 * h
        elif predictor == "reverse_diffusion":
            scale = m / m_after
            squared = s**2 - scale**2 * s_after**2
            variance = (2 - scale + squared * c) ** 2 * variance + squared
        expected.append(variance)

    def record(i, t, x):
        assert t == pytest.approx(1 - (i + 1) * h)
        seen.append(x.double().square().mean().item())

    predictor_corrector(
        gaussian_score(sde), sde, (N, 4), steps, seeds=torch.arange(N), predictor=predictor, snr=snr, eps=eps,
        denoise=False, callback=record,
    )  # fmt: skip
    for value, truth in zip(seen, expected, strict=True):
        assert value == pytest.approx(truth, rel=4.5 * math.sqrt(2 / (4 * N)))


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_reverse_sde_reproduces_a_mixture(sde):
    """Discretisation bias at 150 steps: below 0.015 in means, covariances and weights."""
    x = reverse_sde(exact_score(sde), sde, (N, 2), 150, seeds=torch.arange(N) + 10**6)
    assert_reproduced(x, bias=0.015)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("norms", ["expected", "batch"])
def test_predictor_corrector_reproduces_a_mixture(sde, norms):
    """Discretisation bias at 100 steps: below 0.025."""
    x = predictor_corrector(exact_score(sde), sde, (N, 2), 100, norms=norms, generator=torch.Generator().manual_seed(2))
    assert_reproduced(x, bias=0.025)


def test_the_corrector_repairs_a_coarse_predictor():
    """Twenty steps of the predictor leave the components too wide; Langevin steps at the same times narrow them."""

    def excess(corrector_steps):
        x = predictor_corrector(
            exact_score(VP()), VP(), (2000, 2), 20, corrector_steps=corrector_steps, seeds=torch.arange(2000)
        ).double()
        nearest = torch.cdist(x, MEANS).argmin(1)
        return ((x - MEANS[nearest]).square().sum(1) / DEVIATIONS[nearest].square()).mean() - 2

    assert excess(0) > 0.5
    assert abs(excess(4)) < 0.5 * excess(0)


@pytest.mark.parametrize("kwargs", [{}, {"norms": "sample"}, {"predictor": "euler_maruyama", "corrector_steps": 2}])
def test_a_sample_depends_on_its_seed_alone(kwargs):
    def draw(seeds):
        score = lambda x, t: -x / (0.3 + t.reshape(-1, 1, 1))  # noqa: E731
        return predictor_corrector(score, VE(0.1, 2.0), (len(seeds), 3, 5), 6, seeds=seeds, **kwargs)

    seeds = [3, 4, 2**63 + 1]
    together = draw(seeds)
    for k, seed in enumerate(seeds):
        assert torch.equal(draw([seed])[0], together[k])
    assert not torch.equal(together[0], together[1])


def test_no_two_updates_share_their_noise():
    """With a score of zero the expected-norm sampler is a sum of the rows' noises, which are Philox's, one step a row."""
    sde, seeds = VE(0.1, 2.0), [5, 6]
    x = predictor_corrector(lambda x, t: 0 * x, sde, (2, 4), 2, seeds=seeds, eps=0.0, dtype=torch.float64)
    expected, row = 2.0 * philox_normal(seeds, (2, 4), INITIAL_NOISE_STEP).double(), 0
    for t, after in ((1.0, 0.5), (0.5, 0.0)):
        sigma, sigma_after = sde.marginal(t)[1], sde.marginal(after)[1]
        expected += 2 * 0.16 * sigma * philox_normal(seeds, (2, 4), row).double()
        if after > 0:
            expected += math.sqrt(sigma**2 - sigma_after**2) * philox_normal(seeds, (2, 4), row + 1).double()
        row += 2
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norms", ["sample", "batch"])
def test_langevin_step_of_the_papers_code(norms):
    """One corrector step against the formula of the norms, written out."""
    sde, seeds, shape = VP(), [1, 2, 3], (3, 2, 4)
    x = predictor_corrector(
        lambda x, t: torch.tanh(x) - x, sde, shape, 1, seeds=seeds, predictor="none", norms=norms, snr=0.2,
        denoise=False, eps=0.9, dtype=torch.float64,
    )  # fmt: skip
    start, z = (philox_normal(seeds, shape, step).double() for step in (INITIAL_NOISE_STEP, 0))
    score = torch.tanh(start) - start
    of_z, of_score = z.flatten(1).norm(dim=1), score.flatten(1).norm(dim=1)
    if norms == "batch":
        of_z, of_score = of_z.mean(), of_score.mean()
    alpha = (sde.marginal(1.0)[0] / sde.marginal(0.9)[0]) ** 2
    delta = (2 * alpha * (0.2 * of_z / of_score) ** 2).reshape(-1, 1, 1)
    torch.testing.assert_close(x, start + delta * score + (2 * delta).sqrt() * z)


@pytest.mark.parametrize("norms", ["expected", "sample", "batch"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "none"])
def test_a_model_of_the_noise_is_a_score(norms, predictor):
    sde = SubVP()
    kwargs = {"seeds": [1, 2, 3], "norms": norms, "predictor": predictor, "dtype": torch.float64}
    of_score = predictor_corrector(gaussian_score(sde), sde, (3, 8), 10, **kwargs)
    of_noise = predictor_corrector(
        as_noise(gaussian_score(sde), sde), sde, (3, 8), 10, prediction_type="epsilon", **kwargs
    )
    torch.testing.assert_close(of_noise, of_score, rtol=1e-9, atol=1e-9)


def test_the_last_step_is_quiet_where_denoise():
    sde, score = VP(), gaussian_score(VP())
    for kwargs in ({"corrector_steps": 0}, {"predictor": "none"}):
        drawn = {
            denoise: predictor_corrector(score, sde, (2, 3), 1, seeds=[1, 2], denoise=denoise, **kwargs)
            for denoise in (True, False)
        }
        assert not torch.equal(drawn[True], drawn[False])
        start = philox_normal([1, 2], (2, 3), INITIAL_NOISE_STEP)
        ratio = drawn[True] / start
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))  # linear in the start: nothing was added


def test_start_generator_and_memory():
    sde, score, start = VP(), gaussian_score(VP()), torch.randn(3, 2)
    before = start.clone()
    runs = [
        reverse_sde(score, sde, (3, 2), 4, noise=start, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*runs) and torch.equal(start, before)
    kept, copies = [], []

    def holding(x, t):
        kept.append(x)
        copies.append(x.clone())
        return score(x, t)

    predictor_corrector(holding, sde, (3, 2), 4, seeds=[1, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    each = predictor_corrector(score, sde, (3, 2), 4, generator=generators)
    alone = predictor_corrector(score, sde, (1, 2), 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(each[1:2], alone)
    assert reverse_sde(lambda x, t: -x, sde, (4,), 3, seeds=range(4)).shape == (4,)
    assert reverse_sde(lambda x, t: -x, sde, (0, 2), 3, seeds=[]).shape == (0, 2)


def test_one_kernel_an_update():
    from torch.utils._python_dispatch import TorchDispatchMode

    shape, names = (3, 2, 64, 64), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(a, torch.Tensor) and a.shape == shape for a in args):
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    output = torch.randn(shape)
    with Count():
        predictor_corrector(lambda x, t: output, VE(), shape, 4, seeds=[1, 2, 3])
    scaled, *names = [name for name in names if "detach" not in name]
    assert "mul" in scaled  # the start, to the deviation of the prior
    assert names == ["fastgen.sampler_step_out.default"] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norms", ["expected", "sample", "batch"])
def test_half_precision_follows_single(dtype, norms):
    """Each update rounds once; the start and the noise are the same normals."""
    kwargs = {"seeds": [1, 2, 3], "norms": norms}
    narrow, wide = (
        predictor_corrector(lambda x, t: -x, VP(), (3, 64), 8, dtype=d, **kwargs) for d in (dtype, torch.float32)
    )
    assert narrow.dtype == dtype
    assert (narrow.float() - wide).abs().max() < 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"corrector_steps": -1}, "corrector_steps must be at least 0"),
        ({"predictor": "heun"}, "predictor must be one of .* got 'heun'"),
        ({"predictor": "none", "corrector_steps": 0}, "needs corrector_steps"),
        ({"snr": 0.0}, "snr must be positive, got 0.0"),
        ({"norms": "all"}, "norms must be one of"),
        ({"prediction_type": "v"}, "prediction_type must be one of .* got 'v'"),
        ({"eps": 1.0}, r"eps must be in \[0, 1.0\), got 1.0"),
        ({"noise": torch.zeros(1)}, r"noise must have the shape \(2, 3\)"),
        ({"seeds": [1]}, r"seeds must be one a sample \(2\), got 1"),
        ({"generator": torch.Generator()}, "seeds or generator, not both"),
        ({"shape": ()}, r"shape must be \[N, \*\]"),
        ({"score": lambda x, t: x[:1]}, r"the model must return the shape \(2, 3\) of its input, got \(1, 3\)"),
    ],
)
def test_bad_input(kwargs, message):
    arguments = {"score": lambda x, t: -x, "sde": VP(), "shape": (2, 3), "steps": 3, "seeds": [1, 2]} | kwargs
    with pytest.raises(ValueError, match=message):
        predictor_corrector(**arguments)


def test_bad_types():
    with pytest.raises(TypeError, match="steps must be an integer"):
        reverse_sde(lambda x, t: -x, VP(), (2, 3), 2.5)
    with pytest.raises(TypeError, match="dtype must be floating-point"):
        reverse_sde(lambda x, t: -x, VP(), (2, 3), 2, dtype=torch.int32)
