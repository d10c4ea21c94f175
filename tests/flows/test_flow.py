"""Densities: they integrate to 1, fit no better than the truth, and samples depend on their seeds alone."""

import math
import warnings

import pytest
import torch
from torch import nn

from fastgen.flows import (
    MADE,
    ActNorm,
    AffineAutoregressive,
    AffineCoupling,
    Center,
    Compose,
    Flow,
    Inverse,
    Logit,
    Permutation,
    ResidualMLP,
    Reverse,
    Spline,
    SplineAutoregressive,
    SplineCoupling,
    StandardNormal,
    Transform,
    bits_per_dim,
    dequantize,
)
from fastgen.models import MAF, NeuralSplineFlow, RealNVP

from .layers import shown


def flow(*layers):
    return Flow(shown(Compose(layers), torch.Generator().manual_seed(5)).double().eval(), StandardNormal((2,)))


FLOWS = {
    "affine coupling": lambda: flow(
        AffineCoupling(ResidualMLP(1, 2, hidden_features=8), scale_fn="tanh"),
        AffineCoupling(ResidualMLP(1, 2, hidden_features=8), mask="first_half", scale_fn="tanh"),
    ),
    "spline coupling": lambda: flow(
        SplineCoupling(ResidualMLP(1, 14, hidden_features=8), 2, spline=Spline(5)),
        Reverse(),
        ActNorm(2, initialize=False),
        SplineCoupling(ResidualMLP(1, 14, hidden_features=8), 2, spline=Spline(5)),
    ),
    "MAF": lambda: flow(AffineAutoregressive(MADE(2, 2, hidden_features=8), 2), Permutation([1, 0])),
    "IAF": lambda: flow(Inverse(AffineAutoregressive(MADE(2, 2, hidden_features=8), 2))),
    "spline autoregressive": lambda: flow(
        SplineAutoregressive(MADE(2, 14, hidden_features=8), 2, spline=Spline(5)), Reverse()
    ),
}


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_a_density_of_the_plane_integrates_to_1(name):
    torch.manual_seed(0)
    density = FLOWS[name]()
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = sum(density.log_prob(part).exp().sum() for part in points.split(60_000)) * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 2e-3


@torch.no_grad()
def test_a_density_of_the_line_integrates_to_1():
    layers = [ActNorm(1, initialize=False), SplineAutoregressive(MADE(1, 14, hidden_features=8), 1, spline=Spline(5))]
    transform = shown(Compose(layers), torch.Generator().manual_seed(6)).double()
    x = torch.linspace(-15, 15, 20_001, dtype=torch.float64)[:, None]
    total = torch.trapezoid(Flow(transform, StandardNormal((1,))).log_prob(x).exp(), x[:, 0])
    assert abs(total - 1) < 1e-5


def mixture(n, generator):
    """Of two normals in the plane far from each other, whose entropy is that of one and of the choice."""
    centers = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])[torch.randint(2, (n,), generator=generator)]
    return centers + 0.5 * torch.randn(n, 2, generator=generator)


ENTROPY = math.log(2) + math.log(2 * math.pi * math.e) + 2 * math.log(0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RealNVP(2, num_couplings=6, hidden_features=32, num_blocks=1),
        lambda: NeuralSplineFlow(2, num_transforms=2, hidden_features=32, num_blocks=1, bound=5.0),
        lambda: MAF(2, num_transforms=3, hidden_features=32, num_blocks=1, actnorm=True),
    ],
)
def test_a_fit_is_never_better_than_the_truth(make):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = -model.log_prob(mixture(256, generator)).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        nats = -model.eval().log_prob(mixture(20_000, generator)).mean().item()
    error = 3 * math.sqrt(1.0 / 20_000)  # three deviations of the mean of -log p of the truth
    assert ENTROPY - error <= nats <= ENTROPY + 0.5


def test_a_sample_depends_on_its_seed_alone():
    model = shown(RealNVP(4, num_couplings=2, hidden_features=8, context_features=3)).eval()
    context = torch.randn(4, 3)
    batch = model.sample(4, context, seeds=[5, 6, 7, -1], temperature=0.7)
    for i, seed in enumerate([5, 6, 7, -1]):
        one = model.sample(1, context[i : i + 1], seeds=torch.tensor([seed]), temperature=0.7)
        torch.testing.assert_close(one[0], batch[i])
    torch.manual_seed(0)
    first = model.sample(3, context[:3])
    torch.manual_seed(0)
    assert torch.equal(first, model.sample(3, context[:3])) and not torch.equal(first, model.sample(3, context[:3]))


