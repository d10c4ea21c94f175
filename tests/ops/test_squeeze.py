"""`squeeze`: places, layouts, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.ops import squeeze
from fastgen.reference._layout import dense_strides, is_channels_last

from .numerics import DTYPES, LAYOUTS, assert_any_threads, assert_fake, assert_registered, guarded, laid_out, randn
from .squeeze_cases import SHAPES, forward, orders, plain, small_of

op = torch.ops.fastgen.squeeze.default


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "factor"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, factor, layout):
    for order in orders(factor):
        x = guarded(laid_out(randn(*shape, dtype=dtype), layout))
        y = squeeze(x, factor, order=order)
        assert torch.equal(y, plain(x, factor, order=order))
        assert list(y.stride()) == dense_strides(small_of(shape, factor), is_channels_last(x))
        small = guarded(laid_out(randn(*small_of(shape, factor), dtype=dtype), layout))
        back = squeeze(small, factor, order=order, inverse=True)
        assert torch.equal(back, plain(small, factor, order=order, inverse=True))
        assert list(back.stride()) == dense_strides(shape, is_channels_last(small))
        assert torch.equal(squeeze(back, factor, order=order), small)


def test_it_is_torch():
    x = randn(2, 3, 6, 12)
    assert torch.equal(squeeze(x), F.pixel_unshuffle(x, 2))
    assert torch.equal(squeeze(squeeze(x, 3), 3, inverse=True), x)
    assert torch.equal(squeeze(F.pixel_unshuffle(x, 3), 3, inverse=True), x)


def test_the_checkerboard_splits_into_diagonals():
    """What RealNVP's split keeps after the checkerboard's order are the fields of one colour."""
    height, width = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    colour = ((height + width) % 2).float().expand(1, 3, 6, 4)
    first, second = squeeze(colour, order="checkerboard").chunk(2, 1)
    assert not first.any() and second.all()


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    factor = data.draw(st.integers(1, 3))
    shape = [data.draw(st.integers(1, 5)) for _ in range(4)]
    sizes = [shape[0], shape[1], shape[2] * factor, shape[3] * factor]
    padding = [data.draw(st.integers(0, 3)) for _ in sizes]
    base = randn(*(s + p for s, p in zip(sizes, padding, strict=True)), dtype=data.draw(st.sampled_from(DTYPES)))
    layout = data.draw(st.permutations(range(4)))
    base = base.permute(layout).contiguous().permute([layout.index(d) for d in range(4)])
    x = guarded(base[tuple(slice(p, None) for p in padding)])
    order = data.draw(st.sampled_from(orders(factor)))
    assert torch.equal(squeeze(x, factor, order=order), plain(x, factor, order=order))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", orders(2))
def test_gradcheck(order, inverse):
    x = randn(2, 4, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: squeeze(t, order=order, inverse=inverse), x)
    assert torch.autograd.gradgradcheck(lambda t: squeeze(t, order=order, inverse=inverse) ** 2, x)
    mixed = lambda t: squeeze(t.to(memory_format=torch.channels_last), order=order)[:, ::2].transpose(2, 3) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(mixed, x)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads(layout):
    x = laid_out(randn(3, 5, 128, 130, dtype=torch.float32), layout)
    assert_any_threads(lambda: squeeze(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inverse", [False, True])
def test_fakes(layout, inverse):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = forward((2, 3, 4, 6), 2, "channel_major", dtype, inverse, layout)
        (assert_registered if dtype == torch.float32 else assert_fake)(op, arguments)
        assert_fake(op, forward((0, 3, 4, 6), 2, "space_major", dtype, inverse, layout))


def test_compiled():
    torch._dynamo.reset()
    x = randn(2, 3, 4, 6, dtype=torch.float32)
    compiled = torch.compile(lambda t: squeeze(t * 2) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), squeeze(x * 2) + 1)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"order must be one of .*got 'rows'", {"order": "rows"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C, H, W\], got shape \(2, 3\)", {"input": torch.zeros(2, 3)}),
        (ValueError, "factor must be positive, got 0", {"factor": 0}),
        (ValueError, "factor must be 2 where order is 'checkerboard', got 3", {"factor": 3, "order": "checkerboard"}),
        (ValueError, r"factor must divide height and width of input, got factor=3 and shape \(2, 3, 4, 6\)", {"factor": 3}),
        (ValueError, r"factor squared must divide the channels of input, got factor=2 and shape \(2, 3, 4, 6\)", {"inverse": True}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    with pytest.raises(error, match=f"squeeze: {message}"):
        squeeze(**{"input": torch.zeros(2, 3, 4, 6)} | change)
