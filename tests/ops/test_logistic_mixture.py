"""`logistic_mixture`: the likelihood and its gradient against float64 and many digits, draws against the likelihood, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.ops import logistic_mixture, logistic_mixture_sample
from fastgen.reference import logistic_mixture as reference
from fastgen.reference._layout import output_strides

from ..backends import import_peer
from .logistic_mixture_cases import EACH, parameters, pictures, port
from .numerics import (
    DTYPES,
    LAYOUTS,
    PLACES,
    assert_any_threads,
    assert_bar,
    assert_registered,
    chi_square,
    laid_out,
    place,
    poison_allocator,
    randn,
    strided,
)


def gradient(function, logits: Tensor, target: Tensor, grad: Tensor, *levels: int) -> tuple[Tensor, Tensor]:
    """The losses [N] of ``function`` and the gradient, of a leaf in the layout of ``logits``."""
    leaf = logits.detach().requires_grad_()
    losses = function(leaf, target, *levels)
    return losses.detach(), torch.autograd.grad(losses, leaf, grad.to(losses.dtype))[0]


def fused(logits: Tensor, target: Tensor, levels: int) -> Tensor:
    return logistic_mixture(logits, target, levels=levels)


def exactly(logits: Tensor, target: Tensor, levels: int) -> Tensor:
    return reference.logistic_mixture_fwd(logits, target, levels)


def check(logits: Tensor, target: Tensor, levels: int = 256) -> None:
    grad = 1 + randn(logits.shape[0], seed=3).abs()
    poison_allocator(logits.numel() * logits.element_size())
    losses, in_logits = gradient(fused, logits, target, grad, levels)
    assert losses.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert torch.equal(losses, fused(logits.detach(), target, levels))
    assert in_logits.dtype == logits.dtype and list(in_logits.stride()) == output_strides(logits)
    assert torch.equal(gradient(fused, logits, target, grad, levels)[1], in_logits)
    exact = gradient(exactly, logits.double(), target.double(), grad, levels)
    # the formulas in the same precision, as a user would write them who takes half precision to float32
    wide = logits if logits.dtype == torch.float64 else logits.float()
    plain = gradient(exactly, wide, target.to(wide.dtype), grad, levels)
    slack = 1e-14 if logits.dtype == torch.float64 else 2e-6
    assert_bar(losses, plain[0], exact[0], slack)
    assert_bar(in_logits, plain[1].to(logits.dtype), exact[1], slack)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, channels, layout):
    target = place(pictures(3, channels, 7, 9).to(dtype), layout)
    for log_scale in (-4.0, -1.0, 2.0):
        check(place(parameters(3, channels, 4, 7, 9, log_scale=log_scale).to(dtype), layout), target)


@pytest.mark.isa
@pytest.mark.parametrize("levels", [2, 3, 16, 255, 65536])
@pytest.mark.parametrize("channels", [1, 3])
def test_levels(channels, levels):
    for dtype in (torch.float64, torch.float32):
        target = pictures(2, channels, 5, 7, levels).to(dtype)
        check(parameters(2, channels, 3, 5, 7, log_scale=-3.0).to(dtype), target, levels)


@pytest.mark.isa
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 13)),
    channels=st.sampled_from([1, 3]),
    mixtures=st.integers(1, 12),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)),
)
def test_anything(shape, channels, mixtures, dtypes, layouts):
    n, h, w = shape
    logits = place(parameters(n, channels, mixtures, h, w).to(dtypes[0]), layouts[0])
    check(logits, place(pictures(n, channels, h, w).to(dtypes[1]), layouts[1]))


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 3])
def test_the_port(channels):
    """pixel-cnn-pp's value in float64, wherever it takes the difference of the distribution function; its gradient too."""
    logits, target = parameters(2, channels, 5, 8, 8, log_scale=0.0), pictures(2, channels, 8, 8)
    grad = torch.tensor([0.7, 1.3]).double()
    for levels in (256, 16):
        target = pictures(2, channels, 8, 8, levels)
        actual, expected = (gradient(f, logits, target, grad, levels) for f in (fused, port))
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=0.0)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-7, atol=1e-9)