def test_the_temperature_is_the_deviation_of_the_latent():
    density = Flow(Compose([Center()]), StandardNormal((3,)))
    whole, half = (density.sample(5, seeds=range(5), temperature=t) - 0.5 for t in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2)
    assert (density.sample(5, seeds=range(5), temperature=0) == 0.5).all()
    assert density.double().sample(2).dtype == torch.get_default_dtype()  # nothing in it has a dtype


def test_samples_have_the_density_that_log_prob_says():
    density = FLOWS["affine coupling"]()
    x = density.sample(4000, seeds=range(4000))
    z, _ = density(x)
    assert x.dtype == torch.float64
    assert z.mean(0).abs().max() < 0.06 and (z.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "RealNVP: temperature must be finite and not negative, got -1.0"),
        ({"seeds": [1]}, r"RealNVP: seeds must be \[n\] = \[2\], got shape \(1,\)"),
    ],
)
def test_bad_arguments_of_sample(arguments, message):
    with pytest.raises(ValueError, match=message):
        RealNVP(4, hidden_features=8).sample(2, **arguments)


def peer_shaped(scale_fn, depth=32):
    """An untrained flow of normflows' shape: networks of 2 -> 64 -> 64 with weights of the usual size, no zeros at the end."""
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        net = nn.Sequential(nn.Linear(1, 64), nn.LeakyReLU(0.0), nn.Linear(64, 64), nn.LeakyReLU(0.0), nn.Linear(64, 2))
        for layer in net[::2]:
            nn.init.normal_(layer.weight, std=0.5)
        layers.append(AffineCoupling(net, mask="first_half" if i % 2 else "second_half", scale_fn=scale_fn))
    return Flow(Compose(layers), StandardNormal((2,)))


def test_untrained_exp_couplings_are_finite_or_named():
    x = 3 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(
        RuntimeWarning, match=r"log_prob is not finite: layer \d+ \(AffineCoupling\) overflows; a bounded"
    ):
        peer_shaped("exp").log_prob(x)
    quiet = peer_shaped("exp")
    quiet.check_finite = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.log_prob(x)
        flow = Flow(Compose([AffineCoupling(ResidualMLP(1, 2)) for _ in range(32)]), StandardNormal((2,)))
        assert flow.log_prob(x).isfinite().all()


def test_data_that_is_not_finite_is_an_error():
    x = torch.zeros(3, 4)
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="RealNVP: x must be finite, got NaN or infinity in sample 1"):
        RealNVP(4, hidden_features=8).eval().log_prob(x)


def test_parameters_of_splines_that_do_not_fit():
    layer = SplineCoupling(nn.Linear(2, 40), 4, spline=Spline(8))
    with pytest.raises(ValueError, match=r"Spline: parameters must be .* P = 23 for 8 bins, .* got shape \(3, 40\)"):
        layer(torch.zeros(3, 4))


def test_a_zero_scale_is_named():
    layers = Compose([Reverse(), ActNorm(2, initialize=False)])
    with torch.no_grad():
        layers.layers[1].log_scale[0] = -math.inf
    with pytest.warns(RuntimeWarning, match=r"layer 1 \(ActNorm\) is singular$"):
        Flow(layers, StandardNormal((2,))).log_prob(torch.ones(1, 2))


@pytest.mark.parametrize("seeds", [None, range(100)])
def test_dequantised_integers_are_in_their_bins(seeds):
    images = torch.arange(256).repeat(100, 1)
    x = dequantize(images, seeds=seeds)
    assert x.dtype == torch.float32 and (x < 1).all() and torch.equal((x * 256).floor().long(), images)
    noise = x.double() * 256 - images
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.002


def test_dequantisation_depends_on_the_seed_and_the_step_alone():
    images = torch.randint(17, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x = dequantize(images, 17, seeds=[3, 4, 5, 6])
    assert torch.equal(dequantize(images[2:], 17, seeds=[5, 6]), x[2:])
    assert not torch.equal(dequantize(images, 17, seeds=[3, 4, 5, 6], step=1), x)


def test_bits_per_dim_of_the_uniform_density():
    assert torch.allclose(bits_per_dim(torch.zeros(2), 12, levels=256), torch.tensor(8.0))
    log_prob = torch.full((1,), 12 * math.log(2.0))
    assert torch.allclose(bits_per_dim(log_prob, 12, levels=256), torch.tensor(7.0))


def test_logits_at_the_ends_are_finite():
    y, log_det = Logit(0.05)(torch.tensor([[0.0, 1.0]]))
    assert y.isfinite().all() and log_det.isfinite().all()
    with pytest.raises(ValueError, match=r"Logit: alpha must be in \[0, 0.5\), got 0.5"):
        Logit(0.5)


def test_a_transform_says_what_it_lacks():
    for method in ("forward", "inverse"):
        with pytest.raises(NotImplementedError, match=f"Transform: {method} is not written"):
            getattr(Transform(), method)(torch.zeros(1, 2))
