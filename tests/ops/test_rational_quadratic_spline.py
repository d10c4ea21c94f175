"""`rational_quadratic_spline`: values, log-determinants and gradients of every form both ways, beside nflows, normflows and
zuko; knots and ends of the box; densities; layouts, memory, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen._schema import SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from fastgen.ops import rational_quadratic_spline
from fastgen.reference import rational_quadratic_spline as reference
from fastgen.reference._layout import output_strides
from fastgen.reference._spline import derivatives_of

from ..backends import requires_cpu
from .numerics import (
    DTYPES,
    LAYOUTS,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    guarded,
    laid_out,
    poison_allocator,
    randn,
)
from .rational_quadratic_spline_cases import (
    EDGES,
    FORMS,
    OPS,
    apart,
    backward,
    check_ends,
    check_not_finite_parameters,
    check_nothing,
    forward,
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


def test_packed_and_apart_are_the_same_bits():
    x, packed = randn(5, 3, 4, 6).float(), parameters((5, 3, 4, 6), 7).float()
    grad, grad_log = randn(5, 3, 4, 6, seed=3), randn(5, seed=4)
    one = gradients(lambda x, p: spline(x, p, bound=2.0), [x, packed], grad, grad_log)
    three = gradients(lambda x, *p: rational_quadratic_spline(x, *p, bound=2.0), [x, *apart(packed, 7)], grad, grad_log)
    planar = gradients(lambda x, p: spline(x, p, bound=2.0), [x, planes(packed)], grad, grad_log)
    assert all(torch.equal(a, b) for a, b in zip(one, [*three[:3], torch.cat(three[3:], -1)], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, planar, strict=True))


@pytest.mark.parametrize("reduce", [False, True])
def test_masks(reduce):
    """The others are copied bit for bit, their log-determinant is 0, their gradient the output's; any order of channels."""
    x, packed = randn(4, 5, 3), parameters((4, 3, 3), 4)
    mask = torch.tensor([4, 0, 2])
    grad, grad_log = randn(4, 5, 3, seed=3), randn(*((4,) if reduce else (4, 5, 3)), seed=4)
    actual = gradients(lambda x, p: spline(x, p, mask=mask, reduce=reduce), [x, packed], grad, grad_log)

    def gathered(x, p):
        y, log_det = spline(x[:, mask], p, reduce=reduce)
        whole = x.index_copy(1, mask, y)
        return whole, log_det if reduce else torch.zeros_like(x).index_copy(1, mask, log_det)

    for a, e in zip(actual, gradients(gathered, [x, packed], grad, grad_log), strict=True):
        assert torch.equal(a, e)


def test_an_input_without_channels():
    x, packed = randn(9), parameters((9,), 4)
    y, log_det = spline(x, packed)
    expected = spline(x[:, None], packed[:, None])
    assert torch.equal(y, expected[0][:, 0]) and torch.equal(log_det, expected[1])


def test_scale_is_a_factor_of_widths_and_heights():
    x, packed = randn(9, 2), parameters((9, 2), 4)
    scaled = torch.cat([packed[..., :8] / math.sqrt(64), packed[..., 8:]], -1)
    torch.testing.assert_close(spline(x, packed, scale=1 / 8), spline(x, scaled))


