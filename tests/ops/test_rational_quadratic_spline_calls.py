"""`rational_quadratic_spline` as calls: forms of the parameters, masks, layouts, what is kept, fakes, compilation, errors."""

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
    randn,
)
from .rational_quadratic_spline_cases import FORMS, apart, backward, forward, gradients, parameters, planes

ops = torch.ops.fastgen


def spline(x, packed, **options):
    return rational_quadratic_spline(x, packed, **options)


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
