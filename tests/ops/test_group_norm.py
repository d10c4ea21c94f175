"""`group_norm`: values, gradients, memory, layouts, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgen
from fastgen.ops import group_norm
from fastgen.reference import group_norm as reference
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .group_norm_cases import SHAPES, cancelling, gradients, parameters, plain
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

NAMES = ("weight", "bias", "channel_bias", "scale", "shift")


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, groups, layout, full):
    x = guarded(laid_out((3 * randn(*shape) + 1).to(dtype), layout))
    params, activation = parameters(shape, dtype), "silu" if full else None
    params = params if full else {name: params[name] for name in NAMES[:2]}
    grad = randn(*shape, seed=3, dtype=dtype)
    poison_allocator(x.numel() * x.element_size())
    actual = gradients(group_norm, x, groups, params, activation, grad)
    beside = gradients(plain, x, groups, params, activation, grad)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), groups, wide, activation, grad.double())
    terms = cancelling(x, groups, params, activation, grad)
    for name, a, b, e in zip(("output", "input", *params), actual, beside, exact, strict=True):
        assert a.dtype == dtype, name
        # nothing is more exact than float64 to compare it with; in sums of thousands of terms eager's cascade may be lucky
        slack = 1e-12 if dtype == torch.float64 else 0.0 if name == "output" else 3e-7
        assert_bar(a, b, e, slack, terms if name in ("input", "channel_bias") else 1.0)
    assert list(actual[0].stride()) == output_strides(x)
    assert list(actual[1].stride()) == output_strides(x)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_float32_parameters(dtype, layout):
    shape = (2, 32, 9, 8)
    x, params = laid_out(randn(*shape, dtype=dtype), layout), parameters(shape, torch.float32)
    actual = group_norm(x, 4, **params, activation="silu")
    exact = plain(x.double(), 4, **{k: p.double() for k, p in params.items()}, activation="silu")
    assert actual.dtype == dtype
    assert_bar(actual, exact.to(dtype), exact, slack=5e-4)
    leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    group_norm(x, 4, **leaves).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in leaves.values())


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean(layout):
    """Mean 1e4 and deviation 1, and a first element far from the rest: E[x^2] - E[x]^2 and a shift by x[0] both fail."""
    x = laid_out((randn(2, 32, 40, 40) + 1e4).float(), layout)
    x[0, 0, 0, 0] = 0.0
    exact = plain(x.double(), 4, None, None)
    assert_bar(group_norm(x, 4), F.group_norm(x, 4), exact)
    _, _, rstd = torch.ops.fastgen.group_norm_fwd(x, None, 4, None, None, None, None, None, 1e-5, 0)
    variance = x[1].double().reshape(4, -1).var(1, correction=0)
    assert (rstd[1].double() * (variance + 1e-5).sqrt() - 1).abs().max() < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_a_group_and_constant_groups(dtype, layout):
    """The variance is zero: the output is the bias, exactly, whatever 1 / sqrt(eps) multiplies."""
    bias = randn(6, dtype=dtype)
    x = laid_out(randn(3, 6, 1, 1, dtype=dtype), layout)
    assert torch.equal(group_norm(x, 6, None, bias), bias.reshape(1, 6, 1, 1).expand_as(x))
    constant = laid_out(torch.full((2, 6, 5, 7), 0.3, dtype=dtype), layout)
    expected = bias.reshape(1, 6, 1, 1).expand_as(constant)
    torch.testing.assert_close(group_norm(constant, 3, None, bias), expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (2, 4, 3, 0)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_nothing(shape, activation):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = group_norm(x, 2, weight, activation=activation)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros(4))


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_group(value, layout, dtype):
    x = laid_out(randn(2, 8, 6, 6, dtype=dtype), layout)
    x[1, 5, 2, 2] = value
    for activation in (None, "silu"):
        y, expected = group_norm(x, 4, activation=activation), plain(x, 4, None, None, activation=activation)
        assert torch.equal(y.isnan(), expected.isnan())
        assert y[1, 4:6].isnan().all() and y[0].isfinite().all()


@pytest.mark.isa
def test_silu_far_out():
    """exp(-x) leaves the range of float32 below -88: the product must not."""
    shift = torch.tensor([[-1e30, -100.0, -50.0, 50.0, 1e30, math.nan]])
    y = group_norm(torch.zeros(1, 6, 40), 1, shift=shift, activation="silu")[0, :, 0]
    assert y[0].abs() < 1e-30 and y[1].abs() < 1e-30 and y[2].abs() < 1e-19
    torch.testing.assert_close(y[3:5], torch.tensor([50.0, 1e30]))
    assert y[5].isnan()


@pytest.mark.isa
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3))
    n, groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    dtype, channels = data.draw(st.sampled_from(DTYPES)), groups * per_group
    padding = [data.draw(st.integers(0, 3)) for _ in range(2 + len(spatial))]
    sizes = (n, channels, *spatial)
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), seed=len(spatial), dtype=dtype)
    order = data.draw(st.permutations(range(len(sizes))))
    base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    x = base[tuple(slice(p, None) for p in padding)]
    params = {k: v for k, v in parameters(sizes, dtype).items() if data.draw(st.booleans())}
    activation = data.draw(st.sampled_from([None, "silu"]))
    actual = group_norm(guarded(x), groups, **params, activation=activation)
    arguments = [params.get(name) for name in NAMES]
    wide = [None if p is None else p.double() for p in arguments]
    code = 1 if activation else 0
    exact = reference.group_norm_fwd(x.double(), None, groups, *wide, 1e-5, code)[0]
    beside = reference.group_norm_fwd(x, None, groups, *arguments, 1e-5, code)[0]
    # a group of nearly equal values divides rounding by its deviation; the reference is centred in float32 as well
    assert_bar(actual, beside, exact, slack={torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-4))
    assert list(actual.stride()) == output_strides(x)


def test_views_of_larger_tensors_are_right():
    big = randn(2, 64, 6, 6, dtype=torch.float32)
    for layout in LAYOUTS:
        x = laid_out(big, layout)
        for view in (
            x[:, 16:48],
            x[1:],
            x.chunk(2, 1)[1],
            x[:, :32, 1:5, :],
            x[..., ::2],
            x.transpose(2, 3),
            x[:1].expand(3, -1, -1, -1),
        ):
            torch.testing.assert_close(group_norm(view, 4), F.group_norm(view, 4), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(index, layout, activation):
    shape = (2, 6, 3, 2)
    tensors = [laid_out(randn(*shape), layout), *parameters(shape, torch.float64).values()]
    tensors[index].requires_grad_()

    def function(t):
        values = [*tensors[:index], t, *tensors[index + 1 :]]
        return group_norm(values[0], 3, **dict(zip(NAMES, values[1:], strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, (tensors[index],))


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last."""
    x = randn(2, 4, 3, 2).requires_grad_()
    functions = {
        "cat": lambda t: torch.cat([group_norm(t, 2), t * 2], dim=1)[:, 1:5],
        "expanded gradient": lambda t: group_norm(t, 2).sum() * group_norm(t, 2, activation="silu"),
        "channels-last into contiguous": lambda t: (
            group_norm(t.to(memory_format=torch.channels_last), 2).contiguous() * t
        ),
        "contiguous into channels-last": lambda t: group_norm(t, 2).to(memory_format=torch.channels_last) * t,
        "transposed": lambda t: group_norm(t, 2).transpose(2, 3)[:, ::2] ** 2,
        "sum": lambda t: (group_norm(t, 2, activation="silu") ** 2).sum(),
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(function, (x,)), name


def test_only_the_gradients_asked_for():
    x, params = randn(2, 6, 3).float(), parameters((2, 6, 3), torch.float32)
    for name, p in params.items():
        leaf = p.clone().requires_grad_()
        y = group_norm(x, 2, **{**params, name: leaf})
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == p.shape
    with torch.no_grad():
        assert not group_norm(x, 2, params["weight"].requires_grad_()).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((3, 32, 40, 40), 4), ((1, 8, 200, 201), 1), ((5, 64, 16, 16), 32)])
