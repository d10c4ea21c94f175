"""`linear_attention`: values and gradients against float64, memories, large logits, memory layouts, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.ops import linear_attention
from fastgen.reference import linear_attention as reference
from fastgen.reference._layout import strides_in_order_of

from ..backends import requires_cpu
from .linear_attention_cases import PLACES, SHAPES, gradients, plain, tensors
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

SLACK = {torch.float64: 1e-12, torch.float32: 1e-6}  # in sums of thousands of terms torch's blocks may be lucky
ops = torch.ops.fastgen


def check(inputs, grad, **options):
    """Output and gradients at the bar; returns them."""
    dtype = inputs[0].dtype
    actual, beside = gradients(linear_attention, inputs, grad, **options), gradients(plain, inputs, grad, **options)
    exact = gradients(plain, [t.double() for t in inputs], grad.double(), **options)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == dtype
        assert_bar(a, b, e, SLACK.get(dtype, 1e-4))
    return actual


@pytest.mark.isa
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, place):
    inputs = [guarded(t) for t in tensors(shape, dtype, place)]
    n, heads, _, width, length, *_ = shape
    grad = guarded(randn(n, heads, width, length, seed=4, dtype=dtype))
    poison_allocator(inputs[0].numel() * inputs[0].element_size())
    output, *grads = check(inputs, grad)
    with torch.no_grad():
        assert torch.equal(linear_attention(*inputs), output)
    assert list(output.stride()) == strides_in_order_of(inputs[0], output.shape)
    for t, g in zip(inputs[:3], grads[:3], strict=True):
        assert list(g.stride()) == strides_in_order_of(t, t.shape)


@pytest.mark.isa
@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 0.0])
def test_scale(scale):
    inputs = tensors((1, 2, 16, 16, 50, 60, 2), torch.float32)
    check(inputs, randn(1, 2, 16, 50, seed=4, dtype=torch.float32), scale=scale)


@pytest.mark.isa
def test_large_logits_do_not_overflow():
    """Not where the largest comes late either, past what an exponential can hold."""
    inputs = tensors((1, 2, 16, 16, 50, 2600, 4), torch.float32)
    grad = randn(1, 2, 16, 50, seed=4, dtype=torch.float32)
    inputs[0] *= 1e3
    inputs[1] = inputs[1] * 50 + torch.linspace(-1e3, 1e3, 2600)
    assert all(t.isfinite().all() for t in check(inputs, grad))
    inputs[1] += 1e6
    assert all(t.isfinite().all() for t in check(inputs, grad))


class Calls(TorchDispatchMode):
    """Names of the ops that run inside and make a tensor of their own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_of_a_convolution_is_read_in_place(memory_format):
    """[N, 3 H D, height, width], and what comes out goes into the next without a copy."""
    qkv = randn(2, 3 * 4 * 8, 5, 6, dtype=torch.float32).contiguous(memory_format=memory_format)
    with Calls() as calls:
        q, k, v = qkv.flatten(2).unflatten(1, (3, 4, 8)).unbind(1)
        y = linear_attention(q, k, v).flatten(1, 2).unflatten(2, (5, 6))
    assert calls.names == ["fastgen.linear_attention.default"]
    assert y.shape == (2, 32, 5, 6) and y.is_contiguous(memory_format=memory_format)


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    n, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    depth, width, memories = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 5))
    length, keys = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = []
    for seed, size in enumerate(
        ((n, heads, depth, length), (n, heads, depth, keys), (n, heads, width, keys), *(
            (1, heads, channels, memories) for channels in (depth, width)
        ))
    ):  # fmt: skip
        order = data.draw(st.permutations(range(4)))
        padding = [data.draw(st.integers(0, 2)) for _ in size]
        base = randn(*(s + p for s, p in zip(size, padding, strict=True)), seed=seed, dtype=dtype)
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        inputs.append(guarded(base[tuple(slice(p, None) for p in padding)]))
    inputs = inputs[:3] + [t[0] if memories else None for t in inputs[3:]]
    wide = [None if t is None else t.double() for t in inputs]
    output, context, statistics = ops.linear_attention_fwd(*inputs, 0.3)
    exact, exact_context, exact_statistics = reference.linear_attention_fwd(*wide, 0.3)
    assert_bar(output, reference.linear_attention_fwd(*inputs, 0.3)[0], exact, SLACK.get(dtype, 5e-3))
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(context.double(), exact_context, rtol=1e-5, atol=2e-6)


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_stays_where_it_is(dtype, value):
    """In a query it spoils that position, in a key the head, in a value that channel of the head: as in torch."""
    for index, position in ((0, 150), (1, 0), (1, 150), (1, 1299), (2, 150)):  # keys before and behind larger ones too
        inputs = tensors((2, 2, 16, 16, 200, 1300, 3), dtype)
        inputs[index][0, 1, 3, position] = value
        y, expected = linear_attention(*inputs), plain(*(t.double() for t in inputs))
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert not y.isfinite().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()


@pytest.mark.isa
def test_a_key_of_minus_infinity_is_not_looked_at():
    inputs = tensors((1, 2, 8, 8, 20, 1500, 2), torch.float32)
    inputs[1][..., 700:] = -math.inf
    without = [inputs[0], inputs[1][..., :700], inputs[2][..., :700], *inputs[3:]]
    torch.testing.assert_close(linear_attention(*inputs), linear_attention(*without))
    check(inputs, randn(1, 2, 8, 20, seed=4, dtype=torch.float32))


