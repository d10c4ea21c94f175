"""`rational_quadratic_spline` against the functions of nflows, normflows and zuko, of the same parameters."""

import pytest
import torch

from fastgen.ops import rational_quadratic_spline

from .numerics import randn
from .rational_quadratic_spline_cases import apart, parameters


def spline(x, packed, **options):
    return rational_quadratic_spline(x, packed, **options)


def assert_as_exact(function, published, x, packed) -> None:
    """``function`` (output, log-determinant) is ``published`` in float64; in float32 no farther from that, in the root of
    the mean square, than twice what ``published`` itself is in float32, and within 1e-6."""
    torch.testing.assert_close(function(x, packed), published(x, packed), rtol=1e-11, atol=1e-11)
    x, packed = x.float(), packed.float()
    exact = published(x.double(), packed.double())
    for a, b, e in zip(function(x, packed), published(x, packed), exact, strict=True):
        mine, theirs = ((t.double() - e).square().mean().sqrt() for t in (a, b))
        assert mine <= 2 * theirs + 1e-8 and mine <= 1e-6 * e.abs().max()


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
def test_beside_nflows(inverse):
    splines = pytest.importorskip("nflows.transforms.splines.rational_quadratic")

    def published(x, packed):
        return splines.unconstrained_rational_quadratic_spline(x, *apart(packed, 8), inverse=inverse, tail_bound=2.0)

    x, how = 1.5 * randn(2000, 6), {"inverse": inverse, "reduce": False}
    assert_as_exact(lambda x, p: spline(x, p, bound=2.0, **how), published, x, parameters((2000, 6), 8))
    box = (0.0, 1.0, -1.0, 2.0) if not inverse else (-1.0, 2.0, 0.0, 1.0)
    edges = dict(zip(("left", "right", "bottom", "top"), box, strict=True))

    def bounded(x, packed):
        return splines.rational_quadratic_spline(x, *apart(packed, 8), inverse=inverse, **edges)

    x, packed = torch.sigmoid(x), parameters((2000, 6), 8, None)
    assert_as_exact(lambda x, p: spline(x, p, bound=box, tails=None, **how), bounded, x, packed)


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
def test_beside_normflows(inverse):
    """Circular tails, and a box a channel with what its list of tails has: K + 1 derivatives, of which the ends are not
    read. Inside, that is: outside it leaves zeros where tails are a list."""
    splines = pytest.importorskip("normflows.utils.splines")
    x, bound = 0.9 * torch.tanh(randn(2000, 3)), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for tails in ("linear", "circular"):
        how = {"inverse": inverse, "tails": tails}
        packed = parameters((2000, 3), 8, None)
        actual = rational_quadratic_spline(x, *apart(packed, 8), bound=bound, reduce=False, **how)
        how["tails"] = [tails] * 3
        expected = splines.unconstrained_rational_quadratic_spline(x, *apart(packed, 8), tail_bound=bound, **how)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)

    def published(x, packed):
        return splines.unconstrained_rational_quadratic_spline(x, *apart(packed, 8), inverse=inverse, tails="circular")

    packed = parameters((2000, 3), 8, "circular")
    assert_as_exact(
        lambda x, p: spline(x, p, inverse=inverse, tails="circular", reduce=False), published, 2 * x, packed
    )


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
def test_beside_zuko(inverse):
    transforms = pytest.importorskip("zuko.transforms")

    def published(x, packed):
        transform = transforms.MonotonicRQSTransform(*apart(packed, 8), bound=5.0, slope=1e-2)
        return (transform.inv if inverse else transform).call_and_ladj(x)

    options = {"parametrization": "zuko", "bound": 5.0, "min_derivative": 1e-2, "inverse": inverse, "reduce": False}
    assert_as_exact(lambda x, p: spline(x, p, **options), published, 3 * randn(2000, 6), 4 * parameters((2000, 6), 8))