def test_where_the_port_approximates():
    """Below 1e-5 the port takes the density at the middle of the bin, which is near where bins are narrower than a scale, and is
    told apart from the exact value where they are not."""
    logits = torch.zeros(1, 3, 1, 1).double()
    target = torch.zeros(1, 1, 1, 1).double()
    for mean, log_scale, near in ((2.0, -2.0, 1e-3), (0.4, -6.5, 1.0)):
        logits[0, 1], logits[0, 2] = mean, log_scale
        exact, approximate = fused(logits, target, 256).item(), port(logits, target).item()
        assert 1e-9 < abs(exact - approximate) < near or (near == 1.0 and abs(exact - approximate) > 0.1)


@pytest.mark.isa
@pytest.mark.parametrize("log_scale", [-20.0, -7.0, -3.0, 0.0, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 16), (1, 256), (1, 4096), (3, 2), (3, 8)])
def test_the_likelihood_sums_to_one(channels, levels, dtype, log_scale):
    """Over all values of a pixel, which are the samples of one batch."""
    values = torch.arange(levels).double() * 2 / (levels - 1) - 1
    every = torch.cartesian_prod(*[values] * channels).reshape(-1, channels, 1, 1)
    for seed in range(1 if levels > 256 else 3):
        logits = parameters(1, channels, 4, 1, 1, seed=seed, log_scale=log_scale)
        logits = logits.to(dtype).expand(len(every), -1, -1, -1)
        total = torch.exp(-logistic_mixture(logits, every, levels=levels)).sum()
        # an edge is off by a rounding of its place over the scale; what one bin loses by it the next gains
        assert abs(total.double().item() - 1) < (1e-11 if dtype == torch.float64 else 5e-5)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tails_and_scales_to_many_digits(dtype):
    """One logistic of one color against 60 digits: far away, narrow and wide, at both ends and between."""
    mpmath = import_peer("mpmath")
    mpmath.mp.dps = 60
    cases = list(itertools.product((-1.0, -0.5, 0.25, 1.0), (-30.0, -1.0, 0.1, 7.0, 1e3), (-7.0, -4.0, 0.0, 5.0, 40.0)))
    values = torch.tensor(cases, dtype=torch.float64).to(dtype)
    logits = torch.zeros(len(cases), 3, 1, 1, dtype=dtype)
    logits[:, 1, 0, 0], logits[:, 2, 0, 0] = values[:, 1], values[:, 2]
    losses = fused(logits, values[:, :1, None, None], 5)

    def exact(x, mean, log_scale):
        x, mean, scale, half = mpmath.mpf(x), mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_scale)), mpmath.mpf(1) / 4
        a, b = (x - mean + half) / scale, (x - mean - half) / scale
        cdf = lambda t: 1 / (1 + mpmath.exp(-t))  # noqa: E731
        return -mpmath.log(cdf(a) if x == -1 else cdf(-b) if x == 1 else cdf(a) * cdf(-b) * (1 - mpmath.exp(b - a)))

    expected = torch.tensor([float(exact(*row)) for row in values.tolist()], dtype=torch.float64)
    rounding = 1e-15 if dtype == torch.float64 else 6e-7
    assert ((losses.double() - expected).abs() <= rounding * (8 + 8 * expected.abs())).all()
    assert expected.max() > 1e5 and expected.min() < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(channels, layout):
    logits = laid_out(parameters(2, channels, 2, 2, 3), layout)
    logits[:, 2 + 2 : 2 + 4] -= 1.0
    target = laid_out(pictures(2, channels, 2, 3, 16), layout)
    for function in (
        lambda x: fused(x, target, 16),
        lambda x: fused(torch.cat([x, x], 3)[..., 1:4], target, 16),
        lambda x: fused(x[:1].expand_as(x), target, 16) * torch.tensor([2.0, -1.0]).double(),
    ):
        assert torch.autograd.gradcheck(function, (logits.clone().requires_grad_(),))


