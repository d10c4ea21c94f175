"""`layer_norm`: values, gradients, memory, strides, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.ops import layer_norm
from fastgen.reference import layer_norm as reference

from ..backends import requires_cpu
from .layer_norm_cases import GIVEN, NAMES, SHAPES, backward, forward, fused, gradients, parameters, plain
from .numerics import (
    DTYPES,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    guarded,
    poison_allocator,
    randn,
)


def chosen(shape: tuple[int, ...], dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: p for name, p in parameters(shape, dtype).items() if name in names}


@pytest.mark.isa
@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, names):
    x = guarded((3 * randn(*shape) + 1).to(dtype))
    params = chosen(shape, dtype, names)
    grads = [randn(*shape, seed=seed, dtype=dtype) for seed in (3, 4)]
    poison_allocator(x.numel() * x.element_size())
    actual = gradients(fused, x, params, grads)
    beside = gradients(plain, x, params, grads)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), wide, [g.double() for g in grads])
    outputs = 2 if "residual" in params else 1
    for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
        assert a.dtype == dtype and a.is_contiguous()
        # sums of as many terms of order 1 as there are rows; nothing is more exact than float64 to compare it with
        slack = 1e-12 if dtype == torch.float64 else 0.0 if i < outputs else 1e-6
        assert_bar(a, b, e, slack, math.sqrt(x.numel() / shape[-1]))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_float32_parameters(dtype):
    x, params = randn(2, 9, 40, dtype=dtype), parameters((2, 9, 40), torch.float32)
    params["residual"] = params["residual"].to(dtype)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    y, total = layer_norm(x, 40, **leaves)
    exact = plain(x.double(), **{name: p.double() for name, p in params.items()})
    assert y.dtype == total.dtype == dtype
    for a, e in zip((y, total), exact, strict=True):
        assert_bar(a.detach(), e.to(dtype), e, slack=2e-2 if dtype == torch.bfloat16 else 3e-3)
    (y.sum() + total.sum()).backward()
    assert all(p.grad.dtype == p.dtype for p in leaves.values())


def test_a_residual_of_another_dtype_is_promoted_as_by_plus():
    x, stream = randn(2, 3, 8, dtype=torch.bfloat16), randn(2, 3, 8, seed=1, dtype=torch.float32).requires_grad_()
    y, total = layer_norm(x, 8, residual=stream)
    assert y.dtype == total.dtype == torch.float32 and torch.equal(total, x + stream)
    assert torch.equal(y, layer_norm(x.float(), 8, residual=stream)[0])
    y, total = layer_norm(stream, 8, residual=x)
    assert total.dtype == torch.float32 and torch.equal(total, x + stream)
    total.sum().backward()
    assert stream.grad.dtype == torch.float32


@pytest.mark.isa
@pytest.mark.parametrize("size", [40, 640, 9000])
def test_large_mean(size):
    """Mean 1e4 and deviation 1, and first elements far from the rest: E[x^2] - E[x]^2 and a shift by those both fail."""
    x = (randn(4, size) + 1e4).float()
    x[0, 0] = 0.0
    x[1, :64] += 3e4
    exact = plain(x.double())[0]
    assert (layer_norm(x, size).double() - exact).abs().max() < 2e-6 * exact.abs().max()
    rstd = torch.ops.fastgen.layer_norm_fwd(x, *(None,) * 6, 1e-5)[3]
    variance = x.double().var(1, correction=0)
    # the square of the one far element swallows half a unit of itself of each that a lane adds to it, of 16 lanes at the least
    assert (rstd.double() * (variance + 1e-5).sqrt() - 1).abs().max() < 1e-6 + size / 16 * 2.0**-25


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows(dtype):
    """The variance is zero: the output is the bias."""
    bias = randn(37, dtype=dtype)
    y = layer_norm(torch.full((3, 37), 0.3, dtype=dtype), 37, None, bias)
    torch.testing.assert_close(y, bias.expand(3, 37), rtol=1e-6, atol=2e-5)
    assert torch.equal(layer_norm(randn(5, 1, dtype=dtype), 1, None, bias[:1]), bias[:1].expand(5, 1))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
def test_nothing(shape, names):
    leaves = {name: torch.zeros_like(p).requires_grad_() for name, p in chosen(shape, torch.float32, names).items()}
    x = torch.zeros(shape, requires_grad=True)
    outputs = fused(x, **leaves)
    sum(y.sum() for y in outputs).backward()
    assert all(y.shape == shape for y in outputs) and x.grad.shape == shape
    assert not any(p.grad.any() for p in leaves.values())


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(value, dtype):
    x = randn(2, 5, 19, dtype=dtype)
    x[1, 2, 17] = value
    y = layer_norm(x, 19)
    assert y[1, 2].isnan().all() and y.isnan().sum() == 19


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = (*data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), data.draw(st.integers(1, 40)))
    dtype = data.draw(st.sampled_from(DTYPES))
    names = tuple(name for name in NAMES if data.draw(st.booleans()))
    names = names if "residual" in names else tuple(name for name in names if name != "gate")

    def anywhere(seed):
        padding = [data.draw(st.integers(0, 3)) for _ in sizes]
        base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), seed=seed, dtype=dtype)
        order = data.draw(st.permutations(range(len(sizes))))
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
        return guarded(base[tuple(slice(p, None) for p in padding)])

    x, params = anywhere(1), chosen(sizes, dtype, names)
    if "residual" in params:
        params["residual"] = anywhere(2)
    actual = fused(x, **params)
    wide = [params[name].double() if name in params else None for name in NAMES]
    exact = reference.layer_norm_fwd(x.double(), *wide, 1e-5)
    beside = reference.layer_norm_fwd(x, *(params.get(name) for name in NAMES), 1e-5)
    for a, b, e in zip(actual, beside, exact, strict=False):
        assert a.is_contiguous()
        # a row of nearly equal values divides rounding by its deviation; the reference is centred in float32 as well
        assert_bar(a, b, e, slack={torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-4))


def test_views_are_read_in_place():
    """Tokens of a larger tensor, packed projections, every sample again: no copy, which would be an op of torch's."""
    big = randn(2, 9, 48, dtype=torch.float32)
    for view in (big[:, 1:], big.chunk(2, -1)[1], big[:, ::2], big[:1].expand(3, -1, -1), big[:, :, 16:32]):
        with torch.profiler.profile() as profile:
            y = layer_norm(view, view.shape[-1])
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone", "aten::contiguous"}
        torch.testing.assert_close(y, F.layer_norm(view, view.shape[-1:]), rtol=1e-5, atol=1e-5)


