"""`gaussian_log_prob`: values, gradients, layouts, what is summed in which order, errors."""

import math

import pytest
import torch

from fastgen._schema import GAUSSIAN_LAYOUTS
from fastgen.ops import gaussian_log_prob
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .gaussian_log_prob_cases import KINDS, OPS, SHAPES, gradients, options, parameters, plain
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
SLACK = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 0.0, torch.float16: 0.0}


@pytest.mark.isa
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, kind, layouts):
    x = guarded(laid_out(randn(*shape, dtype=dtype), layouts[0]))
    tensors, grad = [x, *parameters(kind, shape, dtype, layouts[1])], randn(shape[0], seed=3, dtype=dtype)
    poison_allocator(2 * x.numel() * x.element_size())
    actual, beside = (gradients(f, tensors, kind, grad) for f in (gaussian_log_prob, plain))
    exact = gradients(plain, [t.double() for t in tensors], kind, grad.double())
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, SLACK[dtype])
    for a, t in zip(actual[1:], tensors, strict=True):
        assert a.dtype == dtype and list(a.stride()) == output_strides(t)


@pytest.mark.isa
@pytest.mark.parametrize("kind", ["apart", "interleaved"])
@pytest.mark.parametrize("dtypes", [(d, p) for d in DTYPES for p in DTYPES if d != p])
def test_parameters_of_another_dtype(dtypes, kind):
    dtype, other = dtypes
    tensors = [randn(2, 6, 5, 9, dtype=dtype), *parameters(kind, (2, 6, 5, 9), other)]
    actual = gradients(gaussian_log_prob, tensors, kind, torch.ones(2))
    exact = gradients(plain, [t.double() for t in tensors], kind, torch.ones(2).double())
    assert [a.dtype for a in actual[1:]] == [t.dtype for t in tensors]
    for a, e in zip(actual, exact, strict=True):
        eps = max(torch.finfo(a.dtype).eps, 1e-15 if dtype == torch.float64 else 4e-7)
        assert (a - e).abs().max() <= eps * e.abs().max().clamp_min(1)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_read_where_they_lie(kind, layout):
    """The half that a split leaves, of either layout, with the packed output of a network: no copy."""
    x = laid_out(randn(3, 12, 4, 5, dtype=torch.float32), layout)[:, 6:]
    given = parameters(kind, (3, 6, 4, 5), torch.float32, layout)
    with torch.profiler.profile() as profile:
        y = gaussian_log_prob(x, *given, **options(kind))
    assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone"}
    torch.testing.assert_close(y, plain(x, *given, **options(kind)), rtol=1e-5, atol=1e-4)


def test_parameters_broadcast():
    x = randn(3, 4, 2, 5)
    for mean, log_scale in (
        ((4, 1, 1), (4, 1, 1)),
        ((1, 4, 1, 1), (3, 4, 2, 5)),
        ((), (1,)),
        ((4, 2, 5), (3, 1, 1, 1)),
    ):
        tensors = [x, randn(*mean, seed=1), randn(*log_scale, seed=2)]
        for a, e in zip(
            *(gradients(f, tensors, "apart", torch.ones(3)) for f in (gaussian_log_prob, plain)), strict=True
        ):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, layout):
    tensors = [laid_out(randn(2, 3, 2, 4), layout), *parameters(kind, (2, 3, 2, 4), torch.float64, layout)]
    function = lambda *t: gaussian_log_prob(*t, **options(kind))  # noqa: E731
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors])


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    x, packed = randn(2, 4, 3, 2).requires_grad_(), randn(2, 4, 3, 2, seed=1).requires_grad_()
    functions = {
        "a split": lambda x, p: gaussian_log_prob(x[:, 2:], p * x[:, :1]),
        "an expanded gradient": lambda x, p: gaussian_log_prob(x[:, :2], p).sum() * x,
        "channels-last": lambda x, p: gaussian_log_prob(x[:, ::2], p.to(memory_format=torch.channels_last)),
        "transposed": lambda x, p: gaussian_log_prob(x.transpose(2, 3)[:, 1:3], p.transpose(2, 3)) ** 2,
        "expanded": lambda x, p: gaussian_log_prob(x[:1, 2:].expand(2, -1, -1, -1), p[:1].expand(2, -1, -1, -1)),
    }
    for name, function in functions.items():
        for layout in GAUSSIAN_LAYOUTS:
            assert torch.autograd.gradcheck(function, (x, packed)), (name, layout)


@pytest.mark.isa
def test_a_density_integrates_to_one():
    x = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    mean, log_scale = torch.full_like(x, 0.7), torch.full_like(x, 0.9)
    density = gaussian_log_prob(x[:, None], mean[:, None], log_scale[:, None]).exp()
    assert abs(torch.trapezoid(density, x).item() - 1) <= 1e-9


@pytest.mark.isa
def test_nan_stays_in_its_sample():
    x, mean, log_scale = (randn(3, 5, 4, seed=i, dtype=torch.float32) for i in range(3))
    for t in (x, mean, log_scale):
        before = t[1, 2, 3].clone()
        t[1, 2, 3] = math.nan
        assert gaussian_log_prob(x, mean, log_scale).isnan().tolist() == [False, True, False]
        t[1, 2, 3] = before


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (0, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing(kind, shape):
    leaves = [t.requires_grad_() for t in (torch.zeros(shape), *parameters(kind, shape, torch.float32))]
    y = gaussian_log_prob(*leaves, **options(kind))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(shape[0])) and all(t.grad.shape == t.shape for t in leaves)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 12, 64, 64), (1, 2, 200, 201), (7000, 6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x = laid_out(randn(*shape, dtype=torch.float32), layout)
    for kind in KINDS:
        tensors = [x, *parameters(kind, shape, torch.float32, layout)]
        assert_any_threads(
            lambda tensors=tensors, kind=kind: gradients(gaussian_log_prob, tensors, kind, torch.ones(shape[0]))
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2)])
def test_fakes(shape, layout):
    for op, make in OPS.items():
        for kind in KINDS:
            full = shape == (2, 6, 4, 5) and layout == "contiguous" and kind in ("apart", "interleaved")
            compare = assert_registered if full else assert_fake
            for dtype in (torch.float32, torch.bfloat16):
                compare(getattr(ops, op).default, make(shape, kind, dtype, layout))


def test_compiled():
    torch._dynamo.reset()
    x, packed = randn(2, 8, 6, 6, dtype=torch.float32), randn(2, 8, 6, 6, seed=1, dtype=torch.float32)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def model(t):
        return gaussian_log_prob(t[:, 4:] * 2, packed) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(*(torch.autograd.grad(f(t).sum(), t)[0] for f, t in ((compiled, leaf), (model, other))))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"layout must be one of .*got 'both'", {"layout": "both"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C, \*\], got shape \(6,\)", {"input": torch.zeros(6)}),
        (ValueError, "log_scale needs mean beside it, got None", {"mean": None}),
        (ValueError, r"mean must broadcast to the shape of input \(2, 6, 3\), got shape \(5, 3\)", {"mean": torch.ones(5, 3)}),
        (ValueError, r"mean must be \[N, 2 C, \*\] where log_scale is not given, got shape \(2, 6, 3\)", {"log_scale": None}),
        (ValueError, "log_scale must be on the device of input .* got meta", {"log_scale": torch.ones(2, 6, 3, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(2, 6, 3), "mean": torch.ones(2, 6, 3), "log_scale": torch.zeros(2, 6, 3)}
    with pytest.raises(error, match=f"gaussian_log_prob: {message}"):
        gaussian_log_prob(**(arguments | change))
