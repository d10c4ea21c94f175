"""Corruptions as processes: their levels, their posteriors against Bayes, the loop and cold diffusion."""

import math

import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.ops.philox_normal import INITIAL_NOISE_STEP
from fastgen.samplers import DDPM, linear_betas, sample
from fastgen.samplers.score import Blur, Corruption, Discrete, GaussianNoise, Mask, cold_diffusion, sample_corruption

SIGMAS = (0.5, 1.0, 2.0, 4.0)
BETAS = torch.tensor([0.1, 0.2, 0.4, 0.6], dtype=torch.float64)
SHAPE = (3, 2, 6, 5)
CONTINUOUS = [GaussianNoise(BETAS), Blur(SIGMAS), Blur(SIGMAS, noise_std=0.1), Mask.linear(4, fill=-7.0)]


def names(value):
    return type(value).__name__ if isinstance(value, Corruption) else None


@pytest.mark.parametrize("corruption", [*CONTINUOUS, Discrete.uniform(3, BETAS)], ids=names)
def test_protocol_and_levels(corruption):
    assert isinstance(corruption, Corruption) and corruption.levels == 4
    x0 = torch.randint(0, 3, SHAPE) if isinstance(corruption, Discrete) else torch.randn(SHAPE)
    noise = torch.randn(corruption.noise_shape(SHAPE))
    torch.testing.assert_close(corruption.corrupt(x0, 0, noise), x0, rtol=1e-5, atol=1e-5)
    mixed = corruption.corrupt(x0, torch.tensor([4, 0, 2]), noise)  # a level a sample
    for k, t in enumerate((4, 0, 2)):
        torch.testing.assert_close(mixed[k], corruption.corrupt(x0, t, noise)[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corruption", CONTINUOUS, ids=names)
def test_a_perfect_guess_gives_x0(corruption):
    x0 = torch.randn(SHAPE)
    start = corruption.corrupt(x0, 4, torch.randn(SHAPE))
    x = sample_corruption(lambda x, t: x0, corruption, SHAPE, seeds=[1, 2, 3], start=start)
    torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corruption", [GaussianNoise(BETAS), Blur(SIGMAS, noise_std=0.3)], ids=names)
@pytest.mark.parametrize("t", [1, 2, 4])
def test_gaussian_posteriors_keep_the_marginal(corruption, t):
    """x_{t-1} from the posterior at x_t ~ q(x_t | x0) is distributed as q(x_{t-1} | x0): mean and covariance of all pixels."""
    n, x0 = 20000, torch.tensor([[[1.0, -0.5], [0.3, 2.0]]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(t)
    many = x0.expand(n, 1, 2, 2)
    noises = torch.randn(2, n, 1, 2, 2, dtype=torch.float64, generator=generator)
    x_t = corruption.corrupt(many, t, noises[0])
    x = corruption.posterior(x_t, many, t, noises[1]).flatten(1)
    mean = corruption.corrupt(x0[None], t - 1, torch.zeros(1, 1, 2, 2).double()).flatten()
    std = (corruption.corrupt(x0[None], t - 1, torch.ones(1, 1, 2, 2).double()).flatten() - mean).mean()
    assert ((x.mean(0) - mean).abs() <= 4.5 * std / math.sqrt(n) + 1e-9).all()
    error = (torch.cov(x.T) - std**2 * torch.eye(4)).abs()
    assert (error <= 4.5 * math.sqrt(2 / n) * std**2 + 1e-9).all()


def test_gaussian_posterior_by_bayes():
    """One number: q(x_{t-1} | x_t, x0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x0), on a grid."""
    corruption, t, x0, x_t = GaussianNoise(BETAS), 3, 0.7, -0.2
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    a, beta = corruption.alpha_bars[t - 1], BETAS[t - 1]
    log = -((grid - a.sqrt() * x0) ** 2) / (2 * (1 - a)) - (x_t - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
    weights = log.softmax(0)
    mean = (weights * grid).sum()
    std = (weights * (grid - mean) ** 2).sum().sqrt()
    args = torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([[x0]], dtype=torch.float64), t
    torch.testing.assert_close(corruption.posterior(*args, None).squeeze(), mean)
    one = corruption.posterior(*args, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(one.squeeze(), mean + std, rtol=1e-6, atol=1e-6)


def test_gaussian_loop_is_ddpm():
    """The same model, seeds and schedule as `sample` with `DDPM`: the same images."""
    betas = linear_betas(8, 0.01, 0.3)

    def model(x, t):
        return torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1) / 10)

    ddpm = DDPM(betas=betas, prediction_type="sample", clip_sample=False)
    expected = sample(model, SHAPE, ddpm, steps=8, seeds=[1, 2, 3], progress=False)
    found = sample_corruption(lambda x, t: model(x, t - 1), GaussianNoise(betas), SHAPE, seeds=[1, 2, 3])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blur_is_a_gaussian_blur():
    """In the middle of an image, against convolution with sampled Gaussian weights; the mean never changes."""
    size, sigma = 64, 2.0
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x[0, 0, 30, 33] = 1.0
    y = Blur((sigma,)).corrupt(x, 1, None)
    k = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((k - 30)[:, None] ** 2 + (k - 33) ** 2) / (2 * sigma**2))
    torch.testing.assert_close(y[0, 0], weights / weights.sum(), rtol=0, atol=1e-6)
    flat = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    heavy = Blur((1.0, 100.0)).corrupt(flat, 2, None)
    torch.testing.assert_close(heavy, flat.mean((2, 3), keepdim=True).expand_as(flat))


def test_masks_are_nested_and_grow():
    mask, x0, noise = Mask.linear(4, fill=-7.0), torch.rand(2, 3, 50, 50), torch.randn(2, 3, 50, 50)
    masked = [mask.corrupt(x0, t, noise) == -7.0 for t in range(5)]
    for t in range(5):
        share, n = masked[t].double().mean(), x0.numel()
        assert abs(share - t / 4) <= 4.5 * math.sqrt(t / 4 * (1 - t / 4) / n)
        assert t == 0 or (masked[t] | ~masked[t - 1]).all()
    shared = Mask.linear(4, fill=-7.0, shared_channels=True)
    together = shared.corrupt(x0, 2, torch.randn(shared.noise_shape(x0.shape))) == -7.0
    assert (together == together[:, :1]).all() and 0 < together.double().mean() < 1
    drawn = sample_corruption(lambda x, t: x0, shared, x0.shape, seeds=[1, 2])
    assert torch.equal(drawn, x0)


def test_mask_posterior_keeps_the_marginal():
    mask, n, t = Mask((0.2, 0.5, 0.9), fill=-1.0), 40000, 3
    x0 = torch.rand(n, 1)
    x_t = mask.corrupt(x0, t, torch.randn(n, 1, generator=torch.Generator().manual_seed(0)))
    x = mask.posterior(x_t, x0, t, torch.randn(n, 1, generator=torch.Generator().manual_seed(1)))
    assert ((x == -1.0) | (x == x0)).all() and (x == x0)[x_t == x0].all()
    assert abs((x == -1.0).double().mean() - 0.5) < 4.5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("corruption", "dtype"),
    [(GaussianNoise(BETAS), None), (Mask.linear(4), None), (Discrete.uniform(5, BETAS), torch.int64)],
    ids=names,
)
def test_a_sample_depends_on_its_seed_alone(corruption, dtype):
    def restorer(x, t):
        if dtype is None:
            return torch.tanh(x) + t.reshape(-1, 1, 1) / 10
        return torch.nn.functional.one_hot((x + t.reshape(-1, 1, 1)) % 5, 5) * 0.8 + 0.04

    def draw(seeds):
        return sample_corruption(restorer, corruption, (len(seeds), 4, 6), seeds=seeds)

    together = draw([8, 9, 10])
    for k, seed in enumerate([8, 9, 10]):
        assert torch.equal(draw([seed])[0], together[k])
    if not isinstance(corruption, Mask):
        assert not torch.equal(together[0], together[1])
    if dtype is not None:
        assert together.dtype == dtype


def test_loop_draws_philox_and_calls_back():
    corruption, seen, guess = GaussianNoise(BETAS), [], torch.randn(SHAPE)
    x = philox_normal([1, 2, 3], SHAPE, INITIAL_NOISE_STEP)
    sample_corruption(
        lambda x, t: guess, corruption, SHAPE, seeds=[1, 2, 3], callback=lambda i, t, x: seen.append((i, t, x.clone()))
    )
    for i, t in enumerate((4, 3, 2, 1)):
        x = corruption.posterior(x, guess, t, philox_normal([1, 2, 3], SHAPE, i))
        assert seen[i][:2] == (i, t - 1)
        torch.testing.assert_close(seen[i][2], x)


@pytest.mark.parametrize("corruption", CONTINUOUS, ids=names)
@pytest.mark.parametrize("algorithm", ["naive", "improved"])
def test_cold_diffusion_with_a_perfect_restorer(corruption, algorithm):
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    start = corruption.corrupt(x0, 4, noise)
    before = start.clone()
    x = cold_diffusion(lambda x, t: x0, corruption, start, noise=noise, algorithm=algorithm)
    torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)
    assert torch.equal(start, before)


def test_the_improved_algorithm_forgives_a_restorer():
    """Bansal et al., section 3.2: with a linear degradation a constant error of the restorer cancels, and naively it stays."""

    class Linear:
        """x0 + t e."""

        levels, direction = 5, torch.randn(2, 3)

        def corrupt(self, x0, t, noise):
            return x0 + t * self.direction

    x0 = torch.randn(2, 3)
    start = Linear().corrupt(x0, 5, None)
    wrong = lambda x, t: x0 + 0.5  # noqa: E731
    improved = cold_diffusion(wrong, Linear(), start)
    naive = cold_diffusion(wrong, Linear(), start, algorithm="naive")
    torch.testing.assert_close(improved, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(naive, x0 + 0.5)


def test_estimated_noise_is_ddim():
    corruption, start = GaussianNoise(BETAS), torch.randn(SHAPE, dtype=torch.float64)
    x, a = start, corruption.alpha_bars
    for t in (4, 3, 2, 1):
        guess = torch.tanh(x)
        eps = (x - a[t].sqrt() * guess) / (1 - a[t]).sqrt()
        x = a[t - 1].sqrt() * guess + (1 - a[t - 1]).sqrt() * eps
    found = cold_diffusion(lambda x, t: torch.tanh(x), corruption, start, estimate_noise=True)
    torch.testing.assert_close(found, x)


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GaussianNoise(torch.tensor([0.0, 0.5])), ValueError, r"betas must be \[T\] within \(0, 1\]"),
        (lambda: Blur(()), ValueError, "sigmas must grow"),
        (lambda: Blur((2.0, 1.0)), ValueError, "sigmas must grow"),
        (lambda: Blur((1.0,), -1.0), ValueError, "noise_std must be at least 0"),
        (lambda: Blur((1.0,)).corrupt(ZEROS, 1, None), ValueError, r"samples must be \[N, \*, H, W\]"),
        (lambda: Mask((0.5, 0.2)), ValueError, "fractions must grow"),
        (lambda: Mask.linear(0), ValueError, "levels must be at least 1"),
        (lambda: Mask.linear(3).corrupt(ZEROS, 1, None), ValueError, "Mask: noise must be given"),
        (lambda: Mask.linear(3).corrupt(ZEROS, 4, ZEROS), ValueError, r"t must be in \[0, 3\], got 4"),
        (lambda: Mask.linear(3).posterior(ZEROS, ZEROS, 0, ZEROS), ValueError, r"t must be in \[1, 3\], got 0"),
        (lambda: Mask.linear(3).posterior(ZEROS, ZEROS[:1], 1, ZEROS), ValueError, "x0_hat must have the shape"),
        (
            lambda: Mask.linear(3).corrupt(ZEROS, torch.tensor(1), ZEROS),
            ValueError,
            r"t must be a level or \[N\] int64",
        ),
        (
            lambda: sample_corruption(lambda x, t: x, Blur((1.0,)), (2, 1, 3, 3)),
            ValueError,
            "cannot be drawn without data: give start",
        ),
        (lambda: sample_corruption(lambda x, t: x, Mask((0.5,)), (2, 3)), ValueError, "data shows through"),
        (
            lambda: sample_corruption(lambda x, t: x, Mask.linear(2), (2, 3), start=ZEROS[:1]),
            ValueError,
            "start must have the shape",
        ),
        (
            lambda: cold_diffusion(lambda x, t: x, Mask.linear(2), ZEROS, algorithm="best"),
            ValueError,
            "algorithm must be",
        ),
        (
            lambda: cold_diffusion(lambda x, t: x, Mask.linear(2), ZEROS.long()),
            TypeError,
            "start must be floating-point",
        ),
        (
            lambda: cold_diffusion(lambda x, t: x, Mask.linear(2), ZEROS, estimate_noise=True),
            ValueError,
            "estimate_noise goes without noise, and with a corruption that has noise_of",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
