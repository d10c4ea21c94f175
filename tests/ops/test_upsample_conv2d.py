"""`upsample_conv2d`: values, gradients, memory, layouts, plans, kept weights, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastgen
from fastgen.ops import conv2d, conv2d_memory_limit, upsample_conv2d, upsample_conv2d_plan
from fastgen.ops._convolution_plan import TRANSPOSED_PIXELS, packed_bytes
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.reference import upsample_conv2d as reference
from fastgen.reference._convolution import output_strides

from ..backends import requires_cpu
from .conv2d_cases import OPERANDS, adversarial, operands, weight_of, wide
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
    relative,
    strided,
)
from .upsample_conv2d_cases import SHAPES, forward_arguments, packed_arguments, plain

BOUND = 2e-5  # of the docstring
ROUNDED = {torch.float32: BOUND, torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, k, layout, full):
    x, weight = guarded(laid_out(randn(*shape, dtype=dtype), layout)), guarded(weight_of(shape, k, 3, dtype))
    given = operands(shape, k, dtype, 2) if full else {}
    options = {"activation": "silu" if full else None, "output_scale": 0.7 if full else 1.0}
    actual = upsample_conv2d(x, weight, **given, **options)
    exact = plain(x.double(), weight.double(), **wide(given), **options)
    assert actual.dtype == dtype
    assert_bar(actual, plain(x, weight, **given, **options), exact, 1e-12 if dtype == torch.float64 else BOUND)
    if upsample_conv2d_plan(x, weight).outputs:
        assert list(actual.stride()) == output_strides(actual.shape, x)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernels(dtype, shape, k, outputs, layout):
    """Both algorithms on every shape, whatever the plan would take; the reference, by the same algorithm, in float64."""
    weight = weight_of(shape, k, 3, dtype)
    x, packed, *rest = packed_arguments(shape, k, outputs, dtype, weight=weight)
    x, packed, rest[6] = guarded(laid_out(x, layout)), guarded(packed), guarded(laid_out(rest[6], layout))
    poison_allocator(4 * k * x.numel() // shape[1] * x.element_size())
    actual = torch.ops.fastgen.upsample_conv2d_packed(x, packed, *rest)
    same = [r.double() if isinstance(r, torch.Tensor) else r for r in rest]
    beside = reference.upsample_conv2d_packed(x.double(), packed.double(), *same)
    given = dict(zip(OPERANDS, (rest[1], rest[2], rest[3], rest[5], rest[6]), strict=True))
    exact = plain(x.double(), weight.double(), **wide(given), activation="silu", output_scale=0.5)
    assert relative(beside, exact) <= 1e-6  # packed weights are rounded to fp32
    assert relative(actual, exact) <= ROUNDED[dtype]
    assert list(actual.stride()) == output_strides(actual.shape, x)


@pytest.mark.isa
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_the_reference(dtype, outputs):
    weight = weight_of((1, 21), 37, 3, dtype)
    for given_weight in (weight, weight.to(memory_format=torch.channels_last), weight.flip(2).flip(2), weight[:, ::2]):
        packed = torch.ops.fastgen.upsample_conv2d_pack(guarded(given_weight), outputs)
        expected = reference.upsample_conv2d_pack(given_weight, outputs)
        torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-8)
        assert packed.is_contiguous() and packed.shape == expected.shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("outputs", [2, 4])
def test_the_error_of_winograd_is_bounded(outputs, name):
    """By 2e-5 of the norm of the output; where the output itself cancels, of that of the convolution of magnitudes."""
    x, weight = adversarial()[name]
    packed = torch.ops.fastgen.upsample_conv2d_pack(weight.float(), outputs)
    actual = torch.ops.fastgen.upsample_conv2d_packed(
        x.float(), packed, len(weight), None, None, None, 0, None, None, 1.0, None
    )
    exact = plain(x, weight)
    cancels = name in ("second differences", "weights that cancel", "a large mean")
    norm = (plain(x.abs(), weight.abs()) if cancels else exact).norm()
    error = (actual.double() - exact).norm()
    assert error <= BOUND * norm, f"{error / norm:.2e}"


@pytest.mark.isa
@pytest.mark.parametrize("size", [(7, 5), (16, 17)])  # upsampled, and as a transposed convolution
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_plain_torch(dtype, layout, size):
    shape, k = (2, 6, *size), 9
    x, weight = laid_out(randn(*shape, dtype=dtype), layout), weight_of(shape, k, 3, dtype)
    given = operands(shape, k, dtype, 2)
    options = {"activation": "silu", "output_scale": 0.7}
    grad = randn(2, k, 2 * size[0], 2 * size[1], seed=3)

    def gradients(function, wider):
        leaves = [(t.double() if wider else t).detach().clone().requires_grad_() for t in (x, weight, *given.values())]
        y = function(leaves[0], leaves[1], **dict(zip(given, leaves[2:], strict=True)), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    results = zip(gradients(upsample_conv2d, False), gradients(plain, False), gradients(plain, True), strict=True)
    for actual, beside, exact in results:
        assert actual.dtype == dtype
        assert_bar(actual, beside, exact, 1e-12 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("index", range(7))
def test_gradcheck(index):
    shape, k = (2, 3, 3, 4), 4
    tensors = [randn(*shape), weight_of(shape, k, 3, torch.float64), *operands(shape, k, torch.float64, 2).values()]
    tensors[index].requires_grad_()

    def function(t):
        x, weight, *rest = [*tensors[:index], t, *tensors[index + 1 :]]
        return upsample_conv2d(x, weight, **dict(zip(OPERANDS, rest, strict=True)), activation="silu", output_scale=0.7)

    assert torch.autograd.gradcheck(function, (tensors[index],))


@pytest.mark.isa
@requires_cpu
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    n, c, k = (data.draw(st.integers(1, most)) for most in (3, 70, 70))
    shape = (n, c, *(data.draw(st.integers(1, 14)) for _ in range(2)))
    dtype, layout = data.draw(st.sampled_from(DTYPES[1:])), data.draw(st.sampled_from(LAYOUTS))
    outputs, weight = data.draw(st.sampled_from([2, 4])), weight_of(shape, k, 3, dtype)
    x, packed, *rest = packed_arguments(shape, k, outputs, dtype, activation=0, scale=1.0, weight=weight)
    rest = [r if i in (0, 4, 7) or data.draw(st.booleans()) else None for i, r in enumerate(rest)]
    actual = torch.ops.fastgen.upsample_conv2d_packed(laid_out(x, layout), packed, *rest)
    given = dict(zip(OPERANDS, (rest[1], rest[2], rest[3], rest[5], rest[6]), strict=True))
    given = {name: t.double() for name, t in given.items() if t is not None}
    assert relative(actual, plain(x.double(), weight.double(), **given)) <= ROUNDED[dtype]


@pytest.mark.isa
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
def test_any_strides(kind):
    x, weight = strided(randn(2, 40, 8, 12, dtype=torch.float32), kind), weight_of((2, 40), 48, 3, torch.float32)
    residual = strided(randn(2, 48, 16, 24, seed=5, dtype=torch.float32), kind)
    actual = upsample_conv2d(x, weight, residual=residual)
    assert relative(actual, plain(x.double(), weight.double(), residual=residual.double())) <= BOUND
    assert torch.equal(actual, upsample_conv2d(x, weight, residual=residual.contiguous()))


@pytest.mark.isa
@requires_cpu  # the reference multiplies by the zeros of the transforms as well
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("outputs", [2, 4])
def test_nan_and_infinity_stay_in_their_sample(value, outputs):
    """Winograd spreads them over a tile and its neighbours, never to another sample; a NaN is never lost."""
    x, packed, k, *rest = packed_arguments((3, 20, 9, 10), 24, outputs, activation=0)
    x[1, 3, 4, 4] = value
    y = torch.ops.fastgen.upsample_conv2d_packed(x, packed, k, *rest)
    assert y[0].isfinite().all() and y[2].isfinite().all()
    assert not y[1, :, 7:11, 7:11].isfinite().any()
    assert y[1, :, 0, 0].isfinite().all() and y[1, :, 17, 19].isfinite().all()


@pytest.mark.isa
def test_no_sample():
    x, weight = torch.zeros(0, 4, 3, 3), weight_of((0, 4), 5, 3, torch.float32)
    assert upsample_conv2d(x, weight).shape == (0, 5, 6, 6)
    packed = torch.ops.fastgen.upsample_conv2d_pack(weight, 4)
    y = torch.ops.fastgen.upsample_conv2d_packed(x, packed, 5, *(None,) * 3, 0, None, None, 1.0, None)
    assert y.shape == (0, 5, 6, 6)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [2, 4])
def test_bits_do_not_depend_on_threads_or_time(outputs, layout):
    x, packed, *rest = packed_arguments((2, 80, 18, 15), 72, outputs)
    x = laid_out(x, layout)
    assert_any_threads(lambda: torch.ops.fastgen.upsample_conv2d_packed(x, packed, *rest))


@pytest.mark.isa
@requires_cpu
def test_many_groups_of_rows_are_one_convolution():
    """Values and products past the bytes of a group of rows: some groups begin in the middle of a sample."""
    x, packed, k, *rest = packed_arguments((3, 32, 60, 60), 32, 4)
    together = torch.ops.fastgen.upsample_conv2d_packed(x, packed, k, *rest)
    for i in range(3):
        one = [r[i : i + 1] if isinstance(r, torch.Tensor) and r.dim() > 1 else r for r in rest]
        assert torch.equal(together[i : i + 1], torch.ops.fastgen.upsample_conv2d_packed(x[i : i + 1], packed, k, *one))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (0, 6, 3, 2), (1, 1, 3, 3)])
def test_fakes(shape, layout):
    x, packed, *rest = packed_arguments(shape, 20)
    x, weight = laid_out(x, layout), weight_of(shape, 20, 3, torch.float32)
    compare = assert_registered if shape[0] == 2 and layout == "channels_last" else assert_fake
    compare(torch.ops.fastgen.upsample_conv2d_packed.default, (x, packed, *rest))
    compare(torch.ops.fastgen.upsample_conv2d_pack.default, (weight, 2))
    compare(torch.ops.fastgen.upsample_conv2d_fwd.default, (x, weight, *rest[1:]))


def test_the_reference_is_what_a_user_writes():
    x, weight, *rest = (t.double() if isinstance(t, torch.Tensor) else t for t in forward_arguments())
    given = dict(zip(OPERANDS, (rest[0], rest[1], rest[2], rest[4], rest[5]), strict=True))
    actual = reference.upsample_conv2d_fwd(x, weight, *rest)
    expected = plain(torch.cat([x, rest[-1]], 1), weight, **given, activation="silu", output_scale=0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_compiled_follows_the_weight_and_the_switch():
    torch._dynamo.reset()
    x, weight = randn(1, 64, 8, 8, dtype=torch.float32), nn.Parameter(weight_of((1, 64), 64, 3, torch.float32))

    def model(t):
        return upsample_conv2d(t * 2, weight, activation="silu") + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        weight.mul_(3)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        with fastgen.set_exact(True):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(model(x).square().sum(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), weight)[0], expected)


def test_autocast_is_that_of_torch():
    x, weight = randn(2, 32, 16, 16).float(), weight_of((2, 32), 32, 3, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert upsample_conv2d_plan(x, weight).reason == "autocast chooses the dtypes of plain torch"
        actual = upsample_conv2d(x, weight)
        assert actual.dtype == torch.bfloat16 and relative(actual, plain(x.double(), weight.double())) <= 5e-3


@requires_cpu
@pytest.mark.parametrize("height", [4, 16, 32])
def test_exact_is_as_exact_as_the_library(height):
    """Below and above the size from which on it is a transposed convolution."""
    x, weight = randn(1, 64, height, 16, dtype=torch.float32), weight_of((1, 64), 48, 3, torch.float32)
    exact = plain(x.double(), weight.double())
    with fastgen.set_exact(True):
        plan = upsample_conv2d_plan(x, weight)
        assert plan.outputs == 0 and "set_exact" in plan.reason
        for layout in LAYOUTS:
            assert relative(upsample_conv2d(laid_out(x, layout), weight), exact) <= 4e-7
    assert upsample_conv2d_plan(x, weight).outputs > 0


@requires_cpu
def test_packed_weights_are_kept_renewed_and_limited():
    WEIGHTS.clear()
    x, weight = randn(1, 48, 16, 16, dtype=torch.float32), nn.Parameter(weight_of((1, 48), 40, 3, torch.float32))

    def error():
        return relative(upsample_conv2d(x, weight), plain(x.double(), weight.double()))

    limit = conv2d_memory_limit(None)
    with torch.no_grad():
        assert error() <= BOUND
        packed = WEIGHTS.find(weight)[2, 4]
        assert error() <= BOUND and WEIGHTS.find(weight)[2, 4] is packed
        assert WEIGHTS.bytes == packed.nbytes == packed_bytes(2, 4, weight.shape)
        assert upsample_conv2d_plan(x, weight).weight_bytes == packed.nbytes
        weight[3, 5, 1, 1] += 10
        assert error() <= BOUND
        conv2d(x, weight, padding=1)  # the same weight's other form stands beside it
        assert set(WEIGHTS.find(weight)) == {(1, 4), (2, 4)}
        WEIGHTS.clear()
        try:
            conv2d_memory_limit(packed_bytes(2, 4, weight.shape) - 1)
            plan = upsample_conv2d_plan(x, weight)
            assert plan.outputs == 2 and "F(4x4, 3x3)" in plan.reason and "memory limit" in plan.reason
            assert error() <= BOUND and set(WEIGHTS.find(weight)) == {(2, 2)}
            conv2d_memory_limit(0)
            WEIGHTS.clear()
            assert upsample_conv2d_plan(x, weight).outputs == 0 and error() <= 3e-7 and not WEIGHTS.bytes
        finally:
            conv2d_memory_limit(limit)
            WEIGHTS.clear()


@requires_cpu
def test_plans():
    x, weight = torch.zeros(1, 320, 32, 32), torch.zeros(320, 320, 3, 3)
    plan = upsample_conv2d_plan(x, weight)
    assert plan.outputs == 4 and "times as fast as the library" in plan.reason
    assert "faster for this shape" in upsample_conv2d_plan(x[:, :2], weight[:4, :2]).reason
    assert upsample_conv2d_plan(x, nn.Parameter(weight)).reason == "gradients go through plain torch"
    assert upsample_conv2d_plan(x.double(), weight.double()).reason == "float64 is computed by the library"
    assert TRANSPOSED_PIXELS == 16 * 16  # of the sizes of the tests above


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "activation must be one of .*'silu'.*, got 'relu'", {"activation": "relu"}),
        (ValueError, r"bias must have shape \(5,\), got shape \(4,\)", {"bias": torch.zeros(4)}),
        (ValueError, r"residual must have shape \(2, 5, 12, 12\)", {"residual": torch.zeros(2, 5, 6, 6)}),
        (ValueError, "embedding must be on the device of input", {"embedding": torch.zeros(2, 5, device="meta")}),
        (ValueError, r"weight must be \[K, C, 3, 3\], got shape \(5, 4, 1, 1\)", {"weight": torch.zeros(5, 4, 1, 1)}),
        (ValueError, r"weight must be \[K, C, 3, 3\], got shape \(5, 3, 3, 3\)", {"weight": torch.zeros(5, 3, 3, 3)}),
        (ValueError, "weight must not be empty", {"weight": torch.zeros(0, 4, 3, 3)}),
        (ValueError, r"input must be \[N, C, H, W\], got shape \(4, 6, 6\)", {"input": torch.zeros(4, 6, 6)}),
        (ValueError, "input must have a pixel", {"input": torch.zeros(2, 4, 0, 6)}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (TypeError, "residual must be a floating-point tensor, got torch.int64", {"residual": torch.zeros(2, 5, 12, 12).long()}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    given = {"input": torch.zeros(2, 4, 6, 6), "weight": torch.zeros(5, 4, 3, 3), **options}
    for _ in range(2):  # what has been refused is not remembered as right
        with pytest.raises(error, match=f"upsample_conv2d: {message}"):
            upsample_conv2d(**given)
