"""`concat_elu`: values, gradients, memory, layouts, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import _library
from fastgen.ops import concat_elu
from fastgen.reference._layout import dense_strides, is_channels_last, output_strides

from ..backends import requires_cpu
from .concat_elu_cases import SHAPES, backward, doubled, forward, gradients, plain
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


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, layout):
    x, grad = guarded(laid_out((3 * randn(*shape)).to(dtype), layout)), randn(*doubled(shape), seed=3, dtype=dtype)
    poison_allocator(2 * x.numel() * x.element_size())
    actual, beside = (gradients(f, x, grad) for f in (concat_elu, plain))
    exact = gradients(plain, x.double(), grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == dtype
        assert_bar(a, b, e, 1e-14 if dtype == torch.float64 else 0.0)  # nothing is more exact to compare float64 with
    assert list(actual[0].stride()) == dense_strides(doubled(shape), is_channels_last(x))
    assert list(actual[1].stride()) == output_strides(x)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(dtype):
    """Each value to 2 ulp by itself: far out, near 0 where exp(x) - 1 would cancel, denormal.

    Where the CPU has an instruction that rounds to bfloat16, it makes denormals zero.
    """
    info = torch.finfo(dtype)
    magnitudes = torch.logspace(math.log10(info.tiny) - 2, math.log10(min(info.max, 1e30)), 4001, dtype=torch.float64)
    near = torch.linspace(0.0, 100.0, 4001, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, near, -near]).to(dtype)
    y, exact = concat_elu(x[:, None]), plain(x[:, None].double())
    flushed = dtype == torch.bfloat16 and _library.ISA in ("avx512_bf16", "amx")
    ulp = (exact.abs() * info.eps).clamp_min(info.smallest_normal * (0.5 if flushed else info.eps))
    assert ((y.double() - exact).abs() <= 2 * ulp).all()
    slopes = gradients(concat_elu, x[:, None], torch.ones(len(x), 2, dtype=dtype))[1]
    exact = gradients(plain, x[:, None].double(), torch.ones(len(x), 2).double())[1]
    assert ((slopes.double() - exact).abs() <= 2 * info.eps).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype):
    x = torch.tensor([[math.nan], [math.inf], [-math.inf], [0.0]], dtype=dtype)
    y = concat_elu(x)
    assert (
        torch.equal(y[1:], torch.tensor([[math.inf, -1], [-1, math.inf], [0, 0]], dtype=dtype)) and y[0].isnan().all()
    )
    grad = gradients(concat_elu, x, torch.ones(4, 2, dtype=dtype))[1]
    assert grad[0].isnan() and torch.equal(grad[1:, 0], torch.tensor([1, -1, 0], dtype=dtype))
    wide = laid_out(randn(2, 21, 6, 6, dtype=dtype), "channels_last")
    wide[1, 5, 2, 3] = math.nan
    assert concat_elu(wide).isnan().nonzero().tolist() == [[1, 5, 2, 3], [1, 26, 2, 3]]


@pytest.mark.parametrize("dim", range(-4, 4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_dimension(layout, dim):
    x = laid_out(randn(2, 3, 4, 5, dtype=torch.float32), layout)
    grad = torch.randn(plain(x, dim).shape, generator=torch.Generator().manual_seed(1))
    actual, expected = (gradients(lambda t, f=f: f(t, dim), x, grad) for f in (concat_elu, plain))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(concat_elu(x[0, 0, 0], 0), plain(x[0, 0, 0], 0))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3), (2, 4, 0), (0,), (3, 0)])
def test_nothing(shape):
    for dim in range(len(shape)):
        x = torch.zeros(shape, requires_grad=True)
        y = concat_elu(x, dim)
        y.sum().backward()
        assert y.shape == plain(x, dim).shape and x.grad.shape == shape


@pytest.mark.isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    padding = [data.draw(st.integers(0, 3)) for _ in sizes]
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), seed=len(sizes), dtype=dtype)
    order = data.draw(st.permutations(range(len(sizes))))
    base = base.permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    x = guarded(base[tuple(slice(p, None) for p in padding)])
    actual, exact = concat_elu(x), plain(x.double())
    assert_bar(actual, plain(x), exact, slack=1e-14 if dtype == torch.float64 else 0.0)
    assert list(actual.stride()) == dense_strides(doubled(sizes), is_channels_last(x))


def test_views_are_read_in_place():
    """Channel slices of either layout, an expanded batch, a row: no copy, which would be an op of torch's."""
    big = randn(2, 24, 6, 5, dtype=torch.float32)
    views = [laid_out(big, layout)[:, 8:16] for layout in LAYOUTS] + [
        big.flatten(2)[:, :, 3:],
        big[:1].expand(3, -1, -1, -1),
    ]
    for view in views:
        grad = randn(*doubled(view.shape), seed=1, dtype=torch.float32)
        grad = grad.to(memory_format=torch.channels_last) if is_channels_last(view) else grad
        with torch.profiler.profile() as profile:
            y, dx = ops.concat_elu_fwd(view), ops.concat_elu_bwd(grad, view)
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone", "aten::contiguous"}
        torch.testing.assert_close([y, dx], gradients(plain, view, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_through_cat_expand_and_mixed_layouts(layout):
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last. Nothing is near 0, where the
    second derivative jumps."""
    x = laid_out(randn(2, 4, 3, 2), layout)
    x = (x + 0.1 * x.sign()).requires_grad_()
    functions = {
        "plain": concat_elu,
        "cat": lambda t: torch.cat([concat_elu(t), t * 2], dim=1)[:, 1:10],
        "expanded gradient": lambda t: concat_elu(t).sum() * concat_elu(t),
        "channels-last into contiguous": lambda t: (
            concat_elu(t.to(memory_format=torch.channels_last)).contiguous()[:, :4] * t
        ),
        "contiguous into channels-last": lambda t: concat_elu(t).to(memory_format=torch.channels_last)[:, ::2] * t,
        "transposed": lambda t: concat_elu(t).transpose(2, 3)[:, ::2] ** 2,
        "expanded": lambda t: concat_elu(t[:1].expand(3, -1, -1, -1)) * 2,
        "the last": lambda t: concat_elu(t, -1)[..., 1:],
    }
    for name, function in functions.items():
        assert torch.autograd.gradcheck(function, (x,)), name


def test_only_the_input_is_kept_for_the_backward():
    kept = []
    x = randn(2, 3, 4, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        concat_elu(x)
    assert kept == [x.data_ptr()]


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (1, 1, 200, 201), (3, 201, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout, shape):
    x, grad = laid_out(randn(*shape, dtype=torch.float32), layout), randn(*doubled(shape), seed=4, dtype=torch.float32)
    assert_any_threads(lambda: gradients(concat_elu, x, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2), (1, 1, 3, 3), (2, 0, 3)])
def test_fakes(shape, layout):
    compare = assert_registered if shape == (2, 6, 4, 5) else assert_fake
    for dtype, make in itertools.product((torch.float32, torch.bfloat16), (forward, backward)):
        op = ops.concat_elu_fwd if make is forward else ops.concat_elu_bwd
        compare(op.default, make(shape, dtype, layout))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    x = laid_out(randn(2, 8, 6, 6, dtype=torch.float32), "channels_last")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def model(t):
        return concat_elu(t * 2) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


def test_errors():
    with pytest.raises(TypeError, match="concat_elu: input must be a floating-point tensor, got list"):
        concat_elu([1.0])
    with pytest.raises(ValueError, match=r"concat_elu: input must be \[N, \*\], got a scalar"):
        concat_elu(torch.tensor(1.0))
    for dim in (-4, 3):
        with pytest.raises(
            ValueError, match=rf"concat_elu: dim must be in \[-3, 3\), got {dim} with input of shape \(2, 3, 4\)"
        ):
            concat_elu(torch.zeros(2, 3, 4), dim)
