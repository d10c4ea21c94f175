"""`conv2d`: values, gradients, memory, layouts, errors; its plans and its kept weights have files of their own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgen
from fastgen.ops import _convolution, conv2d, conv2d_plan, upsample_conv2d
from fastgen.reference import conv2d as reference
from fastgen.reference._convolution import output_strides
from fastgen.reference._layout import dense_strides

from ..backends import requires_cpu
from .conv2d_cases import OPERANDS, SHAPES, adversarial, operands, packed_arguments, plain, weight_of, wide
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

HALVES = (torch.bfloat16, torch.float16)
BOUND = 2e-5  # of the docstring


@pytest.mark.isa
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape, k, kernel, layout, full):
    x, weight = guarded(laid_out(randn(*shape, dtype=dtype), layout)), guarded(weight_of(shape, k, kernel, dtype))
    given = operands(shape, k, dtype) if full else {}
    if full:
        given["residual"] = laid_out(given["residual"], layout)
    options = {"padding": kernel // 2, "activation": "silu" if full else None, "output_scale": 0.7 if full else 1.0}
    poison_allocator(k * x.numel() // shape[1] * x.element_size())
    actual = conv2d(x, weight, **given, **options)
    exact = plain(x.double(), weight.double(), **wide(given), **options)
    assert actual.dtype == dtype
    assert_bar(actual, plain(x, weight, **given, **options), exact, 1e-12 if dtype == torch.float64 else BOUND)
    if conv2d_plan(x, weight, padding=kernel // 2).outputs:
        assert list(actual.stride()) == output_strides(actual.shape, x)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernels(dtype, shape, k, outputs, layout):
    """Every algorithm on every shape, whatever the plan would take; the reference, by the same algorithm, in float64."""
    weight = weight_of(shape, k, 1 if outputs == 1 else 3, dtype)
    x, packed, *rest = packed_arguments(shape, k, outputs, dtype, weight=weight)
    x, packed, rest[6] = guarded(laid_out(x, layout)), guarded(packed), guarded(laid_out(rest[6], layout))
    poison_allocator(k * x.numel() // shape[1] * x.element_size())
    actual = torch.ops.fastgen.conv2d_packed(x, packed, *rest)
    same = [r.double() if isinstance(r, torch.Tensor) else r for r in rest]
    beside = reference.conv2d_packed(x.double(), packed.double(), *same)
    given = dict(zip(OPERANDS, (rest[1], rest[2], rest[3], rest[5], rest[6]), strict=True))
    exact = plain(
        x.double(), weight.double(), padding=int(outputs > 1), **wide(given), activation="silu", output_scale=0.5
    )
    assert relative(beside, exact) <= 1e-6  # packed weights are rounded to fp32
    assert relative(actual, exact) <= (BOUND if dtype == torch.float32 else 2e-3 if dtype == torch.bfloat16 else 3e-4)
    assert list(actual.stride()) == output_strides(actual.shape, x)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_the_reference(dtype):
    for outputs, kernel in ((1, 1), (2, 3), (4, 3)):
        weight = weight_of((1, 21), 37, kernel, dtype)
        for given_weight in (
            weight,
            weight.to(memory_format=torch.channels_last),
            weight.flip(2).flip(2),
            weight[:, ::2],
        ):
            packed = torch.ops.fastgen.conv2d_pack(guarded(given_weight), outputs)
            expected = reference.conv2d_pack(given_weight, outputs)
            torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-8)
            assert packed.is_contiguous() and packed.shape == expected.shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("outputs", [2, 4])
def test_the_error_of_winograd_is_bounded(outputs, name):
    """By 2e-5 of the norm of the output; where the output itself cancels, of that of the convolution of magnitudes."""
    x, weight = adversarial()[name]
    packed = torch.ops.fastgen.conv2d_pack(weight.float(), outputs)
    none = (None,) * 3
    actual = torch.ops.fastgen.conv2d_packed(x.float(), packed, len(weight), *none, 0, None, None, 1.0, None)
    exact = F.conv2d(x, weight, padding=1)
    norm = exact.norm()
    if name in ("second differences", "a large mean"):
        norm = F.conv2d(x.abs(), weight.abs(), padding=1).norm()
    error = (actual.double() - exact).norm()
    assert error <= BOUND * norm, f"{error / norm:.2e}"


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_plain_torch(dtype, kernel, layout):
    shape, k = (2, 6, 7, 5), 9
    x, weight = laid_out(randn(*shape, dtype=dtype), layout), weight_of(shape, k, kernel, dtype)
    given = operands(shape, k, dtype)
    options = {"padding": kernel // 2, "activation": "silu", "output_scale": 0.7}
    grad = randn(2, k, 7, 5, seed=3)

    def gradients(function, wider):
        leaves = [(t.double() if wider else t).detach().clone().requires_grad_() for t in (x, weight, *given.values())]
        y = function(leaves[0], leaves[1], **dict(zip(given, leaves[2:], strict=True)), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    results = zip(gradients(conv2d, False), gradients(plain, False), gradients(plain, True), strict=True)
    for actual, beside, exact in results:
        assert actual.dtype == dtype
        assert_bar(actual, beside, exact, 1e-12 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("index", range(7))
def test_gradcheck(index):
    shape, k = (2, 3, 4, 5), 4
    tensors = [randn(*shape), weight_of(shape, k, 3, torch.float64), *operands(shape, k, torch.float64).values()]
    tensors[index].requires_grad_()

    def function(t):
        x, weight, *rest = [*tensors[:index], t, *tensors[index + 1 :]]
        return conv2d(
            x, weight, padding=1, **dict(zip(OPERANDS, rest, strict=True)), activation="silu", output_scale=0.7
        )

    assert torch.autograd.gradcheck(function, (tensors[index],))


@pytest.mark.isa
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2, "padding": 1}, {"padding": 0}, {"padding": "same"}, {"padding": "valid"}, {"padding": (2, 1)},
        {"dilation": 2, "padding": 2}, {"groups": 2, "padding": 1}, {"stride": (1, 2), "padding": (1, 0)},
    ],
)  # fmt: skip
def test_every_geometry_is_that_of_torch(geometry):
    shape, k = (2, 8, 9, 11), 6
    x, weight = randn(*shape).float(), weight_of((2, 8 // geometry.get("groups", 1)), k, 3, torch.float32)
    bias, scale = randn(k).float(), randn(2, 8, seed=7).float()
    exact = plain(x.double(), weight.double(), bias.double(), input_scale=scale.double(), activation="silu", **geometry)
    actual = conv2d(x, weight, bias, input_scale=scale, activation="silu", **geometry)
    assert relative(actual, exact) <= 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_any_strides(kind, dtype):
    x, weight = strided(randn(2, 40, 8, 12, dtype=dtype), kind), weight_of((2, 40), 48, 3, dtype)
    residual = strided(randn(2, 48, 8, 12, seed=5, dtype=dtype), kind)
    exact = plain(x.double(), weight.double(), residual=residual.double())
    actual = conv2d(x, weight, padding=1, residual=residual)
    assert relative(actual, exact) <= {torch.float32: BOUND, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
    other = conv2d(x, weight, padding=1, residual=residual.contiguous())  # a residual of another layout
    assert torch.equal(actual, other)


@pytest.mark.isa
@requires_cpu
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    n, c, k = (data.draw(st.integers(1, most)) for most in (3, 70, 70))
    size = [data.draw(st.integers(1, 21)) for _ in range(2)]
    dtype, layout = data.draw(st.sampled_from(DTYPES[1:])), data.draw(st.sampled_from(LAYOUTS))
    outputs = data.draw(st.sampled_from([1, 2, 4]))
    shape = (n, c, *size)
    weight = weight_of(shape, k, 1 if outputs == 1 else 3, dtype)
    x, packed, *rest = packed_arguments(shape, k, outputs, dtype, activation=0, scale=1.0, weight=weight)
    rest = [r if i in (0, 4, 7) or data.draw(st.booleans()) else None for i, r in enumerate(rest)]
    actual = torch.ops.fastgen.conv2d_packed(laid_out(x, layout), packed, *rest)
    given = dict(zip(OPERANDS, (rest[1], rest[2], rest[3], rest[5], rest[6]), strict=True))
    given = {name: t.double() for name, t in given.items() if t is not None}
    exact = plain(x.double(), weight.double(), padding=int(outputs > 1), **given)
    bound = {torch.float32: BOUND, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
    if actual.numel() <= 2 and dtype != torch.float32:  # the rounding of one number, which no others make up for
        bound = BOUND + {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative(actual, exact) <= bound


@pytest.mark.isa
@requires_cpu  # the reference multiplies by the zeros of the transforms as well
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_nan_and_infinity_stay_in_their_sample(value, outputs):
    """Winograd spreads them over a tile and its neighbours, never to another sample; a NaN is never lost."""
    x, packed, k, *rest = packed_arguments((3, 20, 9, 10), 24, outputs, activation=0)
    x[1, 3, 4, 4] = value
    y = torch.ops.fastgen.conv2d_packed(x, packed, k, *rest)
    assert y[0].isfinite().all() and y[2].isfinite().all()
    assert not y[1, :, 4, 4].isfinite().any()
    assert y[1, :, 0, 0].isfinite().all() and y[1, :, 8, 9].isfinite().all()


@pytest.mark.isa
def test_no_sample():
    x, weight = torch.zeros(0, 4, 3, 3), weight_of((0, 4), 5, 3, torch.float32)
    assert conv2d(x, weight, padding=1).shape == (0, 5, 3, 3)
    packed = torch.ops.fastgen.conv2d_pack(weight, 4)
    assert torch.ops.fastgen.conv2d_packed(x, packed, 5, *(None,) * 3, 0, None, None, 1.0, None).shape == (0, 5, 3, 3)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_time(dtype, outputs, layout):
    x, packed, *rest = packed_arguments((2, 80, 37, 29), 72, outputs, dtype)
    x = laid_out(x, layout)
    assert_any_threads(lambda: torch.ops.fastgen.conv2d_packed(x, packed, *rest))


@pytest.mark.isa
@requires_cpu
def test_many_groups_of_rows_are_one_convolution():
    """Values and products past the bytes of a group of rows: some groups begin in the middle of a sample."""
    x, packed, *rest = packed_arguments((3, 64, 120, 60), 64, 4)
    together = torch.ops.fastgen.conv2d_packed(x, packed, *rest)
    k, bias, scale, shift, activation, embedding, residual, factor, _ = rest
    for i in range(3):
        alone = torch.ops.fastgen.conv2d_packed(
            x[i : i + 1], packed, k, bias, scale[i : i + 1], shift[i : i + 1], activation, embedding[i : i + 1],
            residual[i : i + 1], factor, None,
        )  # fmt: skip
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.isa
def test_parameters_of_other_dtypes():
    """A half-precision image with float32 weights, and the other way round."""
    shape, k = (1, 40, 8, 8), 32
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        x, weight = randn(*shape, dtype=dtype), weight_of(shape, k, 3, other)
        given = operands(shape, k, other)
        actual = conv2d(x, weight, padding=1, **given, activation="silu")
        exact = plain(x.double(), weight.double(), **wide(given), activation="silu")
        assert actual.dtype == dtype and relative(actual, exact) <= (3e-3 if dtype == torch.bfloat16 else BOUND)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (0, 6, 3, 2), (1, 1, 3, 3)])
def test_fakes(shape, layout):
    x, packed, *rest = packed_arguments(shape, 20)
    x, weight = laid_out(x, layout), weight_of(shape, 20, 3, torch.float32)
    compare = assert_registered if shape[0] == 2 else assert_fake
    compare(torch.ops.fastgen.conv2d_packed.default, (x, packed, *rest))
    compare(torch.ops.fastgen.conv2d_pack.default, (weight, 2))
    _, bias, scale, shift, activation, embedding, residual, factor, _ = rest
    for stride in (1, 2):
        given = residual[..., ::stride, ::stride]
        arguments = (
            x,
            weight,
            [stride] * 2,
            [1, 1],
            [1, 1],
            1,
            bias,
            scale,
            shift,
            activation,
            embedding,
            given,
            factor,
            None,
        )
        compare(torch.ops.fastgen.conv2d_fwd.default, arguments)


def test_the_reference_is_what_a_user_writes():
    shape, k = (2, 6, 9, 7), 8
    for kernel, geometry in (
        (3, ([1, 1], [1, 1], [1, 1], 1)),
        (3, ([2, 1], [0, 2], [1, 2], 2)),
        (5, ([1, 1], [2, 2], [1, 1], 1)),
    ):
        x, weight = randn(*shape), weight_of((2, 6 // geometry[3]), k, kernel, torch.float64)
        stride, padding, dilation, groups = geometry
        given = operands(shape, k, torch.float64)
        del given["residual"]
        bias, scale, shift, embedding = given.values()
        actual = reference.conv2d_fwd(x, weight, *geometry, bias, scale, shift, 1, embedding, None, 0.5, None)
        expected = plain(
            x, weight, **given, activation="silu", output_scale=0.5,
            stride=stride, padding=padding, dilation=dilation, groups=groups,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert list(actual.stride()) == dense_strides(actual.shape, False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_gradients_follows_the_weight_and_the_switch(backend):
    torch._dynamo.reset()
    x, weight = randn(1, 64, 16, 16, dtype=torch.float32), torch.nn.Parameter(weight_of((1, 64), 64, 3, torch.float32))
    scale = randn(1, 64, seed=2, dtype=torch.float32)

    def model(t):
        return conv2d(t * 2, weight, padding=1, input_scale=scale, activation="silu") + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        weight.mul_(3)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        with fastgen.set_exact(True):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def test_compiled_with_gradients():
    torch._dynamo.reset()
    x = randn(1, 8, 6, 6, dtype=torch.float32)
    weight = weight_of((1, 8), 4, 3, torch.float32).requires_grad_()
    compiled = torch.compile(
        lambda t: conv2d(t, weight, padding=1, activation="silu"), fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(plain(x, weight, activation="silu").square().sum(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), weight)[0], expected)


def test_autocast_is_that_of_torch():
    shape, k = (2, 32, 8, 8), 32
    x, weight = randn(*shape).float(), weight_of(shape, k, 3, torch.float32)
    given = operands(shape, k, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv2d_plan(x, weight, padding=1).reason == "autocast chooses the dtypes of plain torch"
        assert conv2d(x, weight, padding=1).dtype == F.conv2d(x, weight, padding=1).dtype == torch.bfloat16
        actual, expected = conv2d(x, weight, padding=1, **given), F.conv2d(x, weight, padding=1) + given["residual"]
        assert actual.dtype == expected.dtype == torch.float32
        exact = plain(x.double(), weight.double(), **wide(given))
        assert relative(actual, exact) <= 5e-3


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "activation must be one of .*'silu'.*, got 'relu'", {"activation": "relu"}),
        (ValueError, r"bias must have shape \(5,\), got shape \(4,\)", {"bias": torch.zeros(4)}),
        (ValueError, r"input_scale must have shape \(2, 4\)", {"input_scale": torch.zeros(4)}),
        (ValueError, r"embedding must have shape \(2, 5\)", {"embedding": torch.zeros(2, 4)}),
        (ValueError, r"residual must have shape \(2, 5, 6, 6\)", {"residual": torch.zeros(2, 5, 6, 5)}),
        (ValueError, "embedding must be on the device of input", {"embedding": torch.zeros(2, 5, device="meta")}),
        (ValueError, "stride must be one or two integers of at least 1, got 0", {"stride": 0}),
        (ValueError, "padding must be numbers, 'valid', or 'same'", {"padding": "full"}),
        (ValueError, r"weight must be \[K, C / groups, kh, kw\], got shape \(5, 4, 3, 3\) with groups=2", {"groups": 2}),
        (ValueError, r"the kernel of shape .* is larger than the padded input", {"dilation": 5}),
        (TypeError, "residual must be a floating-point tensor, got torch.int64", {"residual": torch.zeros(2, 5, 6, 6).long()}),
        (TypeError, "bias must be a floating-point tensor, got float", {"bias": 1.0}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    with pytest.raises(error, match=f"conv2d: {message}"):
        conv2d(torch.zeros(2, 4, 6, 6), torch.zeros(5, 4, 3, 3), **{"padding": 1, **options})


def test_errors_of_input_and_weight():
    with pytest.raises(TypeError, match="conv2d: input must be a floating-point tensor, got list"):
        conv2d([1.0], torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"input must be \[N, C, H, W\], got shape \(2, 3\)"):
        conv2d(torch.zeros(2, 3), torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="weight must not be empty"):
        conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 3, 3))
    with pytest.raises(ValueError, match="weight must be on the device of input"):
        conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 3, 3, device="meta"))


def test_what_is_remembered_of_a_call_is_of_its_arguments(monkeypatch):
    """A right call makes no other right, not even one of the same shapes; a wrong one is wrong again."""
    monkeypatch.setattr(_convolution, "_MOST_REMEMBERED", 3)
    x, weight, residual = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(2, 5, 6, 6)
    for _ in range(2):
        for stride in (1, [1, 1], (1, 1)):
            assert conv2d(x, weight, stride=stride, padding=1, residual=residual).shape == residual.shape
        assert conv2d(x, weight, stride=2, padding=1).shape == (2, 5, 3, 3)
        for wrong in (residual.to("meta"), residual.long(), residual[:1], residual.transpose(0, 1)):
            with pytest.raises((TypeError, ValueError), match="residual must"):
                conv2d(x, weight, padding=1, residual=wrong)
        with pytest.raises(ValueError, match="embedding must have shape"):
            conv2d(x, weight, padding=1, embedding=residual[:, :, 0, 0].t())
        with pytest.raises(ValueError, match="weight must be"):
            upsample_conv2d(x, weight[..., :1, :1])
        assert conv2d(x, weight[..., :1, :1]).shape == residual.shape
        assert len(_convolution._REMEMBERED) <= 3


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(("shape", "k"), [((2, 80, 37, 29), 72), ((1, 300, 32, 32), 20)])
def test_rows_that_threads_keep_and_those_that_they_share_have_the_same_bits(shape, k, outputs, layout):
    """Few threads have enough rows of tiles each to keep them to themselves, in several parts; of sixteen some would have none."""
    x, packed, *rest = packed_arguments(shape, k, outputs)
    x, rest[6] = laid_out(x, layout), laid_out(rest[6], layout)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(torch.ops.fastgen.conv2d_packed(x, packed, *rest))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