@pytest.mark.parametrize(
    "sizes", [(0, 2, 4, 3, 5, 6, 2), (2, 0, 4, 3, 5, 6, 2), (2, 2, 4, 3, 0, 6, 2), (2, 2, 4, 3, 5, 0, 2)]
)
def test_nothing(sizes):
    inputs = [t.requires_grad_() for t in tensors(sizes, torch.float32)]
    y = linear_attention(*inputs)
    torch.testing.assert_close(y, plain(*inputs))
    y.sum().backward()
    grads = torch.autograd.grad(plain(*inputs).sum(), inputs)
    for t, g in zip(inputs, grads, strict=True):
        torch.testing.assert_close(t.grad, g)
    if sizes[5] == 0:
        assert not linear_attention(*inputs[:3]).any()


@pytest.mark.parametrize("index", range(5))
def test_gradcheck(index):
    inputs = tensors((2, 2, 3, 4, 5, 6, 2), torch.float64, "channels last")
    inputs[index].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: linear_attention(*inputs[:index], t, *inputs[index + 1 :]), (inputs[index],)
    )


def test_gradcheck_through_views_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and from another layout."""
    qkv = randn(1, 3 * 2 * 3, 2, 3).requires_grad_()

    def parts(t):
        return t.flatten(2).unflatten(1, (3, 2, 3)).unbind(1)

    functions = {
        "packed": lambda t: linear_attention(*parts(t)).flatten(1, 2).unflatten(2, (2, 3)) ** 2,
        "channels last": lambda t: linear_attention(*parts(t.contiguous(memory_format=torch.channels_last))).sum(1),
        "cat": lambda t: torch.cat([linear_attention(*parts(t)), t.flatten(2)[:, None, :3].expand(1, 2, 3, 6)], 2)[
            :, :, 1:5
        ],
        "one tensor thrice": lambda t: linear_attention(*[t.flatten(2).unflatten(1, (2, 9))] * 3),
        "sum": lambda t: linear_attention(*parts(t)).sum(),
        "expanded": lambda t: linear_attention(parts(t)[0], *[t.flatten(2)[:, None, :3].expand(1, 2, 3, 6)] * 2),
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(function, (qkv,)), name


def test_only_the_gradients_asked_for():
    inputs = tensors((1, 2, 4, 4, 5, 6, 2), torch.float32)
    for index in range(5):
        given_inputs = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        linear_attention(*given_inputs).sum().backward()
        assert [t.grad is not None for t in given_inputs] == [i == index for i in range(5)]
    with torch.no_grad():
        assert not linear_attention(inputs[0].requires_grad_(), *inputs[1:]).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_time(dtype):
    inputs = tensors((2, 2, 20, 20, 2500, 2500, 4), dtype)
    grad = randn(*inputs[0].shape, seed=4, dtype=dtype)
    assert_any_threads(lambda: gradients(linear_attention, inputs, grad))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6, 7, 2), (0, 3, 4, 5, 6, 7, 0), (1, 1, 1, 1, 1, 1, 1)])
def test_fakes(shape, place):
    inputs = tensors(shape, torch.float32, place)
    inputs += [None] * (5 - len(inputs))
    output, context, statistics = ops.linear_attention_fwd(*inputs, 0.3)
    compare = assert_registered if shape[0] == 2 and place == "channels" else assert_fake
    compare(ops.linear_attention.default, (*inputs, 0.3))
    compare(ops.linear_attention_fwd.default, (*inputs, 0.3))
    compare(ops.linear_attention_bwd.default, (output, *inputs, context, statistics, 0.3))


def test_compiled():
    torch._dynamo.reset()
    inputs = tensors((2, 2, 4, 4, 9, 9, 2), torch.float32)

    def model(t):
        return linear_attention(t * 2, *inputs[1:]).flatten(1, 2) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaf, other = inputs[0].clone().requires_grad_(), inputs[0].clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype):
    inputs = tensors((1, 2, 8, 8, 5, 6, 2), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_attention(*inputs)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    torch.testing.assert_close(y.double(), plain(*(t.double() for t in inputs)), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a floating-point tensor, got list", {"query": [1.0]}),
        (TypeError, "must have one dtype, got torch.float32, torch.bfloat16", {"key": torch.zeros(2, 3, 4, 7).bfloat16()}),
        (ValueError, r"query must be \[N, H, D, L\], got shape \(4, 5, 6\)", {"query": torch.zeros(4, 5, 6)}),
        (ValueError, r"key must be .*\(2, 3, 4\) and S, got shape \(2, 3, 5, 7\)", {"key": torch.zeros(2, 3, 5, 7)}),
        (ValueError, r"value must be .*S = 7, got shape \(2, 3, 5, 8\)", {"value": torch.zeros(2, 3, 5, 8)}),
        (ValueError, "value must be on the device of query", {"value": torch.zeros(2, 3, 5, 7, device="meta")}),
        (ValueError, "must be given together", {"memory_key": None}),
        (ValueError, r"memory_key must be \[H, D, M\] = \(3, 4\)", {"memory_key": torch.zeros(3, 5, 2)}),
        (ValueError, r"memory_value must have shape \(3, 5, 2\)", {"memory_value": torch.zeros(3, 5, 3)}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    names = ("query", "key", "value", "memory_key", "memory_value")
    arguments = dict(zip(names, tensors((2, 3, 4, 5, 6, 7, 2), torch.float32), strict=True)) | change
    with pytest.raises(error, match=f"linear_attention: .*{message}"):
        linear_attention(**arguments)