@pytest.mark.isa
@pytest.mark.parametrize(("dtype", "other"), list(itertools.permutations(DTYPES, 2)))
def test_parameters_of_another_dtype(dtype, other):
    x, packed = randn(6, 4).to(dtype), parameters((6, 4), 5).to(other)
    y, log_det = spline(x, packed, bound=2.0)
    exact = spline(x.double(), packed.double(), bound=2.0)
    assert y.dtype == dtype and log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_bar(y, exact[0].to(dtype), exact[0], 2e-6)
    torch.testing.assert_close(log_det.double(), exact[1], rtol=2e-5, atol=2e-5)


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    bins, dtype = data.draw(st.integers(1, 20)), data.draw(st.sampled_from(DTYPES))
    tails, kind = data.draw(st.sampled_from(SPLINE_TAILS)), data.draw(st.sampled_from(SPLINE_PARAMETRIZATIONS))

    def anyhow(t: Tensor) -> Tensor:
        padding = [data.draw(st.integers(0, 2)) for _ in t.shape]
        base = torch.full([s + p for s, p in zip(t.shape, padding, strict=True)], math.nan, dtype=dtype)
        order = data.draw(st.permutations(range(t.dim())))
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])
        place = base[tuple(slice(p, None) for p in padding)]
        return guarded(place.copy_(t))

    x, packed = (
        anyhow((0.5 * randn(*sizes)).clamp(-0.9, 0.9).to(dtype)),
        anyhow(parameters((*sizes,), bins, tails).to(dtype)),
    )
    options = {
        "tails": tails,
        "parametrization": kind,
        "inverse": data.draw(st.booleans()),
        "reduce": data.draw(st.booleans()),
    }
    of = sizes[:1] if options["reduce"] else sizes
    grads = randn(*sizes, seed=3), randn(*of, seed=4)
    actual = gradients(lambda x, p: spline(x, p, **options), [x, packed], *grads)
    exact = gradients(lambda x, p: spline(x, p, **options), [x.double(), packed.double()], *grads)
    for a, e in zip(actual, exact, strict=True):
        assert_bar(
            a,
            e.to(a.dtype),
            e,
            1e-11 if dtype == torch.float64 else 5e-3 if a.dtype == dtype != torch.float32 else 5e-5,
            terms=8.0,
        )
    assert list(spline(x, packed, **options)[0].stride()) == output_strides(x)


def test_views_are_read_in_place():
    """Planes, a slice of planes, an expanded batch: no copy, which would be an op of torch's."""
    x = randn(2, 3, 4, 5).float()
    wide = planes(parameters((2, 5, 4, 5), 4)).float()
    for view in (
        wide[:, 1:4],
        parameters((1, 3, 4, 5), 4).float().expand(2, -1, -1, -1, -1),
        parameters((2, 3, 4, 10), 4).float()[..., ::2, :],
    ):
        how = forward((2, 3, 4, 5), 4, torch.float32)[2:]
        with torch.profiler.profile() as profile:
            ops.rational_quadratic_spline_fwd(x, view, *how)
            ops.rational_quadratic_spline_bwd(x, x[:, 0, 0, 0], x, view, *how, True)
        names = {event.key for event in profile.key_averages()}
        assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


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


def test_only_the_inputs_are_kept_for_the_backward():
    kept = []
    x, packed = randn(4, 3).float().requires_grad_(), parameters((4, 3), 8).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        spline(x, packed)
    assert kept == [x.data_ptr(), packed.data_ptr()]


def test_only_the_gradients_asked_for():
    x, packed = randn(4, 3).float(), parameters((4, 3), 8).float()
    for leaf, function in (
        (x.clone().requires_grad_(), lambda t: spline(t, packed)),
        (packed.clone().requires_grad_(), lambda t: spline(x, t)),
    ):
        output, log_det = function(leaf)
        assert torch.autograd.grad(output.sum() + log_det.sum(), leaf)[0].shape == leaf.shape
    with torch.no_grad():
        assert not spline(x, packed.requires_grad_())[0].requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(900, 7), (1, 3, 60, 50), (3, 5, 40)])
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x, packed = laid_out(randn(*shape).float(), layout), parameters(shape, 4).float()
    grad, grad_log = randn(*shape, seed=3), randn(*shape[:1], seed=4)
    assert_any_threads(lambda: gradients(lambda x, p: spline(x, p), [x, packed], grad, grad_log))


def test_fakes():
    for shape, (tails, kind, inverse) in itertools.product(((2, 3, 4, 5), (2, 3), (0, 3, 2)), FORMS[::5]):
        for dtype, packed, reduce in itertools.product((torch.float32, torch.bfloat16), (True, False), (True, False)):
            options = {"packed": packed, "reduce": reduce, "chosen": [2, 0]}
            compare = assert_registered if shape == (2, 3) and dtype == torch.float32 else assert_fake
            compare(
                ops.rational_quadratic_spline_fwd.default, forward(shape, 3, dtype, tails, kind, inverse, **options)
            )
            arguments = backward(shape, 3, dtype, tails, kind, inverse, wants=reduce, **options)
            compare(ops.rational_quadratic_spline_bwd.default, arguments)
    for lie in ("planes", "transposed", "expanded"):
        assert_fake(
            ops.rational_quadratic_spline_bwd.default,
            backward((2, 3, 4, 5), 3, torch.float32, lie=lie, layout="channels_last"),
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    x, packed = randn(4, 3).float(), parameters((4, 2), 5).float()

    def model(x, p):
        y, log_det = spline(x * 0.5, p, mask=torch.tensor([2, 0]))
        return y.square().sum() + log_det.sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, model):
        leaves = [t.clone().requires_grad_() for t in (x, packed)]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


