"""`attention`: values and gradients against float64, masks, memory, layouts, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen.ops import attention
from fastgen.reference import attention as reference
from fastgen.reference._layout import strides_in_order_of

from ..backends import requires_cpu
from .attention_cases import MASKS, PACKED, PLACES, SHAPES, gradients, mask_of, packed, plain, tensors, unpacked
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


def check(inputs, mask, grad, **options):
    """Output and gradients at the bar; returns them."""
    dtype = inputs[0].dtype
    actual = gradients(attention, inputs, mask, grad, **options)
    beside = gradients(plain, inputs, mask, grad, **options)
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    exact = gradients(plain, [t.double() for t in inputs], wide, grad.double(), **options)
    for name, a, b, e in zip(("output", "query", "key", "value"), actual, beside, exact, strict=True):
        assert a.dtype == dtype, name
        assert_bar(a, b, e, SLACK.get(dtype, 1e-4))
    return actual


@pytest.mark.isa
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, kind):
    inputs = [guarded(t) for t in tensors(shape, dtype, list(PLACES)[len(kind) % 3])]
    mask = mask_of(kind, shape, dtype)
    n, heads, _, rows, _, _, width = shape
    grad = guarded(randn(n, heads, rows, width, seed=4, dtype=dtype))
    poison_allocator(inputs[0].numel() * inputs[0].element_size())
    output, *grads = check(inputs, mask, grad, is_causal=kind == "causal")
    assert list(output.stride()) == strides_in_order_of(inputs[0], output.shape)
    for t, g in zip(inputs, grads, strict=True):
        assert list(g.stride()) == strides_in_order_of(t, t.shape)


@pytest.mark.isa
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 203, 8, 8), (1, 2, 1, 300, 1601, 5, 7), (1, 1, 1, 3, 2, 8, 1)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_narrow_heads(dtype, shape, kind):
    """Up to 8 elements: whole groups of keys and not, several spans of them, rows whose keys end before a span begins."""
    inputs = [guarded(t) for t in tensors(shape, dtype, list(PLACES)[len(kind) % 3])]
    n, heads, _, rows, _, _, width = shape
    poison_allocator(1 << 20)
    check(
        inputs,
        mask_of(kind, shape, dtype),
        randn(n, heads, rows, width, seed=4, dtype=dtype),
        is_causal=kind == "causal",
    )


@pytest.mark.isa
@pytest.mark.parametrize("first", [0.0, -60.0, -float("inf")])
def test_narrow_heads_whose_maximum_grows(first):
    """Later keys have ever larger scores, and the first ones far smaller ones than those, or none at all."""
    query, key, value = tensors((1, 2, 2, 40, 300, 8, 8), torch.float32)
    key = key * torch.linspace(0, 20, 300)[:, None]
    mask = torch.zeros(40, 300)
    mask[:, :6] = first
    check([query, key, value], mask, randn(1, 2, 40, 8, seed=4, dtype=torch.float32))
    check([query, key, value], None, randn(1, 2, 40, 8, seed=4, dtype=torch.float32))


@pytest.mark.isa
@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 0.0])
def test_scale(scale):
    inputs = tensors((1, 2, 2, 30, 150, 16, 16), torch.float32)
    check(inputs, None, randn(1, 2, 30, 16, seed=4, dtype=torch.float32), scale=scale)


@pytest.mark.isa
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layouts_values_and_gradients(kind, dtype):
    n, heads, length, depth = 2, 3, 50, 40
    qkv = packed(n, heads, length, depth, kind, dtype)
    leaf, other, exact = (t.clone().requires_grad_() for t in (qkv, qkv, qkv.double()))
    y, beside, wide = (
        attention(*unpacked(leaf, heads, kind)),
        plain(*unpacked(other, heads, kind)),
        plain(*unpacked(exact, heads, kind)),
    )
    grad = randn(*y.shape, seed=4, dtype=dtype)
    grads = [torch.autograd.grad(t, of, grad.to(t.dtype))[0] for t, of in ((y, leaf), (beside, other), (wide, exact))]
    assert_bar(y.detach(), beside.detach(), wide.detach(), SLACK.get(dtype, 1e-4))
    assert_bar(*grads, SLACK.get(dtype, 1e-4))
    as_packed = y.transpose(2, 3).flatten(1, 2) if kind == "channels packed" else y.transpose(1, 2).flatten(2)
    assert as_packed.data_ptr() == y.data_ptr(), "the output lies otherwise than the query"


class Calls(TorchDispatchMode):
    """Names of the ops that run inside and make a tensor of their own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", PACKED)
