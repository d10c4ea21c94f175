"""`invertible_conv1x1` and its log-determinant: values, gradients, inverses, layouts, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.ops import actnorm, invertible_conv1x1, invertible_conv1x1_log_det
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .invertible_conv1x1_cases import NAMES, OPS, ORDERS, SHAPES, forward, gradients, parameters, plain
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

ops = torch.ops.fastgen
SLACK = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.0, torch.float16: 0.0}
FORMS = [{"order": order, "inverse": inverse} for order in ORDERS for inverse in (False, True)]


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, layout):
    x, grad = guarded(laid_out(randn(*shape, dtype=dtype), layout)), randn(*shape, seed=7, dtype=dtype)
    for order, chosen in ((ORDERS[0], NAMES), (ORDERS[1], NAMES), (ORDERS[0], ()), (ORDERS[1], ("shift",))):
        params = parameters(shape[1], dtype, chosen)
        wide = {name: p.double() for name, p in params.items()}
        poison_allocator(x.numel() * x.element_size())
        actual, beside = (gradients(f, x, params, grad, order=order) for f in (invertible_conv1x1, plain))
        exact = gradients(plain, x.double(), wide, grad.double(), order=order)
        assert all(a.dtype == dtype for a in actual)
        for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
            assert_bar(a, b, e, SLACK[dtype], terms=1.0 if i < 2 else math.sqrt(x.numel()))
        assert list(actual[0].stride()) == list(actual[1].stride()) == output_strides(x)


@pytest.mark.isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 12, 8, 8), (2, 48, 4, 4), (3, 96, 2, 2), (50, 7)])
def test_inverse(shape, dtype, form):
    params = parameters(shape[1], dtype)
    x = randn(*shape, dtype=dtype)
    y = invertible_conv1x1(x, **params, **form)
    back = invertible_conv1x1(y, **params, **{**form, "inverse": not form["inverse"]})
    assert (back - x).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_actnorm_is_that_of_the_family(form, layout):
    x, params = laid_out(randn(2, 5, 4, 6), layout), parameters(5, torch.float64, ("scale", "shift"))
    weight, scale, shift = params.values()
    if form["inverse"]:
        z = invertible_conv1x1(x, weight, inverse=True)
        expected, log_det = actnorm(z, scale, shift, **form)
        log_det = log_det + invertible_conv1x1_log_det(x, weight, inverse=True)
    else:
        z, log_det = actnorm(x, scale, shift, **form)
        expected = invertible_conv1x1(z, weight)
        log_det = log_det + invertible_conv1x1_log_det(x, weight)
    torch.testing.assert_close(invertible_conv1x1(x, **params, **form), expected)
    logs = scale.log()
    torch.testing.assert_close(invertible_conv1x1(x, weight, logs, shift, log_scale=True, **form), expected)
    of_logs = invertible_conv1x1_log_det(x, weight, logs, log_scale=True, inverse=form["inverse"])
    torch.testing.assert_close(of_logs, log_det)
    torch.testing.assert_close(invertible_conv1x1_log_det(x, weight, scale, inverse=form["inverse"]), log_det)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_log_det_is_that_of_the_jacobian(form, shape):
    x, params = randn(*shape), parameters(shape[1], torch.float64)
    log_det = invertible_conv1x1_log_det(x, params["weight"], params["scale"], inverse=form["inverse"])
    for i, sample in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(
            lambda t: invertible_conv1x1(t[None], **params, **form)[0], sample
        )
        size = sample.numel()
        assert (torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet - log_det[i]).abs() <= 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, layout):
    x, params = laid_out(randn(2, 3, 2, 3), layout), parameters(3, torch.float64)

    def function(x, *values):
        given_ = dict(zip(params, values, strict=True))
        log_det = invertible_conv1x1_log_det(x, given_["weight"], given_["scale"], inverse=form["inverse"])
        return invertible_conv1x1(x, **given_, **form), log_det

    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in (x, *params.values())])


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    x, w = randn(2, 4, 3, 2).requires_grad_(), parameters(4, torch.float64)["weight"].clone().requires_grad_()
    functions = {
        "cat": lambda x, w: torch.cat([invertible_conv1x1(x, w), x * 2], 1)[:, 1:5],
        "expanded gradient": lambda x, w: invertible_conv1x1(x, w).sum() * invertible_conv1x1(x, w),
        "channels-last": lambda x, w: invertible_conv1x1(x.to(memory_format=torch.channels_last), w).contiguous() * x,
        "transposed": lambda x, w: invertible_conv1x1(x, w.T).transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda x, w: invertible_conv1x1(x[:1].expand(2, -1, -1, -1), w[:1].expand(4, -1)) * 2,
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda *a, f=function: f(*a), (x, w)), name


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_at_its_position(layout):
    x = laid_out(randn(2, 5, 3, 4, dtype=torch.float32), layout)
    x[1, 2, 1, 3] = math.nan
    y = invertible_conv1x1(x, **parameters(5, torch.float32))
    assert y[1, :, 1, 3].isnan().all() and y.isnan().sum() == 5


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (0, 3)])
def test_nothing(shape):
    leaves = {name: p.requires_grad_() for name, p in parameters(shape[1], torch.float32).items()}
    x = torch.zeros(shape, requires_grad=True)
    y = invertible_conv1x1(x, **leaves)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and not any(p.grad.any() for p in leaves.values())


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    sizes[1] = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    padding = [data.draw(st.integers(0, 3)) for _ in sizes]
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), dtype=dtype)
    order = data.draw(st.permutations(range(len(sizes))))
    base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    x = guarded(base[tuple(slice(p, None) for p in padding)])
    params = parameters(sizes[1], dtype)
    actual, beside = invertible_conv1x1(x, **params), plain(x, **params)
    exact = plain(x.double(), **{name: p.double() for name, p in params.items()})
    assert_bar(actual, beside, exact, slack=SLACK[dtype], terms=3.0)
    assert list(actual.stride()) == output_strides(x)


def test_views_are_read_in_place():
    big, params = randn(2, 24, 6, 5, dtype=torch.float32), parameters(8, torch.float32)
    for view in (*(laid_out(big, layout)[:, 8:16] for layout in LAYOUTS), big[:1, :8].expand(3, -1, -1, -1)):
        with torch.profiler.profile() as profile:
            ops.invertible_conv1x1_fwd(view, *params.values(), False)
            ops.invertible_conv1x1_bwd(view, view, params["weight"], None, None, False)
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone"}


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 12, 64, 64), (1, 48, 40, 41), (7000, 6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x, grad = laid_out(randn(*shape, dtype=torch.float32), layout), randn(*shape, seed=4, dtype=torch.float32)
    params = parameters(shape[1], torch.float32)
    assert_any_threads(lambda: gradients(invertible_conv1x1, x, params, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2)])
def test_fakes(shape, layout):
    for op, make in OPS.items():
        compare = assert_registered if shape == (2, 6, 4, 5) and layout == "contiguous" else assert_fake
        for dtype in (torch.float32, torch.bfloat16):
            compare(getattr(ops, op).default, make(shape, dtype, layout=layout))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    params = parameters(8, torch.float32)
    leaf, other = (laid_out(randn(2, 8, 6, 6, dtype=torch.float32), "channels_last").requires_grad_() for _ in range(2))

    def model(t):
        y = invertible_conv1x1(t * 2, **params)
        back = invertible_conv1x1(y, **params, inverse=True)
        return (y + back).square().flatten(1).sum(1) + invertible_conv1x1_log_det(t, params["weight"])

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(*(torch.autograd.grad(f(t).sum(), t)[0] for f, t in ((compiled, leaf), (model, other))))


def test_the_inverse_of_a_badly_conditioned_matrix():
    """Found in float64: with a condition of 1e4 the error in float32 is that of the two products, not of the inverse."""
    left, right = (torch.linalg.qr(randn(12, 12, seed=i))[0] for i in (1, 2))
    weight = ((left * torch.logspace(-2, 2, 12).double()) @ right).float()
    x = randn(2, 12, 4, 4, dtype=torch.float32)
    exact = plain(x.double(), weight.double(), inverse=True)
    error = (invertible_conv1x1(x, weight, inverse=True) - exact).abs().max() / exact.abs().max()
    assert error <= 1e-6


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"order must be one of \('scale_shift', 'shift_scale'\), got 'both'", {"order": "both"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C, \*\], got shape \(6,\)", {"input": torch.zeros(6)}),
        (ValueError, r"weight must be \[C, C\] with C = 6, got shape \(6, 3\)", {"weight": torch.ones(6, 3)}),
        (TypeError, "weight must be a floating-point tensor, got NoneType", {"weight": None}),
        (ValueError, r"scale must be \[C\] with C = 6, got shape \(3,\)", {"scale": torch.ones(3)}),
        (ValueError, r"bias must be \[C\] with C = 6, got shape \(6, 1\)", {"bias": torch.ones(6, 1)}),
        (ValueError, "shift must be on the device of input .* got meta", {"shift": torch.ones(6, device="meta")}),
        (ValueError, r"weight of shape \(6, 6\) is singular", {"weight": torch.ones(6, 6), "inverse": True}),
    ],
)
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(2, 6, 3), "weight": torch.eye(6)} | change
    with pytest.raises(error, match=f"invertible_conv1x1: {message}"):
        invertible_conv1x1(**arguments)


def test_the_log_det_of_a_singular_matrix():
    assert (
        invertible_conv1x1_log_det(forward((2, 6, 3), torch.float32)[0], torch.ones(6, 6)).tolist() == [-math.inf] * 2
    )


@pytest.mark.isa
@pytest.mark.parametrize("log_scale", [True, False, None])
@pytest.mark.parametrize("c", [1, 2, 12, 33, 96, 128, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_det_and_its_gradients(dtype, c, log_scale):
    """Beside torch's in float64; above 128 channels it is torch's."""
    x, params = torch.zeros(3, c, 2, 5, dtype=dtype), parameters(c, dtype)
    leaves = [params["weight"], *([] if log_scale is None else [params["scale"]])]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    log_det = invertible_conv1x1_log_det(x, *leaves, log_scale=bool(log_scale), inverse=True)
    logs = 0 if log_scale is None else (wide[1] if log_scale else wide[1].log()).sum()
    exact = -10 * (torch.linalg.slogdet(wide[0]).logabsdet + logs).expand(3)
    assert log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and log_det.shape == (3,)
    bound = {torch.float64: 1e-11, torch.float32: 1e-6}.get(dtype, 1e-6)
    torch.testing.assert_close(log_det.detach().double(), exact.detach(), rtol=bound, atol=10 * bound)
    with torch.no_grad():
        assert torch.equal(invertible_conv1x1_log_det(x, *leaves, log_scale=bool(log_scale), inverse=True), log_det)
    grad = randn(3, seed=8)
    actual = torch.autograd.grad(log_det, leaves, grad.to(log_det.dtype))
    rounding = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, e, leaf in zip(actual, torch.autograd.grad(exact, wide, grad), leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - e).abs().max() <= rounding * e.abs().max()


@pytest.mark.isa
@pytest.mark.parametrize("gradient", [True, False])
def test_the_log_det_of_what_has_none(gradient):
    op = ops.invertible_conv1x1_log_det
    log_det, inverse = op(torch.ones(5, 5), None, False, 2, 3, False, gradient)
    assert log_det.tolist() == [-math.inf] * 2 and inverse.shape == ((5, 5) if gradient else (0, 0))
    assert inverse.isnan().all()
    for bad in (math.nan, math.inf):
        weight = torch.eye(5)
        weight[1, 3] = bad
        assert op(weight, None, False, 2, 3, True, gradient)[0].isnan().all() or bad == math.inf
    empty, _ = op(torch.zeros(0, 0), None, False, 2, 3, False, gradient)
    assert empty.tolist() == [0.0, 0.0] and op(torch.eye(3), None, False, 0, 3, False, gradient)[0].shape == (0,)
    negative, inverse = op(-2 * torch.eye(3), torch.full((3,), -0.5), False, 1, 4, False, True)
    assert abs(negative.item()) <= 1e-14 and torch.equal(inverse, -2 * torch.eye(3))
    for wide in (False, True):
        assert_fake(op.default, (randn(4, 4).T, randn(4).exp(), False, 2, 7, wide, gradient))


def test_the_log_det_of_many_matrices_of_a_large_one_and_of_float8():
    x, weights = torch.zeros(2, 4, 3), randn(5, 4, 4)
    log_dets = lambda w: invertible_conv1x1_log_det(x, w).sum()  # noqa: E731
    actual = torch.func.vmap(torch.func.grad(log_dets))(weights)
    torch.testing.assert_close(actual, 6 * torch.linalg.inv(weights).mT, rtol=1e-5, atol=1e-5)
    large = invertible_conv1x1_log_det(torch.zeros(1, 130, 3), torch.eye(130), torch.full((130,), -2.0))
    torch.testing.assert_close(large, torch.tensor([3 * 130 * math.log(2)]))
    eighth = weights[0].to(torch.float8_e4m3fn)
    assert torch.equal(invertible_conv1x1_log_det(x, eighth), invertible_conv1x1_log_det(x, eighth.float()))


@pytest.mark.isa
def test_a_matrix_whose_largest_elements_are_not_on_its_diagonal():
    for seed in range(20):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        weight = torch.eye(9, dtype=torch.float64)[order] + 0.1 * randn(9, 9, seed=seed)
        log_det, inverse = ops.invertible_conv1x1_log_det(weight, None, False, 1, 1, True, True)
        torch.testing.assert_close(inverse.T @ weight, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(weight).logabsdet, rtol=1e-12, atol=1e-12)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(30, 5, 4, 4), (13, 18, 7, 7), (7, 50, 9, 9), (40, 6, 1, 3), (25, 96, 4, 4)])
def test_samples_smaller_than_a_tile(shape, layout):
    """Several lie in one tile, and in another order where a dimension of samples is expanded or cut."""
    params = parameters(shape[1], torch.float32)
    whole = laid_out(randn(*shape, dtype=torch.float32), layout)
    for x in (
        whole,
        whole[1::2],
        whole[:1].expand(shape),
        laid_out(torch.cat([whole, whole], 1), layout)[:, : shape[1]],
    ):
        grad = laid_out(randn(*x.shape, seed=4, dtype=torch.float32), layout)
        poison_allocator(x.numel() * x.element_size())
        actual, beside = (gradients(f, x, params, grad) for f in (invertible_conv1x1, plain))
        wide = {name: p.double() for name, p in params.items()}
        exact = gradients(plain, x.double(), wide, grad.double())
        for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
            assert_bar(a, b, e, 1e-6, terms=1.0 if i < 2 else math.sqrt(x.numel()))
    assert_any_threads(lambda: gradients(invertible_conv1x1, whole, params, whole))