def test_a_mask_out_of_range_is_refused():
    x, packed = torch.zeros(2, 3), torch.zeros(2, 2, 11)
    for mask, message in (
        ([0, 3], r"mask must be in \[0, 3\), got mask\[1\] = 3"),
        ([-1, 0], r"got mask\[0\] = -1"),
        ([1, 1], "each channel once"),
    ):
        for function in (ops.rational_quadratic_spline_fwd, reference.rational_quadratic_spline_fwd):
            with pytest.raises(RuntimeError, match=f"rational_quadratic_spline: .*{message}"):
                function(
                    x,
                    packed,
                    None,
                    None,
                    torch.tensor(mask),
                    None,
                    [-1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, 1.0],
                    4,
                    0,
                    0,
                    False,
                    True,
                )


NAMES = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")


def three(*sizes: int) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 3, size) for name, size in zip(NAMES, sizes, strict=True)}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C, \*spatial\] or \[N\], got a scalar", {"input": torch.zeros(())}),
        (TypeError, "widths must be a floating-point tensor, got torch.int64", {NAMES[0]: torch.zeros(2, 3, 11).long()}),
        (ValueError, r"widths must be .* with \(2, 3\) elements, got shape \(2, 2, 11\)", {NAMES[0]: torch.zeros(2, 2, 11)}),
        (ValueError, r"widths, packed, must be \[..., 11 or 13\] with tails 'linear'", {NAMES[0]: torch.zeros(2, 3, 12)}),
        (ValueError, "widths must be on the device of input", {NAMES[0]: torch.zeros(2, 3, 11, device="meta")}),
        (ValueError, "must be given together, or neither", {NAMES[1]: torch.zeros(2, 3, 4)}),
        (ValueError, r"heights must be \[..., 4\] as widths, got shape \(2, 3, 5\)", three(4, 5, 3)),
        (ValueError, r"derivatives must be \[..., 3 or 5\] with tails 'linear', got shape \(2, 3, 4\)", three(4, 4, 4)),
        (ValueError, "widths must be of K = 5 bins, got .*packed", {"num_bins": 5}),
        (ValueError, r"tails must be one of \('linear', 'circular', None\), got 'flat'", {"tails": "flat"}),
        (ValueError, "parametrization must be one of .* got 'nsf'", {"parametrization": "nsf"}),
        (ValueError, "bound must be a positive number", {"bound": -1.0}),
        (ValueError, "bound must be .* in order", {"bound": (0.0, 1.0, 1.0, 0.0)}),
        (ValueError, r"bound must be \[C'\] with C' = 3, got shape \(2,\)", {"bound": torch.ones(2)}),
        (ValueError, "no gradient in bound", {"bound": torch.ones(3, requires_grad=True)}),
        (ValueError, r"min_bin_width must be in \[0, 1 / K\] with K = 4, got 0.3", {"min_bin_width": 0.3}),
        (ValueError, "min_bin_height must be in", {"min_bin_height": -0.1}),
        (ValueError, r"min_derivative must be in \(0, 1.0\), got 0", {"min_derivative": 0.0}),
        (TypeError, "mask must be an int64 tensor of channels, got list", {"mask": [0, 1]}),
        (ValueError, r"mask must be \[C'\] with C' at most C = 3, got shape \(4,\)", {"mask": torch.arange(4)}),
        (ValueError, "mask must be on the device of input", {"mask": torch.arange(3, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(2, 3), "unnormalized_widths": torch.zeros(2, 3, 11)} | change
    with pytest.raises(error, match=f"rational_quadratic_spline: .*{message}"):
        rational_quadratic_spline(**arguments)


def test_the_edges_are_those_of_the_docstring():
    """What is far out of a box without tails: its nearer end, nothing likely, no gradient."""
    x = torch.tensor(EDGES[:-1])[:, None]
    packed = parameters((1, 1), 4, None).float().expand(len(x), 1, -1)
    y, log_det = spline(x, packed, tails=None, bound=(-1.0, 1.0, 3.0, 4.0))
    outside = x.abs() > 1
    assert torch.equal(y[outside], torch.where(x > 0, 4.0, 3.0)[outside])
    assert (log_det.isinf() == outside[:, 0]).all()
