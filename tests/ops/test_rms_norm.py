"""`rms_norm`: values, gradients, memory, layouts, errors; both conventions that it stands for."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.ops import rms_norm
from fastgen.reference import rms_norm as reference
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
    poison_allocator,
    randn,
)
from .rms_norm_cases import IMAGES, NAMES, TOKENS, backward, forward, fused, gradients, parameters, plain

WAYS = [*((shape, False, "contiguous") for shape in TOKENS), *itertools.product(IMAGES, (True,), LAYOUTS)]


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("shape", "channels", "layout"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, channels, layout, full):
    x = guarded(laid_out((3 * randn(*shape) + 1).to(dtype), layout))
    params = parameters(shape, channels, dtype)
    params, activation = (params, "silu") if full else ({"weight": params["weight"]}, None)
    grad = randn(*shape, seed=3, dtype=dtype)
    poison_allocator(x.numel() * x.element_size())
    actual = gradients(fused, x, channels, params, activation, grad)
    beside = gradients(plain, x, channels, params, activation, grad)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), channels, wide, activation, grad.double())
    for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
        assert a.dtype == dtype
        # sums of as many terms of order 1 as there are slices; nothing is more exact than float64 to compare it with
        slack = 1e-12 if dtype == torch.float64 else 0.0 if i == 0 else 1e-6
        assert_bar(a, b, e, slack, math.sqrt(x.numel() / shape[1 if channels else -1]))
    assert list(actual[0].stride()) == list(actual[1].stride()) == output_strides(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_two_conventions(dtype):
    """The defaults of torch's, and denoising-diffusion-pytorch's formula, letter by letter."""
    x, g = (0.01 * randn(2, 6, 5, 8)).to(dtype), randn(1, 6, 1, 1, seed=1, dtype=dtype)
    expected = F.rms_norm(x, (8,))
    torch.testing.assert_close(rms_norm(x, 8), expected)
    torch.testing.assert_close(rms_norm(x, (5, 8), g.new_ones(5, 8), 0.1), F.rms_norm(x, (5, 8), None, 0.1))
    expected = F.normalize(x.double(), dim=1) * g.double() * 6**0.5
    assert_bar(rms_norm(x, None, g, 0.0, min_norm=1e-12), expected.to(dtype), expected, slack=1e-6)
    assert torch.equal(rms_norm(x, None, g, 0.0), rms_norm(x, None, g.flatten(), 0.0))


@pytest.mark.isa
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_below_the_least(dtype, channels):
    """They are divided by the least, which has no gradient; and where all are zero there is no NaN."""
    x = randn(2, 8, 9, 8, dtype=dtype)
    x[0, :, :, :4] *= 1e-3
    x[0, :, 4] = 0.0
    dim, grad = 1 if channels else -1, randn(2, 8, 9, 8, seed=1, dtype=dtype)
    found = []
    for function in (
        lambda t: rms_norm(t, None if channels else 8, None, 0.0, min_norm=1.3),
        lambda t: F.normalize(t, dim=dim, eps=1.3) * 8**0.5,
    ):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        found.append((y, torch.autograd.grad(y, leaf, grad)[0]))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e)
    assert not rms_norm(torch.zeros(2, 8, 3), None if channels else 3, None, 0.0, min_norm=1e-12).any()


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_float32_parameters(dtype, layout):
    shape = (2, 32, 9, 8)
    x, params = laid_out(randn(*shape, dtype=dtype), layout), parameters(shape, True, torch.float32)
    leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    actual = fused(x, True, **leaves, activation="silu")
    exact = plain(x.double(), True, **{k: p.double() for k, p in params.items()}, activation="silu")
    assert actual.dtype == dtype
    assert_bar(actual.detach(), exact.to(dtype), exact, slack=5e-4)
    actual.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in leaves.values())


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("channels", [True, False])
def test_nothing(shape, channels):
    x = torch.zeros(shape, requires_grad=True)
    leaves = {k: torch.zeros_like(p).requires_grad_() for k, p in parameters(shape, channels, torch.float32).items()}
    y = fused(x, channels, **leaves, activation="silu")
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and not any(p.grad.any() for p in leaves.values())


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_pixel(value, layout, dtype):
    x = laid_out(randn(2, 21, 6, 6, dtype=dtype), layout)
    x[1, 5, 2, 3] = value
    for activation in (None, "silu"):
        y, expected = (function(x, True, activation=activation) for function in (fused, plain))
        assert torch.equal(y.isnan(), expected.isnan())
        assert y[1, 5, 2, 3].isnan() and y[0].isfinite().all()


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5)))
    channels, dtype = data.draw(st.booleans()), data.draw(st.sampled_from(DTYPES))
    padding = [data.draw(st.integers(0, 3)) for _ in sizes]
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), seed=len(sizes), dtype=dtype)
    order = data.draw(st.permutations(range(len(sizes))))
    base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    x = guarded(base[tuple(slice(p, None) for p in padding)])
    params = {k: v for k, v in parameters(sizes, channels, dtype).items() if data.draw(st.booleans())}
    activation = data.draw(st.sampled_from([None, "silu"]))
    actual = rms_norm(x, None if channels else sizes[-1], **params, eps=1e-5, activation=activation)
    arguments = [params.get(name) for name in NAMES]
    wide = [None if p is None else p.double() for p in arguments]
    rest = (1e-5, 0.0, 1 if activation else 0)
    exact = reference.rms_norm(x.double(), channels, *wide, *rest)
    assert_bar(actual, reference.rms_norm(x, channels, *arguments, *rest), exact, slack=1e-6)
    assert list(actual.stride()) == (output_strides(x) if channels else list(torch.empty(sizes).stride()))


def test_views_are_read_in_place():
    """Channel slices of either layout, tokens of a larger tensor: no copy, which would be an op of torch's."""
    big = randn(2, 24, 6, 5, dtype=torch.float32)
    cases = [(laid_out(big, layout)[:, 8:16], None) for layout in LAYOUTS]
    cases += [(big.flatten(2)[:, 3:], 30), (big.flatten(2)[:, :, :8], 8), (big[:1].expand(3, -1, -1, -1), None)]
    for view, size in cases:
        with torch.profiler.profile() as profile:
            y = rms_norm(view, size, eps=1e-5)
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone", "aten::contiguous"}
        expected = reference.rms_norm(view, size is None, None, None, None, 1e-5, 0.0, 0)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [True, False])
