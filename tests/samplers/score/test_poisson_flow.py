"""Poisson flow on exact empirical fields: charges in the plane are hit in proportion, and the pieces are their formulas."""

import math

import pytest
import torch

from fastgen.samplers.score import hemisphere_prior, poisson_field, poisson_flow, poisson_flow_loss, poisson_perturb

from ..mixture import MEANS, WEIGHTS, draw

CHARGES = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.1, 0.2]])


def field_of(data, gamma=0.0):
    return lambda x, z: poisson_field(x, z, data.to(x.dtype), gamma=gamma)


def test_field_by_hand():
    """Against the sum of x / |x|^(N + 1) in augmented space, without the softmax."""
    x, z = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    v_x, v_z = poisson_field(x, z, CHARGES.double(), gamma=0.7)
    for i in range(5):
        point, total, weight = torch.cat([x[i], z[i : i + 1]]), torch.zeros(3).double(), 0.0
        for charge in CHARGES.double():
            away = point - torch.cat([charge, torch.zeros(1)])
            total += away / away.norm() ** 3
            weight += away.norm() ** -3
        field = total / weight
        expected = -math.sqrt(2) * field / (field.norm() + 0.7)
        torch.testing.assert_close(torch.cat([v_x[i], v_z[i : i + 1]]), expected)


def test_field_in_many_dimensions_and_in_chunks():
    """Thousands of coordinates neither overflow nor vanish, and the chunk does not matter."""
    data, x = torch.randn(7, 3, 32, 32), 100 * torch.randn(5, 3, 32, 32)
    z = torch.full((5,), 3.0)
    whole, parts = poisson_field(x, z, data), poisson_field(x, z, data, chunk=1)
    assert all(v.isfinite().all() for v in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    lengths = torch.sqrt(whole[0].flatten(1).square().sum(1) + whole[1].square())
    assert ((lengths < math.sqrt(3072)) & (lengths > 0.9 * math.sqrt(3072))).all()


@pytest.mark.parametrize(("steps", "method"), [(None, "rk45"), (60, "heun"), (500, "euler")])
def test_charges_are_hit_in_proportion(steps, method):
    """Charges of 1, 2, 3 and 4: each sample ends at one of them, and as often as its charge says (4.5 standard errors + 0.01)."""
    data, n = CHARGES.repeat_interleave(torch.tensor([1, 2, 3, 4]), 0), 4000
    kwargs = {"seeds": torch.arange(n), "method": method, "z_max": 60.0, "z_min": 1e-5}
    x = poisson_flow(field_of(data), (n, 2), steps, **kwargs)
    distance, nearest = torch.cdist(x, CHARGES).min(1)
    assert (distance < 0.05).double().mean() > 0.98
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4])
    allowed = 4.5 * (expected * (1 - expected) / n).sqrt() + 0.01
    assert ((torch.bincount(nearest, minlength=4) / n - expected).abs() < allowed).all()


