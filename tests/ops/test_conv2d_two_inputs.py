"""`conv2d` and `upsample_conv2d` of two inputs: what they give of one that is made of both, bit by bit, by the kernels without
making it."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastgen.ops import conv2d, conv2d_memory_limit, conv2d_plan, upsample_conv2d

from ..backends import requires_cpu
from .conv2d_cases import direct_arguments, halves, operands, packed_arguments, plain, weight_of
from .numerics import (
    DTYPES,
    LAYOUTS,
    assert_any_threads,
    assert_fake,
    assert_registered,
    guarded,
    laid_out,
    randn,
    relative,
)

# The seam between two chunks of channels, in one, in the only one; near the ends; few pixels.
SHAPES = [
    ((2, 96, 8, 8), 32, 64), ((2, 96, 8, 9), 32, 40), ((1, 70, 9, 34), 48, 69), ((1, 33, 5, 7), 5, 1), ((3, 20, 1, 1), 17, 9),
    ((2, 12, 13, 2), 40, 5), ((1, 300, 4, 6), 16, 128),
]  # fmt: skip
KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("fastgen::conv2d_direct", "CPU")


def two(x, seam, layout, of_skip=None):
    """The parts of ``x``, over memory that no other tensor has."""
    return guarded(halves(x, seam, layout)[0]), guarded(halves(x, seam, of_skip or layout)[1])


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize(("shape", "k", "seam"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernels(dtype, shape, k, seam, outputs, layout):
    x, packed, *rest, _ = packed_arguments(shape, k, outputs, dtype)
    first, second = two(x, seam, layout)
    actual = torch.ops.fastgen.conv2d_packed(first, packed, *rest, second)
    expected = torch.ops.fastgen.conv2d_packed(laid_out(x, layout), packed, *rest, None)
    assert torch.equal(actual, expected)
    assert seam == 1 or actual.stride() == expected.stride()
    if outputs > 1:
        x, packed, *rest, _ = packed_arguments(shape, k, outputs, dtype, family="upsample_conv2d")
        actual = torch.ops.fastgen.upsample_conv2d_packed(first, packed, *rest, second)
        assert torch.equal(actual, torch.ops.fastgen.upsample_conv2d_packed(laid_out(x, layout), packed, *rest, None))


@pytest.mark.isa
@pytest.mark.skipif(not KERNEL, reason="no matrix tiles: the reference answers, which makes one of the two")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kernel"), [("conv2d", 3), ("conv2d", 1), ("upsample_conv2d", 3)])
@pytest.mark.parametrize(("shape", "k", "seam"), SHAPES)
def test_matrix_tiles(shape, k, seam, family, kernel, layout):
    x, packed, *rest, _ = direct_arguments(shape, k, kernel, family=family)
    op = getattr(torch.ops.fastgen, f"{family}_direct")
    first, second = two(x, seam, layout)
    assert torch.equal(op(first, packed, *rest, second), op(laid_out(x, layout), packed, *rest, None))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("shape", "k", "seam"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_takes_it(dtype, shape, k, seam, kernel, layout):
    """The public op: kernels or the library, which is given one input."""
    x, weight, given = randn(*shape, dtype=dtype), weight_of(shape, k, kernel, dtype), operands(shape, k, dtype)
    first, second = two(x, seam, layout)
    options = {"padding": kernel // 2, "activation": "silu", "output_scale": 0.5, **given}
    whole = torch.cat([first, second], 1)
    assert torch.equal(conv2d(first, weight, skip=second, **options), conv2d(whole, weight, **options))
    assert conv2d_plan(first, weight, padding=kernel // 2, skip=second) == conv2d_plan(
        whole, weight, padding=kernel // 2
    )


@pytest.mark.isa
def test_inputs_of_two_layouts_and_dtypes():
    x, weight = randn(2, 40, 8, 6, dtype=torch.float32), weight_of((2, 40), 24, 3, torch.float32)
    for layout, of_skip in itertools.permutations(LAYOUTS):
        first, second = two(x, 17, layout, of_skip)
        actual = conv2d(first, weight, padding=1, skip=second)
        # the library's own convolution rounds by the layout of what is concatenated
        assert relative(actual, conv2d(laid_out(x, layout), weight, padding=1)) <= 1e-6
    first, second = two(x, 17, LAYOUTS[0])
    mixed = conv2d(first.bfloat16(), weight, padding=1, skip=second)
    whole = torch.cat([first.bfloat16(), second], 1)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, conv2d(whole, weight, padding=1))


@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_make_no_copy(layout):
    x, packed, *rest, _ = packed_arguments((2, 40, 8, 6), 24)
    rest[6] = laid_out(rest[6], layout)
    for first, second in (two(x, 17, layout), laid_out(x, layout).split([17, 23], 1)):
        assert (
            copies(lambda *parts: torch.ops.fastgen.conv2d_packed(parts[0], packed, *rest, parts[1]), first, second)
            == 0
        )
        sparse = second.repeat_interleave(2, 1)[:, ::2].repeat_interleave(2, 3)[
            ..., ::2
        ]  # no side is dense: it is copied
        assert (
            copies(lambda *parts: torch.ops.fastgen.conv2d_packed(parts[0], packed, *rest, parts[1]), first, sparse) > 0
        )


def copies(call, *tensors) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call(*tensors)
    return sum(event.count for event in seen.key_averages() if event.key in ("aten::cat", "aten::copy_", "aten::clone"))


def test_what_the_library_takes_is_two_products():
    """Of a 1x1 kernel in float32 with the channels innermost; else one input is made of the two."""
    x, weight, bias = randn(2, 40, 8, 6), weight_of((2, 40), 24, 1, torch.float64), randn(24, seed=2)
    exact = F.conv2d(x, weight, bias)
    before = conv2d_memory_limit(0)  # no packed weights, so no kernel of ours
    try:
        for dtype, layout, made in (
            (torch.float32, "channels_last", 0), (torch.float32, "contiguous", 1), (torch.bfloat16, "channels_last", 1),
        ):  # fmt: skip
            first, second = (t.to(dtype) for t in two(x, 17, layout))
            of = weight.to(dtype)
            y = conv2d(first, of, bias.to(dtype), skip=second)
            assert relative(y, exact) <= (1e-6 if dtype == torch.float32 else 1e-2)
            assert y.stride() == conv2d(laid_out(x.to(dtype), layout), of).stride()
            assert copies(lambda a, b, of=of: conv2d(a, of, skip=b), first, second) >= made
            assert made or copies(lambda a, b, of=of: conv2d(a, of, skip=b), first, second) == 0
        first, second = (t.float() for t in two(x, 17, "channels_last"))
        leaf = weight.float().requires_grad_()
        assert copies(lambda a, b: conv2d(a, leaf, skip=b), first, second) > 0
        with torch.no_grad():
            assert copies(lambda a, b: conv2d(a, leaf, skip=b), first, second) == 0
            assert copies(lambda a, b: conv2d(a, leaf, stride=2, skip=b), first, second) > 0
            y, scale = conv2d(first, leaf, padding=1, skip=second), randn(2, 40, seed=5)
            assert relative(y, F.conv2d(x, weight, padding=1)) <= 1e-6
            y = conv2d(first, leaf, skip=second, input_scale=scale.float(), activation="silu")
            assert relative(y, F.conv2d(F.silu(x * scale[:, :, None, None]), weight)) <= 1e-6
    finally:
        conv2d_memory_limit(before)


def test_gradients():
    x, weight, given = (
        randn(2, 6, 4, 3),
        weight_of((2, 6), 4, 3, torch.float64),
        operands((2, 6, 4, 3), 4, torch.float64),
    )
    leaves = [t.clone().requires_grad_() for t in (x[:, :2], x[:, 2:], weight)]
    assert torch.autograd.gradcheck(lambda a, b, w: conv2d(a, w, padding=1, skip=b, **given, activation="silu"), leaves)
    assert torch.autograd.gradcheck(lambda a, b, w: upsample_conv2d(a, w, skip=b), leaves)
    exact = plain(torch.cat(leaves[:2], 1), leaves[2], **given)
    torch.testing.assert_close(conv2d(leaves[0], leaves[2], padding=1, skip=leaves[1], **given), exact)


@pytest.mark.parametrize("family", ["conv2d", "upsample_conv2d"])
def test_the_references_of_two_inputs_are_those_of_one(family):
    reference = importlib.import_module(f"fastgen.reference.{family}")
    geometry = ([1, 1], [1, 1], [1, 1], 1) if family == "conv2d" else ()
    weight = weight_of((2, 6), 4, 3, torch.float32)
    x, _, _, *given, _ = packed_arguments(family=family)
    of_image = (x, weight, *geometry, *given)
    for name, args in (
        ("fwd", of_image), ("packed", packed_arguments(family=family)[:-1]), ("direct", direct_arguments(family=family)[:-1]),
    ):  # fmt: skip
        function, (x, *rest) = getattr(reference, f"{family}_{name}"), args
        assert torch.equal(function(x[:, :2], *rest, x[:, 2:]), function(x, *rest, None)), name


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("outputs", [1, 4])
def test_nan_of_either_input_stays_in_its_sample(outputs):
    x, packed, *rest, _ = packed_arguments((3, 40, 9, 10), 24, outputs, activation=0)
    for channel in (3, 38):
        spoiled = x.clone()
        spoiled[1, channel, 4, 4] = float("nan")
        y = torch.ops.fastgen.conv2d_packed(spoiled[:, :20], packed, *rest, spoiled[:, 20:])
        assert y[0].isfinite().all() and y[2].isfinite().all() and y[1, :, 4, 4].isnan().all()


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout):
    x, packed, *rest, _ = packed_arguments((2, 80, 37, 29), 72)
    first, second = halves(x, 41, layout)
    assert_any_threads(lambda: torch.ops.fastgen.conv2d_packed(first, packed, *rest, second))


def test_no_sample_and_fakes():
    x, weight = torch.zeros(0, 4, 3, 3), weight_of((0, 6), 5, 3, torch.float32)
    assert conv2d(x, weight, padding=1, skip=x[:, :2]).shape == (0, 5, 3, 3)
    for layout in LAYOUTS:
        x, packed, *rest, _ = packed_arguments((2, 16, 8, 8), 20)
        first, second = halves(x, 5, layout)
        assert_registered(torch.ops.fastgen.conv2d_packed.default, (first, packed, *rest, second))
        assert_fake(torch.ops.fastgen.conv2d_direct.default, (*direct_arguments((2, 16, 8, 8), 20, seam=5),))


def test_compiled():
    torch._dynamo.reset()
    x, weight = randn(2, 40, 8, 6, dtype=torch.float32), weight_of((2, 40), 24, 3, torch.float32)

    def model(a, b):
        return F.silu(conv2d(a * 2, weight, padding=1, skip=b))

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[:, :17], x[:, 17:]), model(x[:, :17], x[:, 17:]))


@pytest.mark.parametrize("op", [conv2d, upsample_conv2d])
def test_errors(op):
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(3, 6, 3, 3)
    for error, skip, message in (
        (
            ValueError,
            torch.zeros(2, 2, 5, 4),
            r"skip must have the shape of input but for the channels, \(2, 4, 5, 5\)",
        ),
        (ValueError, torch.zeros(2, 2, 5, 5, device="meta"), "skip must be on the device of input"),
        (TypeError, torch.zeros(2, 2, 5, 5).int(), "skip must be a floating-point tensor"),
        (ValueError, torch.zeros(2, 3, 5, 5), r"weight must be .* input of shape \(2, 7, 5, 5\)"),
    ):
        with pytest.raises(error, match=f"{op.__name__}: {message}"):
            op(x, weight, skip=skip)