@pytest.mark.isa
def test_the_clamped_scale_has_no_gradient():
    logits = torch.zeros(1, 3, 1, 3).double()
    logits[0, 1], logits[0, 2] = 0.3, torch.tensor([-7.5, -7.0, -6.5])
    in_logits = gradient(fused, logits, torch.zeros(1, 1, 1, 3).double(), torch.ones(1), 256)[1][0, 2, 0]
    assert in_logits[0] == 0 and (in_logits[1:] != 0).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_stable(channels, dtype):
    """Narrow, wide, far away or all equal: losses and gradients stay finite, and right."""
    target = pictures(2, channels, 4, 5)
    for log_scale, mean in ((-9.0, 0.0), (-7.0, 50.0), (5.0, 0.0), (60.0, 1.0), (0.0, -1000.0)):
        logits = parameters(2, channels, 3, 4, 5, log_scale=log_scale)
        logits[:, 3:].unflatten(1, (channels, -1, 3))[:, :, 0] += mean
        check(logits.to(dtype), target)
        assert gradient(fused, logits.to(dtype), target, torch.ones(2), 256)[1].isfinite().all()
    check(torch.zeros(2, EACH[channels] * 3, 4, 5, dtype=dtype), target)


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_loss_depends_on(channels):
    """Not the batch, nor the layout, nor the threads."""
    logits, target = parameters(3, channels, 10, 19, 21).float(), pictures(3, channels, 19, 21).float()
    grad = torch.tensor([1.0, 0.5, 2.0])
    losses, in_logits = gradient(fused, logits, target, grad, 256)
    transposed = logits.transpose(2, 3).contiguous().transpose(2, 3)
    others = [
        gradient(fused, laid_out(logits, "channels_last"), target, grad, 256),
        gradient(fused, transposed, laid_out(target, "channels_last"), grad, 256),
        tuple(t.flip(0) for t in gradient(fused, logits.flip(0), target.flip(0), grad.flip(0), 256)),
    ]
    for other in others:
        assert torch.equal(other[0], losses) and torch.equal(other[1], in_logits)
    assert torch.equal(gradient(fused, logits[1:2], target[1:2], grad[1:2], 256)[1], in_logits[1:2])
    assert_any_threads(lambda: gradient(fused, logits, target, grad, 256))


@pytest.mark.isa
def test_a_nan_makes_its_own_loss_nan():
    for channel, pixel in itertools.product(range(20), (0, 7, 38)):
        logits, target = parameters(3, 3, 2, 3, 13).float(), pictures(3, 3, 3, 13).float()
        logits[1].flatten(1)[channel, pixel] = math.nan
        assert fused(logits, target, 256).isnan().tolist() == [False, True, False]
    target[2, 1, 2, 12] = math.nan
    assert fused(logits, target, 256).isnan().tolist() == [False, True, True]


def pixels(n: int, channels: int, log_scale: float = -1.0) -> Tensor:
    """Logits of ``n`` pixels of one distribution, as one image [1, 10 M or 3 M, 1, n]."""
    return parameters(1, channels, 3, 1, 1, seed=4, log_scale=log_scale).float().expand(1, -1, 1, n)