def test_bits_do_not_depend_on_threads_or_time(layout, shape, groups):
    x, params = laid_out(randn(*shape, dtype=torch.float32), layout), parameters(shape, torch.float32)
    grad = randn(*shape, seed=4, dtype=torch.float32)
    assert_any_threads(lambda: gradients(group_norm, x, groups, params, "silu", grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2), (1, 1, 3, 3)])
def test_fakes(shape, layout):
    """And opcheck, which takes its time, with the activation."""
    x = laid_out(randn(*shape, dtype=torch.float32), layout)
    params = list(parameters(shape, torch.float32).values())
    ops = torch.ops.fastgen
    groups = 2 if shape[1] > 1 else 1
    _, mean, rstd = ops.group_norm_fwd(x, None, groups, *params, 1e-5, 1)
    for activation, compare in ((0, assert_fake), (1, assert_registered if shape[0] != 1 else assert_fake)):
        compare(ops.group_norm.default, (x, None, groups, *params, 1e-5, activation))
        compare(ops.group_norm_fwd.default, (x, None, groups, *params, 1e-5, activation))
        compare(ops.group_norm_bwd.default, (x, x, None, mean, rstd, groups, *params, activation))


def test_functional_transforms():
    x, w = randn(3, 4, 5), randn(4)
    loss = lambda t, v: (group_norm(t, 2, v, activation="silu") ** 2).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(x.requires_grad_(), w), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), w), expected)
    each = torch.func.vmap(torch.func.grad(lambda t: loss(t[None], w)))(x.detach())
    torch.testing.assert_close(each, expected)
    jacobian = torch.func.jacrev(lambda v: group_norm(x.detach(), 2, v))(w)
    torch.testing.assert_close(jacobian.sum(-1), group_norm(x.detach(), 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    shape = (2, 8, 6, 6)
    x, params = laid_out(randn(*shape, dtype=torch.float32), "channels_last"), parameters(shape, torch.float32)

    def model(t):
        return group_norm(t * 2, 4, **params, activation="silu") + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    exact = plain(2 * x.double(), 4, **{k: p.double() for k, p in params.items()}, activation="silu") + 1
    assert_bar(compiled(leaf).detach(), model(x), exact, slack=1e-7)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return group_norm(x, 2, activation="silu")

    x = randn(2, 4, 3, dtype=torch.float32)
    program = torch.export.export(Model(), (x,))
    assert torch.equal(program.module()(x), Model()(x))
    assert "fastgen.group_norm" in str(program.graph)


def test_autocast_on_the_cpu_keeps_the_dtype():
    x = randn(2, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert group_norm(x, 2).dtype == F.group_norm(x, 2).dtype == torch.bfloat16
        assert group_norm(x.float(), 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (
            ValueError,
            r"num_groups must divide channels, got num_groups=7 and input of shape \(2, 32, 8, 8\)",
            ((2, 32, 8, 8), 7),
            {},
        ),
        (ValueError, "num_groups must divide", ((2, 32), 0), {}),
        (ValueError, r"0 to 3 spatial dimensions, got shape \(3,\)", ((3,), 1), {}),
        (ValueError, "0 to 3 spatial", ((1, 2, 1, 1, 1, 1), 1), {}),
        (ValueError, r"weight must have shape \(4,\), got shape \(3,\)", ((2, 4), 2), {"weight": (3,)}),
        (ValueError, r"scale must have shape \(2, 4\)", ((2, 4), 2), {"scale": (1, 4)}),
        (ValueError, "shift must be on the device", ((2, 4), 2), {"shift": "meta"}),
        (ValueError, "activation must be one of", ((2, 4), 2), {"activation": "relu"}),
        (TypeError, "bias must be a tensor or None, got float", ((2, 4), 2), {"bias": 1.0}),
        (
            TypeError,
            "channel_bias must have a floating-point dtype",
            ((2, 4), 2),
            {"channel_bias": torch.zeros(2, 4).int()},
        ),
    ],
)
def test_errors(error, message, arguments, options):
    def make(value):
        if value == "meta":
            return torch.zeros(2, 4, device="meta")
        return torch.zeros(value) if isinstance(value, tuple) else value

    with pytest.raises(error, match=message):
        group_norm(torch.zeros(arguments[0]), arguments[1], **{k: make(v) for k, v in options.items()})


def test_errors_of_the_input_itself():
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        group_norm([1.0], 1)
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int64"):
        group_norm(torch.zeros(2, 4).long(), 2)
    with pytest.raises(RuntimeError, match="num_groups"):
        torch.ops.fastgen.group_norm_fwd(torch.zeros(2, 4), None, 3, None, None, None, None, None, 1e-5, 0)


def test_every_combination_of_parameters_runs():
    x = randn(2, 6, 4, dtype=torch.float32)
    params = parameters((2, 6, 4), torch.float32)
    for chosen in itertools.product([False, True], repeat=5):
        given_ = {name: params[name] for name, use in zip(NAMES, chosen, strict=True) if use}
        expected = reference.group_norm(x, None, 2, *(given_.get(name) for name in NAMES), 1e-5, 1)
        torch.testing.assert_close(
            fastgen.ops.group_norm(x, 2, **given_, activation="silu"), expected, rtol=1e-5, atol=1e-5
        )