def test_a_density_is_reproduced():
    """Energy distance to fresh samples of the mixture: no more than twice that of other fresh samples, and far below a mixture
    with equal weights."""
    x = poisson_flow(field_of(draw(600, seed=1)), (600, 2), 40, method="heun", seeds=torch.arange(600), z_min=0.02)

    def energy(a, b):
        return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()

    other = draw(4000, seed=2)
    distance = energy(x.double(), other)
    fresh = max(energy(draw(600, seed=k), other) for k in range(3, 9))
    assert distance < 2 * fresh
    assert energy(MEANS[torch.arange(600) % 3] + 0.25 * torch.randn(600, 2).double(), other) > 3 * distance
    nearest = torch.cdist(x.double(), MEANS).argmin(1)
    weights = torch.bincount(nearest, minlength=3) / 600
    assert (weights - WEIGHTS).abs().max() < 4.5 * math.sqrt(2 * 0.25 / 600)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_in_the_logarithm_of_z(method, order):
    field, start = field_of(CHARGES), hemisphere_prior((30, 2), 5.0, seeds=range(30), dtype=torch.float64)
    kwargs = {"noise": start, "z_max": 5.0, "z_min": 0.5, "dtype": torch.float64}
    exact = poisson_flow(field, (30, 2), atol=1e-12, rtol=1e-12, **kwargs)
    errors = [(poisson_flow(field, (30, 2), n, method=method, **kwargs) - exact).abs().mean() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_one_charge_is_a_straight_line():
    """A single charge's field lines are rays: x shrinks with z."""
    start, centre = torch.randn(6, 3, dtype=torch.float64), torch.tensor([[0.3, -0.2, 0.5]])
    x = poisson_flow(
        field_of(centre, gamma=5.0),
        (6, 3),
        noise=start,
        z_max=8.0,
        z_min=0.5,
        atol=1e-10,
        rtol=1e-10,
        dtype=torch.float64,
    )
    torch.testing.assert_close(x, centre.double() + (start - centre) * 0.5 / 8, rtol=1e-7, atol=1e-7)


def test_prior_is_uniform_on_the_hemisphere():
    """In the plane the height of a uniform point of the half sphere is uniform: z_max / sqrt(|x|^2 + z_max^2) ~ U(0, 1)."""
    n, z_max = 8000, 7.0
    x = hemisphere_prior((n, 2), z_max, seeds=torch.arange(n)).double()
    height = (z_max / (x.square().sum(1) + z_max**2).sqrt()).sort().values
    gap = (height - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov at 0.1%
    mean = (x / x.norm(dim=1, keepdim=True)).mean(0)
    assert mean.abs().max() < 4.5 / math.sqrt(2 * n)
    clipped = hemisphere_prior((n, 2), z_max, seeds=torch.arange(n), max_norm=3.0)
    longer, length = x.norm(dim=1) > 3, x.norm(dim=1, keepdim=True)
    assert 0.1 < longer.double().mean() < 0.99
    torch.testing.assert_close(clipped.double()[~longer], x[~longer], rtol=0, atol=0)  # those within stay
    torch.testing.assert_close(clipped.double()[longer], (3 * x / length)[longer], rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_its_seed_alone():
    def run(seeds):
        return poisson_flow(field_of(CHARGES), (len(seeds), 2), 10, method="heun", seeds=seeds)

    together = run([4, 5, 6])
    for k, seed in enumerate([4, 5, 6]):
        torch.testing.assert_close(
            run([seed])[0], together[k], rtol=1e-5, atol=1e-6
        )  # torch's sums vary with the batch
    assert not torch.equal(together[0], together[1])
    prior = hemisphere_prior((3, 2), 5.0, seeds=[4, 5, 6])
    assert torch.equal(hemisphere_prior((1, 2), 5.0, seeds=[5])[0], prior[1])
    generator = torch.Generator().manual_seed(1)
    assert hemisphere_prior((3, 2), 5.0, generator=generator).shape == (3, 2)


def test_perturbation_is_equation_5():
    x0, sigma, tau, exponent = torch.zeros(20000, 2, dtype=torch.float64), 0.1, 0.05, 50.0
    x, z = poisson_perturb(x0, sigma=sigma, tau=tau, max_exponent=exponent, generator=torch.Generator().manual_seed(3))
    assert (z > 0).all()
    # E |eps_x|^2 (1 + tau)^(2 m) = N sigma^2 (r - 1) / log r with r = (1 + tau)^(2 M); likewise for z with 1 for N
    r = (1 + tau) ** (2 * exponent)
    expected = sigma**2 * (r - 1) / math.log(r)
    for squares, count in ((x.square().sum(1), 2), (z.square(), 1)):
        assert abs(squares.mean() - count * expected) < 4.5 * squares.std() / math.sqrt(20000)
    same, _ = poisson_perturb(
        x0, sigma=sigma, tau=tau, max_exponent=exponent, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(same, x)


def test_loss_is_zero_for_the_field_itself_and_trains():
    kwargs = {"max_exponent": 20.0, "sigma": 0.1, "generator": torch.Generator().manual_seed(0)}
    assert poisson_flow_loss(field_of(CHARGES, gamma=5.0), CHARGES, **kwargs) == 0
    scale = torch.tensor(0.5, requires_grad=True)

    def model(x, z):
        return tuple(scale * v for v in poisson_field(x, z, CHARGES))

    loss = poisson_flow_loss(model, CHARGES, CHARGES, **kwargs)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert loss > 0 and gradient < 0


FIELD = field_of(CHARGES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poisson_flow(FIELD, (2, 2), z_min=0.0), "0 < z_min < z_max, got z_min=0.0"),
        (lambda: poisson_flow(FIELD, (2, 2), method="heun"), "does not adapt its steps"),
        (lambda: poisson_flow(FIELD, (2, 2), noise=torch.zeros(3)), "noise must have the shape"),
        (lambda: poisson_flow(lambda x, z: (x, x), (2, 2), 3), r"must return v_x \(2, 2\) and v_z \(2,\)"),
        (lambda: hemisphere_prior((2, 2), -1.0), "z_max must be positive, got -1.0"),
        (lambda: hemisphere_prior((2, 2), 1.0, max_norm=0.0), "max_norm must be positive"),
        (lambda: hemisphere_prior((2, 2), 1.0, seeds=[1]), "seeds must be one a sample"),
        (lambda: poisson_field(torch.zeros(2, 2), torch.ones(2), torch.zeros(2, 3)), r"data must be \[K > 0, \*\]"),
        (lambda: poisson_field(torch.zeros(2, 2), torch.ones(3), CHARGES), "z must be one a sample"),
        (lambda: poisson_field(torch.zeros(2, 2), torch.ones(2), CHARGES, gamma=-1), "gamma must be at least 0"),
        (lambda: poisson_perturb(CHARGES, sigma=0.0), "sigma must be positive"),
        (lambda: poisson_perturb(CHARGES, max_exponent=-1.0), "max_exponent must be at least 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