def test_packed_tensors_are_read_in_place(kind):
    qkv = packed(2, 3, 9, 8, kind, torch.float32)
    mask = torch.ones(9, 9, dtype=torch.bool)
    with Calls() as calls:
        attention(*unpacked(qkv, 3, kind), mask)
    assert calls.names == ["fastgen.attention.default"]
    leaf = qkv.requires_grad_()
    y = attention(*unpacked(leaf, 3, kind))
    grad = torch.ones_like(y)
    with Calls() as calls:
        y.backward(grad)
    assert calls.names[0] == "fastgen.attention_bwd.default"  # what follows puts three gradients into one


def test_feature_maps_are_read_in_place():
    """[N, C, H, W] of a 1x1 convolution each, heads of 8 channels: unit stride along the positions, and so in the output."""
    maps = [randn(2, 24, 5, 3, seed=i, dtype=torch.float32) for i in range(3)]
    q, k, v = (t.view(2, 3, 8, 15).transpose(2, 3) for t in maps)
    with Calls() as calls:
        y = attention(q, k, v)
    assert calls.names == ["fastgen.attention.default"]
    assert y.stride() == q.stride()
    torch.testing.assert_close(y, plain(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.isa
def test_more_heads_than_are_packed_at_a_time():
    """Five heads of keys and values of 8 MB each: three are packed, then two."""
    inputs = tensors((1, 10, 5, 3, 2048, 512, 512), torch.float32)
    y, beside = attention(*inputs), plain(*inputs)
    assert_bar(y, beside, plain(*(t.double() for t in inputs)), SLACK[torch.float32])
    assert torch.equal(y[:, 8:], attention(inputs[0][:, 8:], inputs[1][:, 4:], inputs[2][:, 4:]))


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    n, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    rows, keys = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    depth, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = []
    for seed, size in enumerate(
        ((n, kv_heads * group, rows, depth), (n, kv_heads, keys, depth), (n, kv_heads, keys, width))
    ):
        order = data.draw(st.permutations(range(4)))
        padding = [data.draw(st.integers(0, 2)) for _ in size]
        base = randn(*(s + p for s, p in zip(size, padding, strict=True)), seed=seed, dtype=dtype)
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        inputs.append(guarded(base[tuple(slice(p, None) for p in padding)]))
    causal = data.draw(st.booleans())
    output, logsumexp = torch.ops.fastgen.attention_fwd(*inputs, None, causal, depth**-0.5)
    exact, exact_logsumexp = reference.attention_fwd(*(t.double() for t in inputs), None, causal, depth**-0.5)
    beside = reference.attention_fwd(*inputs, None, causal, depth**-0.5)[0]
    assert_bar(output, beside, exact, SLACK.get(dtype, 5e-3))  # the reference keeps the weights in float32
    torch.testing.assert_close(logsumexp.double(), exact_logsumexp, rtol=2e-6, atol=2e-6)
    assert list(output.stride()) == strides_in_order_of(inputs[0], output.shape)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_keys_gives_zero(dtype):
    query, key, value = (t.requires_grad_() for t in tensors((1, 2, 2, 30, 150, 8, 8), dtype))
    mask = torch.ones(30, 150, dtype=torch.bool)
    mask[3], mask[29, 100:], mask[7, :149] = False, False, False
    minus_infinity = torch.zeros(30, 150, dtype=dtype).masked_fill(~mask, -math.inf)
    for given_mask in (mask, minus_infinity):
        y = attention(query, key, value, given_mask)
        assert not y[:, :, 3].any() and y[:, :, 4].any()
        assert torch.equal(y[:, :, 7], value[:, :, 149])  # one key alone
        grads = torch.autograd.grad(y.sum(), (query, key, value))
        assert not grads[0][:, :, 3].any() and all(g.isfinite().all() for g in grads)
    empty = attention(query, key[:, :, :0], value[:, :, :0])
    assert empty.shape == (1, 2, 30, 8) and not empty.any()


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_stays_in_its_rows(dtype, value):
    """In a query it spoils that row, in a key all rows of that head, in a value that column of that head: as in torch."""
    shape = (2, 2, 2, 40, 140, 16, 16)
    places = [(0, (0, 1, 3, 5)), *((index, (0, 1, key, 5)) for index in (1, 2) for key in (0, 100, 139))]
    for index, place in places:  # of the keys also the first and the last, before and behind what is larger
        inputs = tensors(shape, dtype)
        inputs[index][place] = value
        y, expected = attention(*inputs), plain(*(t.double() for t in inputs))
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert not y.isfinite().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()
        if index == 0:
            assert y[0, 1, :3].isfinite().all() and y[0, 1, 4:].isfinite().all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_stays_in_its_head_of_gradients(dtype):
    """The heads after it in the same memory get the very gradients that they have without it."""
    inputs, grad = tensors((2, 2, 2, 40, 140, 16, 16), dtype), randn(2, 2, 40, 16, seed=4, dtype=dtype)
    clean = gradients(attention, inputs, None, grad)
    for index in range(3):
        given = [t.clone() for t in inputs]
        given[index][0, 0, 33, 5] = math.nan
        spoiled = gradients(attention, given, None, grad)
        assert not spoiled[1][0, 0].isfinite().all()
        for a, b in zip(spoiled, clean, strict=True):
            assert torch.equal(a[0, 1], b[0, 1]) and torch.equal(a[1], b[1])


@pytest.mark.isa
def test_large_scores_do_not_overflow():
    inputs = [100 * t for t in tensors((1, 2, 2, 30, 200, 16, 16), torch.float32)]
    torch.testing.assert_close(attention(*inputs), plain(*inputs), rtol=1e-4, atol=1e-3)
    far = attention(*inputs, torch.full((30, 200), -1e30))  # the same for all keys: what is left are equal weights
    torch.testing.assert_close(far, inputs[2].mean(2, keepdim=True).expand_as(far), rtol=1e-4, atol=1e-4)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima_that_grow_and_fall(dtype):
    """From block to block of the keys, by many powers of two and by few: sums so far are scaled again, or are all that counts."""
    query, key, value = tensors((1, 2, 2, 70, 400, 16, 24), torch.float64)
    growth = torch.linspace(0, 6, 400, dtype=torch.float64).view(400, 1)
    for slope in (growth, growth.flip(0), 6 - (growth - 3).abs()):
        direction = query[:, :, :1] / query[:, :, :1].norm(
            dim=-1, keepdim=True
        )  # the first row's own, and others' in part
        inputs = [t.to(dtype) for t in (query, key + slope * direction, value)]
        for scale in (0.25, 2.0):
            exact = plain(*(t.double() for t in inputs), scale=scale)
            actual, beside = attention(*inputs, scale=scale), plain(*inputs, scale=scale)
            assert_bar(actual, beside, exact, SLACK.get(dtype, 1e-4))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing(sizes):
    n, heads, rows, keys = sizes
    query, key, value = (t.requires_grad_() for t in tensors((n, heads, heads, rows, keys, 8, 6), torch.float32))
    y = attention(query, key, value)
    assert y.shape == (n, heads, rows, 6) and not y.any()
    y.sum().backward()
    assert not any(t.grad.any() for t in (query, key, value))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("index", range(3))
def test_gradcheck(index, kind):
    shape = (1, 4, 2, 3, 5, 3, 2)
    inputs, mask = tensors(shape, torch.float64, "tokens"), mask_of(kind, shape, torch.float64)
    inputs[index].requires_grad_()

    def function(t):
        given_inputs = [*inputs[:index], t, *inputs[index + 1 :]]
        return attention(*given_inputs, mask, is_causal=kind == "causal")

    assert torch.autograd.gradcheck(function, (inputs[index],))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (4, 1, 6), (5, 6), (1, 1, 1, 6)])