def test_more_than_one_dimension_is_normalised():
    shape, last = (2, 3, 4, 5), (4, 5)
    x, residual, weight, bias = (randn(*s, seed=i) for i, s in enumerate((shape, shape, last, last)))
    torch.testing.assert_close(layer_norm(x, last, weight, bias), F.layer_norm(x, last, weight, bias))
    assert torch.equal(layer_norm(x[0, 0, 0], 5), layer_norm(x[:1, 0, 0], 5)[0])
    scale = randn(2, 20, seed=7)
    y, total = layer_norm(x, last, weight, residual=residual, scale=scale)
    expected = F.layer_norm(x + residual, last, weight) * (1 + scale.reshape(2, 1, 4, 5))
    torch.testing.assert_close(y, expected)
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("index", range(7))
def test_gradcheck(index):
    tensors = [randn(2, 3, 5), *parameters((2, 3, 5), torch.float64).values()]
    tensors[index].requires_grad_()

    def function(t):
        values = [*tensors[:index], t, *tensors[index + 1 :]]
        return layer_norm(values[0], 5, **dict(zip(NAMES, values[1:], strict=True)))

    assert torch.autograd.gradcheck(function, (tensors[index],))


def test_gradcheck_through_cat_expand_and_transposed():
    """Plain gradcheck hands over contiguous gradients; these come strided and expanded, of one output or of both."""
    x, r = randn(2, 4, 3).requires_grad_(), randn(2, 4, 3, seed=1).requires_grad_()
    functions = {
        "cat": lambda t, u: torch.cat([layer_norm(t, 3), t * 2], 1)[:, 1:6],
        "expanded gradient": lambda t, u: layer_norm(t, 3).sum() * layer_norm(t, 3, residual=u)[0],
        "transposed": lambda t, u: layer_norm(t.transpose(0, 1), 3, residual=u.transpose(0, 1))[0].transpose(0, 2) ** 2,
        "sum alone": lambda t, u: layer_norm(t, 3, residual=u)[1] ** 2,
        "both": lambda t, u: torch.cat(layer_norm(t, 3, residual=u)),
        "twice the same": lambda t, u: layer_norm(t, 3, residual=t)[0] * u,
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(function, (x, r)), name


def test_only_the_gradients_asked_for():
    x, params = randn(2, 6, 3).float(), parameters((2, 6, 3), torch.float32)
    for name, p in params.items():
        leaf = p.clone().requires_grad_()
        y, total = layer_norm(x, 3, **{**params, name: leaf})
        assert torch.autograd.grad(y.sum() + total.sum(), leaf)[0].shape == p.shape
    with torch.no_grad():
        assert not layer_norm(x, 3, params["weight"].requires_grad_()).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 101, 320), (700, 64), (1, 5, 7000), (40, 1, 640)])
