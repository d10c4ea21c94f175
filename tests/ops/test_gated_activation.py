"""`gated_activation`: values, gradients, memory, layouts, conditions of every kind, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen._schema import GATED_ACTIVATIONS
from fastgen.ops import gated_activation
from fastgen.reference import gated_activation as reference
from fastgen.reference._layout import dense_strides, is_channels_last, output_strides

from ..backends import requires_cpu
from .gated_activation_cases import (
    CONDITIONS,
    SHAPES,
    backward,
    ends,
    forward,
    gradients,
    halved,
    make_condition,
    plain,
)
from .numerics import (
    DTYPES,
    HALF_ULP,
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
# Of single values, of which plain torch may get all exactly right; float64 has nothing more exact beside it.
SLACK = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 0.0, torch.float16: 0.0}


def check(actual, beside, exact, shape, summed: bool) -> None:
    """Of [output, gradients], the last of them a sum over space where ``summed``: as many terms of order 1."""
    for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
        last = summed and i == 2
        terms = math.sqrt(math.prod(shape[2:])) if last else 1.0
        assert_bar(a, b, e, max(SLACK[a.dtype], 1e-6 if last and a.dtype != torch.float64 else 0.0), terms)


@pytest.mark.isa
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, layout, condition):
    x, grad = guarded(laid_out((3 * randn(*shape)).to(dtype), layout)), randn(*halved(shape), seed=3, dtype=dtype)
    given_ = make_condition(condition, shape, dtype)
    given_ = None if given_ is None else guarded(given_)
    wide = None if given_ is None else given_.double()
    for activation in GATED_ACTIVATIONS:
        poison_allocator(x.numel() * x.element_size())
        actual, beside = (gradients(f, x, given_, activation, grad) for f in (gated_activation, plain))
        exact = gradients(plain, x.double(), wide, activation, grad.double())
        assert all(a.dtype == dtype for a in actual)
        check(actual, beside, exact, shape, condition in ("channel", "column"))
    assert list(actual[0].stride()) == dense_strides(halved(shape), is_channels_last(x))
    assert list(actual[1].stride()) == output_strides(x)


@pytest.mark.isa
@pytest.mark.parametrize("condition", ["channel", "position"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(d, c) for d in DTYPES for c in DTYPES if d != c])
def test_a_condition_of_another_dtype(dtypes, layout, condition):
    dtype, other = dtypes
    shape = (2, 34, 5, 9)
    x, grad = laid_out(randn(*shape, dtype=dtype), layout), randn(*halved(shape), seed=3, dtype=dtype)
    given_ = make_condition(condition, shape, other)
    actual = gradients(gated_activation, x, given_, "tanh", grad)
    exact = gradients(plain, x.double(), given_.double(), "tanh", grad.double())
    beside = [e.to(dtype) for e in exact]
    assert [a.dtype for a in actual] == [dtype, dtype, other]
    for i, (a, b, e) in enumerate(zip(actual, beside, exact, strict=True)):
        terms = 45**0.5 if i == 2 and condition == "channel" else 1.0
        wider = dtype != torch.float64 and other in (
            torch.float32,
            torch.float64,
        )  # the arithmetic is in float32 all the same
        assert_bar(a, b, e, 1e-6 if wider else SLACK[dtype] + HALF_ULP[other], terms)


@pytest.mark.isa
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_magnitude(dtype, activation):
    """Each value to some ulp by itself: far out, where tanh saturates, near 0, where it is its argument, denormal."""
    info = torch.finfo(dtype)
    magnitudes = torch.logspace(math.log10(info.tiny) - 2, 2, 1501, dtype=torch.float64)
    a = torch.cat([magnitudes, -magnitudes, torch.linspace(-20, 20, 1501, dtype=torch.float64)]).to(dtype)
    for b in (0.0, 1e-3, -1.0, 5.0, -40.0, 85.0, -85.0):
        x = torch.stack([a, torch.full_like(a, b)], 1)
        y, exact = gated_activation(x, activation=activation), plain(x.double(), activation=activation)
        # float64 has nothing more exact to be compared with: some ulp of its own for the other side
        ulps, ulp = (
            (16 if dtype == torch.float64 else 8),
            (exact.abs() * info.eps).clamp_min(info.smallest_normal * info.eps),
        )
        assert ((y.double() - exact).abs() <= ulps * ulp).all()


@pytest.mark.isa
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends(dtype, activation):
    """Values far out, infinite and not a number, of both halves, and their gradients, beside torch in float64."""
    x = ends(activation).to(dtype)
    grad = torch.ones(len(x), 1, dtype=dtype)
    actual = gradients(gated_activation, x, None, activation, grad)
    exact = gradients(plain, x.double(), None, activation, grad.double())
    eps = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[0], exact[0].to(dtype), rtol=eps, atol=1e-37, equal_nan=True)
    # an infinite a without tanh: torch has inf * s * (1 - s) for the gradient of b, where 1 - s may be 0 in float64 before e s is
    finite = (
        x[:, 0].isfinite() & (x[:, 0].abs() < 1e19)
        if activation == "identity"
        else torch.ones(len(x), dtype=torch.bool)
    )
    torch.testing.assert_close(actual[1][finite], exact[1].to(dtype)[finite], rtol=eps, atol=float(eps), equal_nan=True)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_at_its_position(layout):
    x = laid_out(randn(2, 42, 6, 6, dtype=torch.float32), layout)
    x[1, 5, 2, 3] = x[0, 30, 1, 1] = math.nan
    y = gated_activation(x)
    assert y.isnan().nonzero().tolist() == [[0, 9, 1, 1], [1, 5, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (0, 2)])
@pytest.mark.parametrize("condition", ["none", "channel", "position"])
def test_nothing(shape, condition):
    x, given_ = torch.zeros(shape, requires_grad=True), make_condition(condition, shape, torch.float32)
    leaf = None if given_ is None else torch.zeros_like(given_).requires_grad_()
    y = gated_activation(x, leaf)
    y.sum().backward()
    assert y.shape == halved(shape) and x.grad.shape == shape
    assert leaf is None or (leaf.grad.shape == given_.shape and not leaf.grad.any())


def test_every_way_to_write_a_condition():
    """[N, 2 C], sizes of 1 for space, all or some, and the shape of the input: what broadcasting has."""
    x = randn(2, 6, 4, 5)
    grad = randn(2, 3, 4, 5, seed=3)
    for sizes in ((2, 6), (2, 6, 1, 1), (2, 6, 4, 1), (2, 6, 1, 5), (2, 6, 4, 5)):
        given_ = randn(*sizes, seed=1)
        for a, e in zip(*(gradients(f, x, given_, "tanh", grad) for f in (gated_activation, plain)), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = list(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5)))
    sizes[1] *= 2
    dtype = data.draw(st.sampled_from(DTYPES))

    def anyhow(seed: int) -> torch.Tensor:
        padding = [data.draw(st.integers(0, 3)) for _ in sizes]
        base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), seed=seed, dtype=dtype)
        order = data.draw(st.permutations(range(len(sizes))))
        base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
        return guarded(base[tuple(slice(p, None) for p in padding)])

    x, activation = anyhow(len(sizes)), data.draw(st.sampled_from(GATED_ACTIVATIONS))
    kind = data.draw(st.sampled_from(CONDITIONS))
    condition = anyhow(77) if kind == "position" else make_condition(kind, tuple(sizes), dtype)
    wide = None if condition is None else condition.double()
    actual = gated_activation(x, condition, activation=activation)
    beside, exact = plain(x, condition, activation), plain(x.double(), wide, activation)
    # of a few values all may be exactly right in plain torch
    assert_bar(actual, beside, exact, slack=max(SLACK[dtype], 3e-7 if dtype == torch.float32 else 0.0))
    assert list(actual.stride()) == dense_strides(halved(tuple(sizes)), is_channels_last(x))


def test_views_are_read_in_place():
    """Channel slices of either layout, an expanded batch, a waveform cut short: no copy, which would be an op of torch's."""
    big = randn(2, 24, 6, 5, dtype=torch.float32)
    views = [laid_out(big, layout)[:, 8:16] for layout in LAYOUTS] + [
        big.flatten(2)[:, :, 3:],
        big[:1].expand(3, -1, -1, -1),
    ]
    for view in views:
        grad = randn(*halved(view.shape), seed=1, dtype=torch.float32)
        grad = grad.to(memory_format=torch.channels_last) if is_channels_last(view) else grad
        for condition in (None, randn(*view.shape[:2], dtype=torch.float32), view):
            with torch.profiler.profile() as profile:
                y = ops.gated_activation_fwd(view, condition, 0)
                dx, dc = ops.gated_activation_bwd(grad, view, condition, 0)
            assert not {event.key for event in profile.key_averages()} & {
                "aten::copy_",
                "aten::clone",
                "aten::contiguous",
            }
            torch.testing.assert_close(y, reference.gated_activation_fwd(view, condition, 0))
            torch.testing.assert_close((dx, dc), reference.gated_activation_bwd(grad, view, condition, 0))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_gradcheck(condition, layout, activation):
    x, given_ = (
        laid_out(randn(2, 4, 3, 5), layout).requires_grad_(),
        make_condition(condition, (2, 4, 3, 5), torch.float64),
    )
    leaves = (x,) if given_ is None else (x, given_.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: gated_activation(*t, activation=activation), leaves)