def test_gradcheck_of_the_mask(shape):
    inputs, mask = tensors((3, 4, 2, 5, 6, 3, 2), torch.float64), randn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: attention(*inputs, m), (mask,))


def test_gradcheck_through_views_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and from another layout."""
    qkv = packed(1, 2, 4, 3, "tokens packed", torch.float64).requires_grad_()
    legacy = packed(1, 2, 4, 3, "channels packed", torch.float64).requires_grad_()
    functions = {
        "packed": (lambda t: attention(*unpacked(t, 2, "tokens packed")).transpose(1, 2).flatten(2) ** 2, qkv),
        "interleaved": (lambda t: attention(*unpacked(t, 2, "tokens interleaved")).sum(1), qkv),
        "legacy": (lambda t: attention(*unpacked(t, 2, "channels packed")).transpose(2, 3).flatten(1, 2) ** 2, legacy),
        "cat": (
            lambda t: torch.cat(
                [attention(*unpacked(t, 2, "tokens packed")), t[:, None, :, :3].expand(1, 2, 4, 3)], -1
            )[..., 1:5],
            qkv,
        ),
        "one tensor thrice": (lambda t: attention(t[:, None], t[:, None], t[:, None]), qkv),
        "expanded keys": (
            lambda t: attention(t.unflatten(2, (6, 3)).transpose(1, 2), *[t[:, None, :, :3].expand(1, 2, 4, 3)] * 2),
            qkv,
        ),
        "sum": (lambda t: attention(*unpacked(t, 2, "tokens packed")).sum(), qkv),
    }
    for name, (function, leaf) in functions.items():
        assert torch.autograd.gradcheck(function, (leaf,)), name


def test_only_the_gradients_asked_for():
    inputs = tensors((1, 2, 2, 5, 6, 4, 4), torch.float32)
    for index in range(3):
        given_inputs = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        attention(*given_inputs).sum().backward()
        assert [t.grad is not None for t in given_inputs] == [i == index for i in range(3)]
    with torch.no_grad():
        assert not attention(inputs[0].requires_grad_(), *inputs[1:]).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(2, 4, 2, 150, 300, 40, 40), (1, 1, 1, 700, 1500, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_time(dtype, shape):
    inputs = tensors(shape, dtype, "tokens")
    grad = randn(*inputs[0].shape, seed=4, dtype=dtype)
    assert_any_threads(lambda: gradients(attention, inputs, None, grad, is_causal=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 7, 6, 3), (0, 2, 2, 5, 7, 6, 3), (1, 1, 1, 1, 9, 8, 8)])
def test_fakes(shape, place):
    query, key, value = tensors(shape, torch.float32, place)
    n, heads, _, rows, keys, *_ = shape
    mask, ops = torch.ones(1, 1, 1, keys, dtype=torch.bool).expand(n, heads, rows, keys), torch.ops.fastgen
    output, logsumexp = ops.attention_fwd(query, key, value, mask, False, 0.3)
    for wants, compare in ((True, assert_fake), (False, assert_registered)):
        compare(ops.attention.default, (query, key, value, mask, False, 0.3))
        compare(ops.attention_fwd.default, (query, key, value, None, True, 0.3))
        backward = (output, query, key, value, output, logsumexp, mask, False, 0.3, wants)
        compare(ops.attention_bwd.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    qkv = packed(2, 2, 9, 8, "tokens packed", torch.float32)

    def model(t):
        return attention(*unpacked(t * 2, 2, "tokens packed"), is_causal=True).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    leaf, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_does_what_it_does_to_torch(dtype):
    inputs = tensors((1, 2, 2, 5, 6, 8, 8), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, beside = attention(*inputs), F.scaled_dot_product_attention(*inputs)
        masked = attention(*inputs, torch.zeros(5, 6, dtype=dtype))
    assert y.dtype == masked.dtype == beside.dtype
    torch.testing.assert_close(y, beside, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a floating-point tensor, got list", {"query": [1.0]}),
        (TypeError, "key must be a floating-point tensor, got torch.int64", {"key": torch.zeros(2, 2, 7, 6).long()}),
        (TypeError, "must have one dtype, got torch.float32, torch.bfloat16", {"key": torch.zeros(2, 2, 7, 6).bfloat16()}),
        (ValueError, r"query must be \[N, H, L, E\], got shape \(4, 5, 6\)", {"query": torch.zeros(4, 5, 6)}),
        (ValueError, r"N = 2, E = 6 and Hk a divisor of 4, got shape \(2, 3, 7, 6\)", {"key": torch.zeros(2, 3, 7, 6)}),
        (ValueError, r"key must be .* got shape \(2, 2, 7, 5\)", {"key": torch.zeros(2, 2, 7, 5)}),
        (ValueError, r"value must be .*\(2, 2, 7\) and Ev, got shape \(2, 2, 8, 3\)", {"value": torch.zeros(2, 2, 8, 3)}),
        (ValueError, "value must be on the device of query", {"value": torch.zeros(2, 2, 7, 3, device="meta")}),
        (ValueError, r"attn_mask must broadcast to \(2, 4, 5, 7\), got shape \(5, 6\)", {"attn_mask": torch.zeros(5, 6)}),
        (TypeError, "attn_mask must be a boolean or floating-point tensor, got float", {"attn_mask": 1.0}),
        (ValueError, "attn_mask must not be given where is_causal", {"attn_mask": torch.zeros(5, 7), "is_causal": True}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    query, key, value = tensors((2, 4, 2, 5, 7, 6, 3), torch.float32)
    with pytest.raises(error, match=f"attention: .*{message}"):
        fastgen.ops.attention(**{"query": query, "key": key, "value": value, **change})
