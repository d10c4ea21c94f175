"""`rational_quadratic_spline`: values, log-determinants and gradients of every form both ways, beside the published formulas;
knots and ends of the box; densities."""

import math

import pytest
import torch
from torch import Tensor

from fastgen._schema import SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from fastgen.ops import rational_quadratic_spline
from fastgen.reference import rational_quadratic_spline as reference
from fastgen.reference._spline import derivatives_of

from .numerics import DTYPES, assert_bar, guarded, poison_allocator, randn
from .rational_quadratic_spline_cases import (
    EDGES,
    FORMS,
    OPS,
    apart,
    backward,
    check_ends,
    check_not_finite_parameters,
    check_nothing,
    gradients,
    nflows,
    parameters,
    planes,
)

ops = torch.ops.fastgen
# What all of float32 arithmetic may lose of a place in a narrow bin, relative to the largest value; float64 has nothing more
# exact beside it.
SLACK = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def spline(x, packed, **options):
    return rational_quadratic_spline(x, packed, **options)


@pytest.mark.isa
@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, tails, kind, inverse):
    """Against the reference in float64, with the plain arithmetic of the same dtype beside it: rows, planes, three tensors;
    shorter and longer than a vector and than a tile."""
    for shape, bins, options in (
        ((7, 5), 8, {"chosen": [3, 0]}),
        ((3, 4, 5, 6), 3, {"lie": "planes", "bounds": tails is not None, "reduce": False}),
        ((2, 3, 15, 19), 5, {"packed": False, "layout": "channels_last", "chosen": [2, 1]}),
        ((601, 1), 16, {}),
        ((5, 3), 33, {"packed": False, "lie": "apart"}),
    ):
        arguments = backward(shape, bins, dtype, tails, kind, inverse, **options)
        kept = [guarded(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
        for name, cut in ((OPS[0], slice(2, -1)), (OPS[1], slice(None))):
            poison_allocator(arguments[2].numel() * 4)
            actual = getattr(ops, name)(*kept[cut])
            beside, exact = (getattr(reference, name)(*a[cut]) for a in (arguments, wide))
            for a, b, e in zip(actual, beside, exact, strict=True):
                assert a.dtype == b.dtype and a.stride() == b.stride()
                assert_bar(a, b, e, SLACK[dtype], terms=8.0)


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", SPLINE_TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beside_the_published_formulas(dtype, tails, inverse):
    """Value, log-determinant and gradients as nflows and normflows compute them, through torch's autograd."""
    x = (1.8 * torch.rand(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.9).to(dtype)
    packed = parameters((50, 4), 8, tails).to(dtype)
    grad, grad_log = randn(50, 4, seed=3), randn(50, 4, seed=4)

    def published(x, packed):
        return nflows(x, *apart(packed, 8), inverse=inverse, bound=1.0, tails=tails)

    actual = gradients(
        lambda x, p: spline(x, p, tails=tails, inverse=inverse, reduce=False), [x, packed], grad, grad_log
    )
    beside, exact = (
        gradients(published, [t.to(d) for t in (x, packed)], grad, grad_log) for d in (dtype, torch.float64)
    )
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, SLACK[dtype], terms=8.0)


@pytest.mark.isa
@pytest.mark.parametrize("tails", SPLINE_TAILS)
@pytest.mark.parametrize("kind", SPLINE_PARAMETRIZATIONS)
def test_inverse(kind, tails):
    """x again, and a log-determinant that is the negative one: also of slopes from 1e-3 to 1e3, relative to what a rounding
    of y becomes."""
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = (1.9 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.95).to(
            dtype
        )
        for deviation in (1, 20):
            packed = (deviation * parameters((4000, 2), 8, tails)).to(dtype)
            options = {"tails": tails, "parametrization": kind, "reduce": False}
            y, log_det = spline(x, packed, **options)
            again, log_inverse = spline(y, packed, inverse=True, **options)
            assert y.isfinite().all() and log_det.isfinite().all() and again.isfinite().all()
            allowed = close * torch.exp(-log_det).clamp_min(1) if deviation > 1 else torch.tensor(close)
            assert ((again - x).abs() <= allowed).all()
            if deviation == 1:
                torch.testing.assert_close(log_det + log_inverse, torch.zeros_like(x), rtol=0, atol=100 * close)


@pytest.mark.isa
@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
def test_log_determinant_is_that_of_the_jacobian(tails, kind, inverse):
    x, packed = 0.4 * randn(3, 5).clamp(-2, 2), parameters((3, 5), 6, tails)
    options = {"tails": tails, "parametrization": kind, "inverse": inverse}
    jacobian = torch.autograd.functional.jacobian(lambda t: spline(t, packed, **options)[0], x)
    for n in range(3):
        sign, expected = torch.linalg.slogdet(jacobian[n, :, n])
        assert sign == 1 and abs(spline(x, packed, **options)[1][n] - expected) < 1e-9


def knots_of(packed: Tensor, bins: int, bound: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both coordinates of the inner knots [*, K - 1], as nflows has them, in float64."""
    shares = (1e-3 + (1 - 1e-3 * bins) * torch.softmax(u, -1) for u in apart(packed, bins)[:2])
    return tuple((2 * s.cumsum(-1)[..., :-1] - 1) * bound for s in shares)


@pytest.mark.isa
def test_knots():
    """At a knot of x stands the knot of y; a unit in the last place to either side the map, its slope and its gradient are
    continuous."""
    packed = parameters((6, 1), 5)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for xs, ys in zip(*(k.movedim(-1, 0) for k in knots_of(packed, 5)), strict=True):
            around = [xs.to(dtype)]
            around += [torch.nextafter(around[0], torch.tensor(to, dtype=dtype)) for to in (-math.inf, math.inf)]
            results = [
                gradients(lambda x, p: spline(x, p), [x, packed.to(dtype)], torch.ones(6, 1), torch.ones(6))
                for x in around
            ]
            for found in results:
                torch.testing.assert_close(found[0].double(), ys, rtol=0, atol=close)
                for a, b in zip(found[:2], results[0][:2], strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=10 * close)
                assert all(t.isfinite().all() for t in found)


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_monotone(dtype, inverse):
    """Over 20,001 places, of steep and flat bins as well: never a step down that is more than a rounding."""
    x = torch.linspace(-1.1, 1.1, 20001, dtype=dtype)[:, None]
    for seed in range(4):
        packed = (6 * parameters((1, 1), 8, seed=seed)).to(dtype).expand(20001, 1, -1)
        y, log_det = spline(x, packed, inverse=inverse, reduce=False)
        steps = (y[1:] - y[:-1]).double()
        assert steps.min() >= -4 * torch.finfo(dtype).eps and log_det.isfinite().all()


@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_a_density_integrates_to_one(tails):
    """That of y under a standard normal, or a uniform circle, pulled back to x."""
    x = (
        torch.linspace(-8, 8, 200001, dtype=torch.float64)[:, None]
        if tails == "linear"
        else torch.linspace(-1, 1, 200001).double()[:, None]
    )
    packed = 2 * parameters((1, 1), 8, tails).expand(len(x), 1, -1)
    y, log_det = spline(x, packed, tails=tails, bound=3.0 if tails == "linear" else 1.0)
    log_base = -0.5 * y[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) if tails == "linear" else math.log(0.5)
    assert abs(torch.trapezoid(torch.exp(log_base + log_det), x[:, 0]) - 1) < 1e-6


class Kernels:
    def __getattr__(self, name):
        return getattr(ops, name)


@pytest.mark.isa
@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
def test_ends(tails, kind, inverse):
    check_ends(Kernels(), tails, kind, inverse)


@pytest.mark.isa
def test_not_finite_parameters():
    check_not_finite_parameters(Kernels())


def test_nothing():
    check_nothing(Kernels())


@pytest.mark.isa
@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
def test_extreme_parameters(tails, kind, inverse):
    """Of plus and minus 1e4: no discriminant is negative, nothing is NaN, everything stays in the box."""
    signs = torch.sign(randn(500, 3, 2 * 8 + derivatives_of(tails, 8)[0], seed=2)).float()
    for size in (1e2, 1e4):
        x = torch.linspace(-1.2, 1.2, 1500).reshape(500, 3)
        found = gradients(
            lambda x, p: spline(x, p, tails=tails, parametrization=kind, inverse=inverse, reduce=False),
            [x, size * signs], torch.ones(500, 3), torch.zeros(500, 3),
        )  # fmt: skip
        assert not any(t.isnan().any() for t in found)
        assert found[0].abs().max() <= 1.2


def test_scale_is_a_factor_of_widths_and_heights():
    x, packed = randn(9, 2), parameters((9, 2), 4)
    scaled = torch.cat([packed[..., :8] / math.sqrt(64), packed[..., 8:]], -1)
    torch.testing.assert_close(spline(x, packed, scale=1 / 8), spline(x, scaled))


@pytest.mark.parametrize(("tails", "kind", "inverse"), FORMS)
@pytest.mark.parametrize("reduce", [False, True])
def test_gradcheck(tails, kind, inverse, reduce):
    x, packed = 0.3 * randn(3, 4, 2).clamp(-2, 2), parameters((3, 2, 2), 4, tails)
    options = {"tails": tails, "parametrization": kind, "inverse": inverse, "reduce": reduce, "scale": 0.7}
    mask, bound = torch.tensor([3, 1]), torch.tensor([0.8, 1.1], dtype=torch.float64)
    leaves = (x.requires_grad_(), packed.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, p: spline(x, p, mask=mask, bound=bound, **options), leaves)
    assert torch.autograd.gradcheck(lambda x, p: rational_quadratic_spline(x[:, :2], *apart(p, 4), **options), leaves)


def test_gradcheck_at_a_knot_and_at_the_ends():
    """Where both sides have one derivative: of the output, at an inner knot and at the ends of linear tails whose inner
    slopes are 1 too."""
    packed = torch.zeros(1, 3, 11, dtype=torch.float64)
    packed[..., 8:] = math.log(math.expm1(1 - 1e-3))
    x = torch.tensor([[-1.0, 0.5, 1.0]], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spline(x, packed)[0], (x,))


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    x, packed = (0.3 * randn(2, 2, 3, 2)).requires_grad_(), parameters((2, 2, 3, 2), 3).requires_grad_()
    functions = {
        "cat": lambda x, p: torch.cat([spline(x, p)[0], x * 2], dim=1)[:, 1:3],
        "expanded gradient": lambda x, p: spline(x, p)[0].sum() * spline(x, p)[1],
        "channels-last": lambda x, p: spline(x.to(memory_format=torch.channels_last), p)[0].contiguous() * x,
        "transposed": lambda x, p: spline(x, p)[0].transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda x, p: spline(x[:1].expand(2, -1, -1, -1), p[:1].expand(2, -1, -1, -1, -1))[1] * 2,
        "planes": lambda x, p: spline(x, planes(p), reduce=False)[1].permute(3, 1, 0, 2) * 2,
        "only the log-determinant": lambda x, p: spline(x, p, inverse=True)[1],
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda x, p, f=function: f(x, p), (x, packed)), name


def test_the_edges_are_those_of_the_docstring():
    """What is far out of a box without tails: its nearer end, nothing likely, no gradient."""
    x = torch.tensor(EDGES[:-1])[:, None]
    packed = parameters((1, 1), 4, None).float().expand(len(x), 1, -1)
    y, log_det = spline(x, packed, tails=None, bound=(-1.0, 1.0, 3.0, 4.0))
    outside = x.abs() > 1
    assert torch.equal(y[outside], torch.where(x > 0, 4.0, 3.0)[outside])
    assert (log_det.isinf() == outside[:, 0]).all()