def test_gradcheck(channels, layout, index):
    shape = (2, 4, 3, 5)
    tensors = [laid_out(randn(*shape), layout), *parameters(shape, channels, torch.float64).values()]
    tensors[index].requires_grad_()

    def function(t):
        x, *params = [*tensors[:index], t, *tensors[index + 1 :]]
        return fused(x, channels, **dict(zip(NAMES, params, strict=True)), activation="silu")

    assert torch.autograd.gradcheck(function, (tensors[index],))


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last."""
    x = randn(2, 4, 3, 2).requires_grad_()

    def norm(t, **options):
        return fused(t, True, **options)

    functions = {
        "cat": lambda t: torch.cat([norm(t), t * 2], dim=1)[:, 1:5],
        "expanded gradient": lambda t: norm(t).sum() * norm(t, activation="silu"),
        "channels-last into contiguous": lambda t: norm(t.to(memory_format=torch.channels_last)).contiguous() * t,
        "contiguous into channels-last": lambda t: norm(t).to(memory_format=torch.channels_last) * t,
        "transposed": lambda t: norm(t).transpose(2, 3)[:, ::2] ** 2,
        "tokens": lambda t: fused(t.flatten(2).mT, False).mT * 2,
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(function, (x,)), name


def test_only_the_gradients_asked_for():
    x, params = randn(2, 6, 3).float(), parameters((2, 6, 3), True, torch.float32)
    for name, p in params.items():
        leaf = p.clone().requires_grad_()
        y = fused(x, True, **{**params, name: leaf})
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == p.shape
    with torch.no_grad():
        assert not fused(x, True, params["weight"].requires_grad_()).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize(
    ("shape", "channels"), [((3, 32, 40, 40), True), ((1, 8, 200, 201), True), ((3, 201, 64), False)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape, channels):
    x, params = laid_out(randn(*shape, dtype=torch.float32), layout), parameters(shape, channels, torch.float32)
    grad = randn(*shape, seed=4, dtype=torch.float32)
    for given_ in (params, {"weight": params["weight"]}):
        assert_any_threads(lambda given_=given_: gradients(fused, x, channels, given_, "silu", grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2), (1, 1, 3, 3)])
def test_fakes(shape, layout):
    ops = torch.ops.fastgen
    for channels, full in itertools.product((True, False), (True, False)):
        compare = assert_registered if channels and full and len(shape) == 4 and shape[0] == 2 else assert_fake
        arguments = (shape, channels, torch.float32, layout, full)
        if 0 in shape:
            arguments = (*arguments[:-1], True)
        compare(ops.rms_norm.default, forward(*arguments))
        compare(ops.rms_norm_fwd.default, forward(*arguments))
        compare(ops.rms_norm_bwd.default, backward(*arguments))
    assert_fake(ops.rms_norm_fwd.default, forward(shape, True, torch.bfloat16, layout))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    x, params = (
        laid_out(randn(2, 8, 6, 6, dtype=torch.float32), "channels_last"),
        parameters((2, 8), True, torch.float32),
    )

    def model(t):
        return fused(t * 2, True, **params, activation="silu") + 1

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


@pytest.mark.parametrize(
    ("error", "message", "size", "options"),
    [
        (
            ValueError,
            r"normalized_shape must be the last sizes of input, got \(7,\) and input of shape \(2, 3, 8\)",
            7,
            {},
        ),
        (ValueError, r"weight must have shape \(8,\), got shape \(3,\)", 8, {"weight": torch.ones(3)}),
        (ValueError, r"weight must have shape \(3,\), got shape \(8,\)", None, {"weight": torch.ones(8)}),
        (ValueError, r"weight must have shape \(3,\), got shape \(1, 3, 2\)", None, {"weight": torch.ones(1, 3, 2)}),
        (ValueError, r"scale must have shape \(2, 3\), got shape \(2, 8\)", None, {"scale": torch.ones(2, 8)}),
        (ValueError, "shift must be on the device", 8, {"shift": torch.zeros(2, 8, device="meta")}),
        (ValueError, "min_norm must not be negative, got -1", 8, {"min_norm": -1.0}),
        (ValueError, "activation must be one of", 8, {"activation": "relu"}),
        (TypeError, "weight must be a floating-point tensor, got float", 8, {"weight": 1.0}),
    ],
)
def test_errors(error, message, size, options):
    with pytest.raises(error, match=message):
        rms_norm(torch.zeros(2, 3, 8), size, **options)


def test_errors_of_the_input_itself():
    with pytest.raises(TypeError, match="input must be a floating-point tensor, got list"):
        rms_norm([1.0], 1)
    with pytest.raises(ValueError, match=r"input must be \[N, C, \*spatial\]"):
        rms_norm(torch.zeros(3), None)