@pytest.mark.isa
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 16), (1, 256), (3, 2), (3, 5)])
def test_draws_follow_the_likelihood(channels, levels, temperature):
    """Chi-square of 30,000 draws along a stream and of 3,000 across seeds, at the level of 1e-4; another likelihood fails."""
    logits = pixels(1, channels)
    values = (torch.arange(levels) * 2 - (levels - 1)) / (levels - 1)
    every = torch.cartesian_prod(*[values] * channels).reshape(-1, channels, 1, 1)
    cooled = logits.clone()
    cooled[:, :3] /= temperature
    cooled[:, 3:].unflatten(1, (channels, -1, 3))[:, :, 1] += math.log(temperature)
    expected, other = (
        torch.exp(-logistic_mixture(x.double().expand(len(every), -1, -1, -1), every, levels=levels)).double()
        for x in (cooled, cooled + 0.3)
    )
    options = {"channels": channels, "levels": levels, "temperature": temperature}
    for images in (
        logistic_mixture_sample(pixels(30_000, channels), seeds=[5], **options),
        logistic_mixture_sample(logits.expand(3_000, -1, -1, -1), seeds=torch.arange(3_000), step=2, **options),
    ):
        drawn = images.movedim(1, -1).reshape(-1, channels)
        assert torch.isin(drawn, values).all()  # each is one of the levels, to the bit
        index = ((drawn + 1) / 2 * (levels - 1)).round().long()
        index = (index * levels ** torch.arange(channels - 1, -1, -1)).sum(1)
        counts = torch.bincount(index, minlength=levels**channels)
        assert chi_square(counts, expected / expected.sum()) > 1e-4
        assert chi_square(counts, other / other.sum()) < 1e-4


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_that_are_not_rounded(channels):
    """They fall into bins as rounded ones do: the first color, whose bins do not depend on the others."""
    images = logistic_mixture_sample(pixels(30_000, channels), seeds=[8], channels=channels)
    assert images.min() == -1 and images.max() == 1 and len(images[0, 0].unique()) > 10_000
    alone = pixels(1, channels)[:, :9]  # logits, means and scales of the first color
    every = (torch.arange(16) * 2 / 15 - 1).reshape(-1, 1, 1, 1)
    expected = torch.exp(-logistic_mixture(alone.double().expand(16, -1, -1, -1), every, levels=16))
    index = ((images[0, 0, 0] + 1) / 2 * 15).round().long()
    assert chi_square(torch.bincount(index, minlength=16), expected / expected.sum()) > 1e-4


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_of_the_reference(dtype, channels, layout):
    logits, seeds = place(parameters(2, channels, 4, 7, 9).to(dtype), layout), torch.tensor([3, -4])
    for levels, temperature in ((0, 1.0), (256, 0.7), (0, 0.0)):
        options = {"channels": channels, "levels": levels or None, "temperature": temperature}
        actual = logistic_mixture_sample(logits, seeds=seeds, element=9, step=4, **options)
        expected = reference.logistic_mixture_sample(logits.double(), seeds, channels, 9, 4, levels, temperature)
        fake = reference.logistic_mixture_sample_fake(logits, seeds, channels, 9, 4, levels, temperature)
        assert (actual.shape, actual.dtype, actual.stride()) == (fake.shape, fake.dtype, fake.stride())
        # in fp32 a rounding to a level may fall to either side: of 756 colors one
        far = ((actual - expected).abs() > (1e-12 if dtype == torch.float64 else 1e-5)).any(1)
        assert far.sum() <= (0 if dtype == torch.float64 or not levels else 1)


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_draw_depends_on(channels):
    """Not the batch, nor the layout, nor the threads; a pixel drawn alone is that of the image."""
    logits, seeds = parameters(3, channels, 10, 9, 11).float(), torch.tensor([1, -2, 2**50])
    options = {"channels": channels, "levels": 256, "step": 6}
    whole = logistic_mixture_sample(logits, seeds=seeds, **options)
    assert torch.equal(logistic_mixture_sample(logits[1:2], seeds=seeds[1:2], **options), whole[1:2])
    assert torch.equal(logistic_mixture_sample(laid_out(logits, "channels_last"), seeds=seeds, **options), whole)
    assert torch.equal(logistic_mixture_sample(strided(logits, "channels"), seeds=seeds, **options), whole)
    for y, x in ((0, 0), (3, 7), (8, 10)):
        element = (channels + 1) * (11 * y + x)
        pixel = logits[:, :, y : y + 1, x : x + 1]
        alone = logistic_mixture_sample(pixel, seeds=seeds, element=element, **options)
        assert torch.equal(alone[..., 0, 0], whole[..., y, x])
    assert_any_threads(lambda: logistic_mixture_sample(logits, seeds=seeds, **options))


@pytest.mark.isa
def test_seeds_and_gradients_are_read_where_they_lie():
    """The gradient of a sum is one number for all samples."""
    logits, target = parameters(3, 1, 2, 4, 5), pictures(3, 1, 4, 5)
    ops = torch.ops.fastgen
    apart = torch.arange(6)[::2]
    drawn, expected = (
        ops.logistic_mixture_sample(logits, seeds, 1, 0, 0, 0, 1.0) for seeds in (apart, apart.contiguous())
    )
    assert torch.equal(drawn, expected)
    for grad in (randn(6)[::2], randn(1).expand(3)):
        actual, expected = (ops.logistic_mixture_bwd(g, logits, target, 256) for g in (grad, grad.contiguous()))
        assert torch.equal(actual, expected)


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_named(value):
    for channel in (0, 5, 19):
        logits = parameters(3, 3, 2, 3, 4).float()
        logits[1, channel, 2, 3] = value
        with pytest.raises(ValueError, match=r"logistic_mixture_sample: logits must be finite.* = \[1, 2, 3\]"):
            logistic_mixture_sample(logits, seeds=[1, 2, 3])
        images = torch.ops.fastgen.logistic_mixture_sample(logits, torch.arange(3), 3, 0, 0, 256, 1.0)
        assert images.isnan().nonzero().tolist() == [[1, c, 2, 3] for c in range(3)]


