"""`actnorm` and `actnorm_statistics`: values, gradients, log-determinants, inverses, layouts, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.ops import actnorm, actnorm_statistics
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .actnorm_cases import FORMS, OPS, SHAPES, gradients, parameters, plain
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
SLACK = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 0.0, torch.float16: 0.0}


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, layout):
    x = guarded(laid_out(randn(*shape, dtype=dtype), layout))
    tensors = [x, *parameters(shape, dtype)]
    grads = randn(*shape, seed=3, dtype=dtype), randn(shape[0], seed=4, dtype=dtype)
    wide = [t.double() for t in tensors]
    for form in FORMS:
        poison_allocator(x.numel() * x.element_size())
        actual, beside = (gradients(f, tensors, grads, **form) for f in (actnorm, plain))
        exact = gradients(plain, wide, tuple(g.double() for g in grads), **form)
        assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(a.dtype == dtype for i, a in enumerate(actual) if i != 1)
        positions = math.prod(shape[2:])
        for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
            assert_bar(a, b, e, SLACK[dtype], terms=1.0 if i in (0, 2) else math.sqrt(x.numel()) * positions**0.5)
        assert list(actual[0].stride()) == list(actual[2].stride()) == output_strides(x)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_inverse_and_log_det(form, dtype):
    x = randn(3, 5, 4, 6, dtype=dtype)
    scale, shift = parameters((3, 5), dtype)
    y, log_det = actnorm(x, scale, shift, **form)
    back, negative = actnorm(y, scale, shift, **{**form, "inverse": not form["inverse"]})
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (back - x).abs().max() <= bound and (log_det + negative).abs().max() <= bound


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_log_det_is_that_of_the_jacobian(form, shape):
    x, (scale, shift) = randn(*shape), parameters(shape, torch.float64)
    _, log_det = actnorm(x, scale, shift, **form)
    for i, sample in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda t: actnorm(t[None], scale, shift, **form)[0], sample)
        size = sample.numel()
        assert (torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet - log_det[i]).abs() <= 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, layout):
    leaves = [laid_out(randn(2, 3, 2, 3), layout), *parameters((2, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: actnorm(*t, **form), [t.clone().requires_grad_() for t in leaves])


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    x, (s, t) = randn(2, 4, 3, 2).requires_grad_(), parameters((2, 4), torch.float64)
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    functions = {
        "cat": lambda x, s, t: torch.cat([actnorm(x, s, t)[0], x * 2], 1)[:, 1:5],
        "expanded gradient": lambda x, s, t: actnorm(x, s, t)[0].sum() * actnorm(x, s, t)[1],
        "log_det alone": lambda x, s, t: actnorm(x, s, t)[1] * x[:, 0, 0, 0],
        "channels-last": lambda x, s, t: actnorm(x.to(memory_format=torch.channels_last), s, t)[0].contiguous() * x,
        "transposed": lambda x, s, t: actnorm(x, s, t)[0].transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda x, s, t: actnorm(x[:1].expand(2, -1, -1, -1), s[:1].expand(4), t)[0] * 2,
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda *a, f=function: f(*a), (x, s, t)), name


@pytest.mark.isa
def test_what_cancels_is_added_first():
    """A mean of 1e4 and the shift that removes it: the error is that of x + t, exact here, not that of x s."""
    x = (1e4 + randn(4, 3, 20, 20)).float()
    scale, shift = torch.tensor([1.7, 0.3, 1.1]), torch.full((3,), -1e4)
    y, _ = actnorm(x, scale, shift, order="shift_scale")
    exact = (x.double() - 1e4) * scale.double()[:, None, None]
    assert (y - exact).abs().max() <= 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (5000, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, shape, layout, correction):
    x = guarded(laid_out((3 * randn(*shape) + 2).to(dtype), layout))
    mean, deviation = actnorm_statistics(x, correction=correction)
    wide = x.double().movedim(1, 0).flatten(1)
    exact = wide.mean(1), wide.std(1, correction=correction)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close((mean.double(), deviation.double()), exact, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_large_means(layout):
    x = laid_out((1e4 + randn(8, 5, 40, 40)).float(), layout)
    mean, deviation = actnorm_statistics(x)
    wide = x.double().movedim(1, 0).flatten(1)
    assert (mean - wide.mean(1)).abs().max() <= 1e-3 and (deviation - wide.std(1)).abs().max() <= 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_place(layout):
    x = laid_out(randn(2, 5, 3, 4, dtype=torch.float32), layout)
    x[1, 2, 1, 3] = math.nan
    scale, shift = parameters((2, 5), torch.float32)
    assert actnorm(x, scale, shift)[0].isnan().nonzero().tolist() == [[1, 2, 1, 3]]
    for statistic in actnorm_statistics(x):
        assert statistic.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (0, 3)])
def test_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    scale, shift = torch.ones(shape[1], requires_grad=True), torch.ones(shape[1], requires_grad=True)
    y, log_det = actnorm(x, scale, shift)
    (y.sum() + log_det.sum()).backward()
    assert y.shape == x.grad.shape == shape and log_det.shape == shape[:1]
    assert not shift.grad.any() and actnorm_statistics(x)[0].isnan().all()


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    dtype = data.draw(st.sampled_from(DTYPES))
    padding = [data.draw(st.integers(0, 3)) for _ in sizes]
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), dtype=dtype)
    order = data.draw(st.permutations(range(len(sizes))))
    base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    x = guarded(base[tuple(slice(p, None) for p in padding)])
    tensors, form = [x, *parameters(tuple(sizes), dtype)], data.draw(st.sampled_from(FORMS))
    actual, beside = actnorm(*tensors, **form)[0], plain(*tensors, **form)[0]
    exact = plain(*(t.double() for t in tensors), **form)[0]
    assert_bar(actual, beside, exact, slack=max(SLACK[dtype], 3e-7 if dtype == torch.float32 else 0.0))
    assert list(actual.stride()) == output_strides(x)


def test_views_are_read_in_place():
    big = randn(2, 24, 6, 5, dtype=torch.float32)
    scale, shift = parameters((2, 8), torch.float32)
    for view in (*(laid_out(big, layout)[:, 8:16] for layout in LAYOUTS), big[:1, :8].expand(3, -1, -1, -1)):
        with torch.profiler.profile() as profile:
            ops.actnorm_fwd(view, scale, shift, False, False, False)
            ops.actnorm_bwd(view, None, view, scale, shift, False, False, False)
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone"}


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 12, 64, 64), (1, 2, 200, 201), (70000, 6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x = laid_out(randn(*shape, dtype=torch.float32), layout)
    tensors, grads = (
        [x, *parameters(shape, torch.float32)],
        (randn(*shape, seed=4).float(), randn(shape[0], seed=5).float()),
    )
    assert_any_threads(lambda: gradients(actnorm, tensors, grads))
    assert_any_threads(lambda: actnorm_statistics(x))


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
    scale, shift = parameters((2, 8), torch.float32)
    leaf, other = (laid_out(randn(2, 8, 6, 6, dtype=torch.float32), "channels_last").requires_grad_() for _ in range(2))

    def model(t):
        y, log_det = actnorm(t * 2, scale, shift)
        return y.square().flatten(1).sum(1) + log_det

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(*(torch.autograd.grad(f(t).sum(), t)[0] for f, t in ((compiled, leaf), (model, other))))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"order must be one of \('scale_shift', 'shift_scale'\), got 'both'", {"order": "both"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C, \*\], got shape \(6,\)", {"input": torch.zeros(6)}),
        (ValueError, r"scale must be \[C\] with C = 6, got shape \(3,\)", {"scale": torch.ones(3)}),
        (ValueError, r"shift must be \[C\] with C = 6, got shape \(6, 1\)", {"shift": torch.ones(6, 1)}),
        (ValueError, "scale must be on the device of input .* got meta", {"scale": torch.ones(6, device="meta")}),
        (RuntimeError, r"scale must not be 0, got scale\[0\] = 0", {"scale": torch.zeros(6)}),
    ],
)
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(2, 6, 3), "scale": torch.ones(6), "shift": torch.zeros(6)} | change
    with pytest.raises(error, match=f"actnorm: {message}"):
        actnorm(**arguments)


def test_errors_of_statistics():
    with pytest.raises(ValueError, match=r"actnorm_statistics: correction must be 0 or 1, got 2"):
        actnorm_statistics(torch.zeros(2, 3), correction=2)
    with pytest.raises(ValueError, match=r"actnorm_statistics: input must be \[N, C, \*\], got shape \(3,\)"):
        actnorm_statistics(torch.zeros(3))