def test_gradcheck_through_cat_expand_and_mixed_layouts():
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last."""
    x, c = randn(2, 4, 3, 2).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    functions = {
        "cat": lambda t, c: torch.cat([gated_activation(t, c), t * 2], dim=1)[:, 1:5],
        "expanded gradient": lambda t, c: gated_activation(t, c).sum() * gated_activation(t),
        "channels-last into contiguous": lambda t, c: (
            gated_activation(t.to(memory_format=torch.channels_last), c).contiguous() * t[:, :2]
        ),
        "contiguous into channels-last": lambda t, c: (
            gated_activation(t, t.to(memory_format=torch.channels_last)).to(memory_format=torch.channels_last)
            * t[:, 2:]
        ),
        "transposed": lambda t, c: gated_activation(t, c.flip(0)).transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda t, c: gated_activation(t[:1].expand(2, -1, -1, -1), c[:1].expand(2, -1)) * 2,
        "the condition of itself": lambda t, c: gated_activation(t, t) * c[0, 0],
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(lambda t, c, f=function: f(t, c), (x, c)), name


def test_only_the_inputs_are_kept_for_the_backward():
    kept = []
    x, c = randn(2, 6, 4, dtype=torch.float32).requires_grad_(), randn(2, 6, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        gated_activation(x, c)
    assert kept == [x.data_ptr(), c.data_ptr()]


def test_only_the_gradients_asked_for():
    x, c = randn(2, 6, 4, dtype=torch.float32), randn(2, 6, dtype=torch.float32)
    for leaf, function in ((x.clone().requires_grad_(), lambda t: gated_activation(t, c)),
                           (c.clone().requires_grad_(), lambda t: gated_activation(x, t))):  # fmt: skip
        assert torch.autograd.grad(function(leaf).sum(), leaf)[0].shape == leaf.shape
    with torch.no_grad():
        assert not gated_activation(x, c.requires_grad_()).requires_grad


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (1, 2, 200, 201), (3, 202, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x, grad = laid_out(randn(*shape, dtype=torch.float32), layout), randn(*halved(shape), seed=4, dtype=torch.float32)
    for kind in CONDITIONS:
        condition = make_condition(kind, shape, torch.float32)
        assert_any_threads(lambda condition=condition: gradients(gated_activation, x, condition, "tanh", grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2), (1, 2, 3, 3)])
def test_fakes(shape, layout):
    for (op, make), condition in itertools.product(
        ((ops.gated_activation_fwd, forward), (ops.gated_activation_bwd, backward)), ("none", "channel", "position")
    ):
        compare = assert_registered if shape == (2, 6, 4, 5) and condition == "channel" else assert_fake
        for dtype in (torch.float32, torch.bfloat16):
            compare(op.default, make(shape, dtype, condition, 0, layout))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    x = laid_out(randn(2, 8, 6, 6, dtype=torch.float32), "channels_last")
    c = randn(2, 8, dtype=torch.float32)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def model(t):
        return gated_activation(t * 2, c) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"activation must be one of \('tanh', 'identity'\), got 'relu'", {"activation": "relu"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, 2 C, \*spatial\] with C >= 1, got shape \(2, 5, 3\)", {"input": torch.zeros(2, 5, 3)}),
        (ValueError, r"input must be .*got shape \(2, 0, 3\)", {"input": torch.zeros(2, 0, 3)}),
        (ValueError, r"input must be .*got shape \(6,\)", {"input": torch.zeros(6)}),
        (TypeError, "condition must be a floating-point tensor, got int", {"condition": 1}),
        (ValueError, r"condition must be .*got shape \(2, 3\) with input of shape \(2, 6, 3\)", {"condition": torch.zeros(2, 3)}),
        (ValueError, r"condition must be .*got shape \(2, 6, 2\)", {"condition": torch.zeros(2, 6, 2)}),
        (ValueError, r"condition must be .*got shape \(1, 6, 3\)", {"condition": torch.zeros(1, 6, 3)}),
        (ValueError, r"condition must be .*got shape \(2, 6, 1, 1\)", {"condition": torch.zeros(2, 6, 1, 1)}),
        (ValueError, "condition must be on the device of input .* got meta", {"condition": torch.zeros(2, 6, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    arguments = {"input": torch.zeros(2, 6, 3), "condition": torch.zeros(2, 6)} | change
    with pytest.raises(error, match=f"gated_activation: {message}"):
        gated_activation(**arguments)