def test_bits_do_not_depend_on_threads_or_time(shape):
    x = randn(*shape, dtype=torch.float32)
    grads = [randn(*shape, seed=seed, dtype=torch.float32) for seed in (3, 4)]
    for names in GIVEN.values():
        assert_any_threads(lambda names=names: gradients(fused, x, chosen(shape, torch.float32, names), grads))


@pytest.mark.parametrize("shape", [(2, 3, 6), (3, 5), (0, 2, 4)])
def test_fakes(shape):
    ops = torch.ops.fastgen
    for names in GIVEN.values():
        compare = assert_registered if names == NAMES and shape[0] == 2 else assert_fake
        compare(ops.layer_norm.default, forward(shape, torch.float32, names))
        compare(ops.layer_norm_fwd.default, forward(shape, torch.float32, names))
        compare(ops.layer_norm_bwd.default, backward(shape, torch.float32, names))
    assert_fake(ops.layer_norm_fwd.default, forward(shape, torch.bfloat16))
    assert_fake(ops.layer_norm_bwd.default, backward(shape, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    x, params = randn(2, 5, 12, dtype=torch.float32), parameters((2, 5, 12), torch.float32)

    def block(t):
        y, total = layer_norm(t * 2, 12, **params)
        return y + 1, total

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for a, b in zip(compiled(leaf), block(other), strict=True):
        torch.testing.assert_close(a, b)
    found = [
        torch.autograd.grad(sum(y.square().sum() for y in f(t)), t)[0] for f, t in ((compiled, leaf), (block, other))
    ]
    torch.testing.assert_close(*found)


def test_autocast_on_the_cpu_keeps_the_dtype():
    x = randn(2, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm(x, 8).dtype == F.layer_norm(x, (8,)).dtype == torch.bfloat16
        assert layer_norm(x.float(), 8).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "size", "options"),
    [
        (
            ValueError,
            r"normalized_shape must be the last sizes of input, got \(7,\) and input of shape \(2, 3, 8\)",
            7,
            {},
        ),
        (ValueError, "normalized_shape must be", (), {}),
        (ValueError, r"weight must have shape \(8,\), got shape \(3,\)", 8, {"weight": torch.ones(3)}),
        (ValueError, r"weight must have shape \(3, 8\)", (3, 8), {"weight": torch.ones(8)}),
        (ValueError, r"scale must have shape \(2, 8\), got shape \(1, 8\)", 8, {"scale": torch.ones(1, 8)}),
        (ValueError, "shift must be on the device", 8, {"shift": torch.zeros(2, 8, device="meta")}),
        (ValueError, "residual must have the shape of input", 8, {"residual": torch.ones(2, 1, 8)}),
        (ValueError, "gate needs a residual", 8, {"gate": torch.ones(2, 8)}),
        (ValueError, r"gate, scale and shift need input \[N, \*, C\]", (2, 3, 8), {"scale": torch.ones(1, 48)}),
        (TypeError, "bias must be a floating-point tensor, got float", 8, {"bias": 1.0}),
        (
            TypeError,
            "residual must be a floating-point tensor, got torch.int64",
            8,
            {"residual": torch.ones(2, 3, 8).long()},
        ),
    ],
)
def test_errors(error, message, size, options):
    with pytest.raises(error, match=message):
        layer_norm(torch.zeros(2, 3, 8), size, **options)


def test_every_combination_of_parameters_runs():
    x, params = randn(2, 3, 5, dtype=torch.float32), parameters((2, 3, 5), torch.float32)
    for use in itertools.product([False, True], repeat=6):
        given_ = {name: params[name] for name, used in zip(NAMES, use, strict=True) if used}
        if "gate" in given_ and "residual" not in given_:
            continue
        expected = plain(x, **given_)[: 1 + ("residual" in given_)]
        for a, e in zip(fused(x, **given_), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