@pytest.mark.isa
def test_nothing():
    for shape in ((2, 20, 0, 3), (0, 20, 2, 3)):
        logits, target = torch.zeros(shape, requires_grad=True), torch.zeros(shape[0], 3, *shape[2:])
        losses = logistic_mixture(logits, target)
        losses.sum().backward()
        assert losses.tolist() == [0.0] * shape[0] and logits.grad.shape == shape
        assert logistic_mixture_sample(logits.detach(), seeds=range(shape[0])).shape == target.shape


def test_there_is_no_gradient_in_the_target_nor_in_a_draw():
    logits, target = parameters(1, 3, 2, 2, 2).requires_grad_(), pictures(1, 3, 2, 2).requires_grad_()
    with pytest.raises(ValueError, match="logistic_mixture: there is no gradient in target: detach it"):
        logistic_mixture(logits, target)
    with pytest.raises(ValueError, match="logistic_mixture_sample: there is no gradient in logits: detach it"):
        logistic_mixture_sample(logits, seeds=[1])
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        first = torch.autograd.grad(logistic_mixture(logits, target.detach()).sum(), logits, create_graph=True)[0]
        torch.autograd.grad(first.sum(), logits)


ZEROS = {"logits": torch.zeros(2, 20, 3, 4), "target": torch.zeros(2, 3, 3, 4)}


def shaped(name: str, *shape: int, **options) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, **options)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a floating-point tensor, got list"),
        (shaped("target", 2, 3, 3, 4, dtype=torch.int64), TypeError, "target must be a floating-point tensor, got torch.int64"),
        (shaped("target", 2, 2, 3, 4), ValueError, r"target must be \[N, C, H, W\] with C 1 or 3, got shape \(2, 2, 3, 4\)"),
        (shaped("target", 2, 3, 12), ValueError, r"target must be \[N, C, H, W\] with C 1 or 3, got shape \(2, 3, 12\)"),
        (shaped("target", 2, 1, 3, 4), ValueError, r"logits must be \[N, 3 M, H, W\] for 1 color, got shape \(2, 20, 3, 4\)"),
        (shaped("logits", 2, 21, 3, 4), ValueError, r"logits must be \[N, 10 M, H, W\] for 3 colors"),
        (shaped("logits", 2, 0, 3, 4), ValueError, r"logits must be \[N, 10 M, H, W\] for 3 colors"),
        (shaped("target", 2, 3, 4, 3), ValueError, r"target must have shape \(2, 3, 3, 4\), .*got shape \(2, 3, 4, 3\)"),
        (shaped("target", 2, 3, 3, 4, device="meta"), ValueError, r"target must be on the device of logits \(cpu\), got meta"),
        ({"levels": 1}, ValueError, "levels must be an integer from 2 to 65536, got 1"),
        ({"levels": 16.0}, ValueError, "levels must be an integer from 2 to 65536, got 16.0"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=f"logistic_mixture: {message}"):
        logistic_mixture(**{**ZEROS, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channels": 2}, ValueError, "channels must be 1 or 3, got 2"),
        ({"channels": 1}, ValueError, r"logits must be \[N, 3 M, H, W\] for 1 color, got shape \(2, 20, 3, 4\)"),
        ({"seeds": [1, 2, 3]}, ValueError, r"seeds must be one per sample \(2\), got shape \(3,\)"),
        ({"element": -1}, ValueError, r"element must be in \[0, 2\^62\), got -1"),
        ({"step": -(2**31) - 1}, ValueError, "step must be in"),
        ({"levels": 0}, ValueError, "levels must be an integer from 2 to 65536, got 0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite and not negative, got inf"),
    ],
)
def test_errors_of_draws(change, error, message):
    with pytest.raises(error, match=f"logistic_mixture_sample: {message}"):
        logistic_mixture_sample(**{"logits": ZEROS["logits"], "seeds": [1, 2], **change})


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered(layout):
    logits, target = laid_out(parameters(2, 3, 2, 3, 5).float(), layout), pictures(2, 3, 3, 5).float()
    ops = torch.ops.fastgen
    assert_registered(ops.logistic_mixture_fwd.default, (logits, target, 256))
    assert_registered(ops.logistic_mixture_bwd.default, (torch.ones(2), logits, target, 256))
    assert_registered(ops.logistic_mixture_sample.default, (logits, torch.tensor([1, 2]), 3, 0, 0, 256, 1.0))
