"""`masked_conv2d`: values and gradients against float64 by every way it may take, layouts, packed weights, errors."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen import _library
from fastgen._schema import MASK_TYPES
from fastgen.ops import conv2d_memory_limit, masked_conv2d, masked_conv2d_mask, masked_conv2d_plan
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.ops.masked_conv2d import PACKED
from fastgen.reference import masked_conv2d as reference
from fastgen.reference._layout import dense_strides, is_channels_last, output_strides

from ..backends import requires_cpu
from .masked_conv2d_cases import (
    CASES,
    backward_arguments,
    case_name,
    forward_arguments,
    packed_arguments,
    plain,
    tensors,
    weight_arguments,
)
from .numerics import (
    DTYPES,
    LAYOUTS,
    STRIDES,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    guarded,
    laid_out,
    poison_allocator,
    randn,
    strided,
)

# Sums of other orders than the library's, of some hundred terms of order 1, which it may have been lucky with.
SLACK = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 1e-6, torch.float16: 1e-6}
ops = torch.ops.fastgen
OURS = bool(PACKED.get(_library.ISA or "", ()))  # whether this variant has products of its own
by_case = pytest.mark.parametrize(
    ("name", "kind", "shape", "k", "kernel", "dilation", "groups", "colors"), CASES, ids=case_name
)


@pytest.fixture
def ways(monkeypatch):
    """Makes `masked_conv2d` take our products, or the library's convolution, whatever the table says."""

    def take(packed: bool) -> None:
        module = sys.modules["fastgen.ops.masked_conv2d"]  # not the function that stands in its place
        monkeypatch.setattr(module, "PACKED", dict.fromkeys(module.PACKED, frozenset(DTYPES[1:] if packed else ())))
        monkeypatch.setattr(module, "_LEAST_OUTPUTS", 0)

    return take


def gradients(function, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.isa
@pytest.mark.parametrize("packed", [True, False])
@by_case
def test_values_and_gradients(name, kind, shape, k, kernel, dilation, groups, colors, packed, ways):
    """In float32, of weights that are NaN where they are masked."""
    ways(packed)
    x, weight, bias = tensors(shape, k, kernel, groups, torch.float32)
    live = masked_conv2d_mask(name, weight.shape, groups=groups, color_channels=colors)
    spoiled = torch.where(live, weight, math.nan)
    grad = randn(shape[0], k, *shape[2:], seed=4)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_conv2d(x, weight, bias, mask_type=name, dilation=dilation, groups=groups, color_channels=colors)

    def beside(*t: Tensor) -> Tensor:
        return plain(*t, name, dilation, groups, colors)

    poison_allocator(k * shape[2] * shape[3] * 4)
    with torch.no_grad():
        alone = fused(x, spoiled, bias)
    actual = gradients(fused, [x, spoiled, bias], grad)
    assert torch.equal(alone, actual[0])
    exact = gradients(beside, [t.double() for t in (x, weight, bias)], grad)
    for a, b, e in zip(actual, gradients(beside, [x, weight, bias], grad), exact, strict=True):
        assert a.dtype == torch.float32
        assert_bar(a, b, e, SLACK[torch.float32], math.sqrt(e.numel() and grad.numel() / max(len(e), 1)) / 8)
    assert (actual[2][~live] == 0).all() and not actual[2].isnan().any()


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(dtype, packed, layout, ways):
    ways(packed)
    for shape, k, kernel, name, colors in (
        ((2, 24, 9, 11), 60, (3, 3), "B", 3), ((1, 3, 13, 17), 20, (7, 7), "A", 1), ((2, 8, 1, 5), 8, (2, 2), "down_right", 1),
        ((2, 20, 5, 30), 3, (3, 3), "B", 1), ((1, 3, 6, 31), 20, (5, 5), "A", 1),
    ):  # fmt: skip
        given_ = tensors(shape, k, kernel, 1, dtype, layout)
        grad = laid_out(randn(shape[0], k, *shape[2:], seed=4), layout).to(dtype)

        def fused(*t: Tensor, name=name, colors=colors) -> Tensor:
            return masked_conv2d(*t, mask_type=name, color_channels=colors)

        def beside(*t: Tensor, name=name, colors=colors) -> Tensor:
            return plain(*t, name, colors=colors)

        actual = gradients(fused, given_, grad)
        exact = gradients(beside, [t.double() for t in given_], grad)
        for a, b, e in zip(actual, gradients(beside, given_, grad), exact, strict=True):
            assert a.dtype == dtype
            assert_bar(a, b, e, SLACK[dtype], math.sqrt(grad.numel()) / 8)
        x = given_[0]
        assert list(actual[0].stride()) == dense_strides(actual[0].shape, is_channels_last(x))
        assert list(actual[1].stride()) == output_strides(x) and actual[2].is_contiguous()


@pytest.mark.isa
@by_case
def test_packed_weights_are_those_of_the_reference(name, kind, shape, k, kernel, dilation, groups, colors):
    for dtype, transposed in itertools.product((torch.float64, torch.bfloat16), (False, True)):
        weight = tensors(shape, k, kernel, groups, dtype)[1]
        spoiled = torch.where(
            masked_conv2d_mask(name, weight.shape, groups=groups, color_channels=colors), weight, math.nan
        )
        arguments = (MASK_TYPES.index(name), groups, colors, transposed)
        packed = reference.masked_conv2d_pack(weight, *arguments)
        assert torch.equal(ops.masked_conv2d_pack(spoiled, *arguments), packed)
        apart = torch.stack([spoiled, spoiled], -1)[..., 0].transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(ops.masked_conv2d_pack(apart, *arguments), packed)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit where the products are ours; the library's take another course for other strides and threads."""
    return torch.equal(a, b) if OURS else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.isa
@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind):
    for shape, groups, colors in (((3, 12, 9, 10), 1, 3), ((2, 24, 4, 5), 2, 1), ((2, 1, 9, 9), 1, 1)):
        x, weight, bias = tensors(shape, 24, (3, 3), groups, torch.float32)
        image = strided(x, kind)
        options = {"mask_type": "B", "groups": groups, "color_channels": colors}
        with torch.no_grad():
            expected = masked_conv2d(image.contiguous(), weight, bias, **options)
            assert same(masked_conv2d(image, weight, bias, **options), expected)
            assert same(masked_conv2d(image, weight.mT.contiguous().mT, bias.repeat(2)[:24], **options), expected)
        grad = strided(randn(shape[0], 24, *shape[2:], seed=5, dtype=torch.float32), kind)
        geometry = (1, [1, 1], groups, colors, True, True)
        for a, e in zip(
            ops.masked_conv2d_bwd(grad, image, weight, *geometry),
            ops.masked_conv2d_bwd(grad.contiguous(), image.contiguous(), weight, *geometry),
            strict=True,
        ):
            assert same(a, e)


@pytest.mark.isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_mask_and_dtype(data):
    groups, colors = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
    name = data.draw(st.sampled_from(MASK_TYPES if colors == 1 else ("A", "B", "horizontal_A", "horizontal_B")))
    unit = math.lcm(groups, colors)
    c, k = unit * data.draw(st.integers(1, 9)), unit * data.draw(st.integers(1, 9))
    shape = (data.draw(st.integers(1, 3)), c, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20)))
    kernel = tuple(2 * data.draw(st.integers(0, 3)) + 1 for _ in range(2))
    dilation = tuple(data.draw(st.sampled_from([1, 1, 2, 7])) for _ in range(2))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    x, weight, bias = tensors(shape, k, kernel, groups, dtype, layout)
    code = MASK_TYPES.index(name)
    grad = guarded(laid_out(randn(shape[0], k, *shape[2:], seed=4), layout).to(dtype))
    actual = [ops.masked_conv2d_fwd(x, weight, bias, code, dilation, groups, colors)]
    actual += ops.masked_conv2d_bwd(grad, x, weight, code, dilation, groups, colors, True, True)

    def dense(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = plain(*leaves, name, dilation, groups, colors)
        return [y.detach(), *torch.autograd.grad(y, leaves[:2], grad.to(dtype))]

    for a, b, e in zip(actual, dense(dtype), dense(torch.float64), strict=True):
        assert_bar(a, b, e, SLACK[dtype], math.sqrt(grad.numel()) / 4)


@pytest.mark.parametrize(
    ("name", "colors", "groups", "layout"),
    [("A", 3, 1, "channels_last"), ("B", 1, 3, "contiguous"), ("vertical_B", 1, 1, "contiguous")],
)
def test_gradcheck(name, colors, groups, layout):
    arguments = [t.requires_grad_() for t in tensors((1, 3, 2, 3), 3, (3, 3), groups, torch.float64, layout)]

    def function(*t: Tensor) -> Tensor:
        return masked_conv2d(*t, mask_type=name, color_channels=colors, groups=groups, dilation=(1, 2))

    assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_through_cat_expand_and_mixed_layouts(dtype):
    """Plain gradcheck hands over contiguous gradients; these come strided, expanded and channels-last. By our products too."""
    x, weight, bias = (t.detach().requires_grad_() for t in tensors((2, 4, 2, 3), 4, (3, 3), 1, dtype))
    functions = {
        "cat": lambda f, t, w: torch.cat([f(t, w), t * 2], dim=1)[:, 1:5],
        "expanded gradient": lambda f, t, w: f(t, w).sum() * f(t, w),
        "expanded input": lambda f, t, w: f(t[:1, :, :, :1].expand(2, 4, 2, 3), w),
        "channels-last into contiguous": lambda f, t, w: f(t.to(memory_format=torch.channels_last), w).contiguous() * t,
        "contiguous into channels-last": lambda f, t, w: f(t, w).to(memory_format=torch.channels_last) * t,
        "transposed": lambda f, t, w: f(t, w.transpose(2, 3)).transpose(2, 3)[:, ::2] ** 2,
    }

    def fused(t: Tensor, w: Tensor) -> Tensor:
        return masked_conv2d(t, w, bias, mask_type="B")

    for name, function in functions.items():
        if dtype == torch.float64:
            assert torch.autograd.gradcheck(lambda t, w, f=function: f(fused, t, w), (x, weight)), name
            continue
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        found = [
            torch.autograd.grad(function(f, *leaves).square().sum(), leaves)
            for f, leaves in ((fused, (x, weight)), (lambda t, w: plain(t, w, bias.double(), "B"), wide))
        ]
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4, msg=name)


def test_only_the_gradients_asked_for():
    given_ = tensors((2, 8, 3, 4), 8, (3, 3), 1, torch.float32)
    for i in range(3):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate(given_)]
        y = masked_conv2d(*leaves, mask_type="A")
        assert torch.autograd.grad(y.sum(), leaves[i])[0].shape == leaves[i].shape
    grads = ops.masked_conv2d_bwd(*backward_arguments((False, False)))
    assert [g.numel() for g in grads] == [0, 0]


def test_weights_of_another_dtype():
    """They are read as they are, and get gradients of their own dtype."""
    x, weight, bias = tensors((2, 8, 5, 4), 16, (3, 3), 1, torch.float32)
    exact = plain(x.bfloat16().double(), weight.double(), bias.double(), "B")
    given_ = [weight.requires_grad_(), bias.requires_grad_()]
    y = masked_conv2d(x.bfloat16(), *given_, mask_type="B")
    assert y.dtype == torch.bfloat16
    assert_bar(y.detach(), exact.detach().bfloat16(), exact.detach())
    assert [g.dtype for g in torch.autograd.grad(y.sum(), given_)] == [torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 8, 3, 0)])
@pytest.mark.parametrize("colors", [1, 2])
def test_nothing(shape, colors):
    x, (_, weight, bias) = torch.zeros(shape, requires_grad=True), tensors((1, 8, 3, 3), 8, (3, 3), 1, torch.float32)
    y = masked_conv2d(x, weight.requires_grad_(), bias, mask_type="B", color_channels=colors)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and weight.grad.shape == weight.shape and not weight.grad.any()


def test_a_kernel_that_sees_nothing_is_the_bias():
    x, weight, bias = tensors((2, 8, 3, 4), 9, (1, 1), 1, torch.float32)
    leaves = [x.requires_grad_(), torch.full_like(weight, math.nan).requires_grad_()]
    y = masked_conv2d(*leaves, bias, mask_type="A")
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.isa
@requires_cpu
@pytest.mark.skipif(not OURS, reason="the library's products are its own")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_time(layout):
    for shape, k, kernel, name, colors in (((3, 48, 33, 35), 96, (3, 3), "B", 3), ((5, 1, 40, 37), 33, (7, 7), "A", 1)):
        given_ = tensors(shape, k, kernel, 1, torch.float32, layout)
        grad = randn(shape[0], k, *shape[2:], seed=4)
        assert_any_threads(
            lambda given_=given_, grad=grad, name=name, colors=colors: gradients(
                lambda *t: masked_conv2d(*t, mask_type=name, color_channels=colors), given_, grad
            )
        )


@pytest.mark.isa
@requires_cpu
@pytest.mark.skipif(not OURS, reason="the library's products are its own")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "k", "height", "width", "atol"), [
    (40, 17, 61, 60, 2e-4), (40, 3, 61, 62, 2e-4), (2, 5, 270, 256, 1e-3)])  # fmt: skip
def test_images_too_large_to_be_staged_together(c, k, height, width, atol, layout, ways):
    """Each gives the same bits alone; the gradient of the weight is the sum of theirs."""
    ways(True)
    x, weight, bias = tensors((3, c, height, width), k, (3, 3), 1, torch.float32, layout)
    grad = randn(3, k, height, width, seed=4)

    def fused(*t: Tensor) -> Tensor:
        return masked_conv2d(*t, mask_type="B")

    y, by_x, by_weight, _ = gradients(fused, [x, weight, bias], grad)
    alone = [gradients(fused, [x[n : n + 1], weight, bias], grad[n : n + 1]) for n in range(3)]
    assert torch.equal(y, torch.cat([found[0] for found in alone]))
    assert torch.equal(by_x, torch.cat([found[1] for found in alone]))
    torch.testing.assert_close(by_weight, sum(found[2] for found in alone), rtol=0, atol=atol)


@requires_cpu
def test_packed_weights_follow_the_weight(ways):
    ways(True)
    x, weight, bias = tensors((1, 8, 5, 6), 16, (3, 3), 1, torch.float32)
    with torch.no_grad():
        before = WEIGHTS.bytes
        first = masked_conv2d(x, weight, bias, mask_type="B")
        size = masked_conv2d_plan(x, weight, mask_type="B").weight_bytes
        assert WEIGHTS.bytes - before == size == 5 * 8 * 16 * 4
        assert torch.equal(masked_conv2d(x, weight, bias, mask_type="B"), first) and WEIGHTS.bytes - before == size
        masked_conv2d(x, weight, bias, mask_type="A")  # another packing of the same weight
        assert WEIGHTS.bytes - before == size + 4 * 8 * 16 * 4
        weight.mul_(2)
        torch.testing.assert_close(masked_conv2d(x, weight, mask_type="B"), plain(x, weight, None, "B"))
        del weight
        assert WEIGHTS.bytes == before


@requires_cpu
def test_the_plan_and_its_reasons(ways):
    ways(True)
    x, weight, _ = tensors((1, 8, 5, 6), 16, (3, 3), 1, torch.float32)
    assert masked_conv2d_plan(x, weight, mask_type="A").packed
    assert "float64" in masked_conv2d_plan(x.double(), weight.double(), mask_type="A").reason
    limit = conv2d_memory_limit(0)
    try:
        plan = masked_conv2d_plan(x, weight, mask_type="A")
        assert not plan.packed and "past the memory limit" in plan.reason
        torch.testing.assert_close(masked_conv2d(x, weight, mask_type="A"), plain(x, weight, None, "A"))
    finally:
        conv2d_memory_limit(limit)


@requires_cpu
def test_groups_of_few_channels_are_the_librarys():
    x, weight, _ = tensors((1, 12, 5, 6), 12, (3, 3), 6, torch.float32)
    plan = masked_conv2d_plan(x, weight, mask_type="A", groups=6)
    assert not plan.packed and (_library.ISA == "portable" or "few channels" in plan.reason)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    given_ = [t.requires_grad_() for t in tensors((2, 8, 5, 6), 16, (3, 3), 1, torch.float32)]
    low = [t.detach().to(dtype) for t in given_]
    with torch.autocast("cpu", dtype):
        y = masked_conv2d(*given_, mask_type="B")
    assert y.dtype == dtype and torch.equal(y, masked_conv2d(*low, mask_type="B"))
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), given_)] == [torch.float32] * 3
    with torch.autocast("cpu", dtype):
        assert masked_conv2d(*(t.double() for t in given_), mask_type="B").dtype == torch.float64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (0, 6, 2, 2), (1, 6, 1, 1)])
def test_fakes(shape, layout):
    compare = assert_registered if shape == (2, 6, 5, 7) and layout == "channels_last" else assert_fake
    given_ = {"shape": shape, "layout": layout}
    compare(ops.masked_conv2d_fwd.default, forward_arguments(**given_))
    compare(ops.masked_conv2d_bwd.default, backward_arguments(**given_))
    compare(ops.masked_conv2d_weight_bwd.default, weight_arguments(**given_))
    for transposed in (False, True):
        compare(ops.masked_conv2d_packed.default, packed_arguments(transposed, **given_))
        for colors in (1, 3):
            compare(ops.masked_conv2d_pack.default, (randn(36, 6, 3, 3), 0, 2, colors, transposed))
    assert_fake(ops.masked_conv2d_bwd.default, backward_arguments((False, True), dtype=torch.float16, **given_))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    given_ = tensors((2, 8, 5, 6), 16, (3, 3), 1, torch.float32, "channels_last")

    def model(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(masked_conv2d(x * 2, weight, bias, mask_type="B")) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    grad = randn(2, 16, 5, 6, seed=9)
    for a, e in zip(gradients(compiled, given_, grad), gradients(model, given_, grad), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("mask_type must be one of .*'horizontal_A'.*, got 'C'", {"mask_type": "C"}),
        (r"weight must be \[K, C / groups, kh, kw\], got shape \(6, 4, 3, 3\) with groups=2 and input of shape", {"groups": 2}),
        (r"weight must be \[K, C / groups, kh, kw\] and not empty, got \(6, 4, 3\)", {"weight": torch.zeros(6, 4, 3)}),
        ("a kernel of an odd height and width for mask_type='A', got 3x2", {"weight": torch.zeros(6, 4, 3, 2)}),
        ("a kernel of an odd width for mask_type='down', got 3x2", {"weight": torch.zeros(6, 4, 3, 2), "mask_type": "down"}),
        (r"bias must have shape \(6,\), got shape \(4,\)", {"bias": torch.zeros(4)}),
        ("bias must be on the device of input", {"bias": torch.zeros(6, device="meta")}),
        ("dilation must be one or two integers of at least 1, got 0", {"dilation": 0}),
        (r"dilation must be one or two integers of at least 1, got \(1, 2, 3\)", {"dilation": (1, 2, 3)}),
        ("color_channels must divide the channels of input and output, got color_channels=3 with C=4 and K=6",
 {"color_channels": 3}),
        (
            "color_channels must be 1 for mask_type='vertical_A', which has no centre to order, got 2",
            {"color_channels": 2, "mask_type": "vertical_A"},
        ),
    ],
)  # fmt: skip
def test_errors(message, options):
    arguments = {"input": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(6, 4, 3, 3), "mask_type": "A", **options}
    with pytest.raises(ValueError, match=f"masked_conv2d: .*{message}"):
        masked_conv2d(**arguments)


def test_errors_of_the_input_and_of_the_mask():
    with pytest.raises(TypeError, match="input must be a floating-point tensor, got list"):
        masked_conv2d([1.0], torch.zeros(1, 1, 1, 1), mask_type="A")
    with pytest.raises(ValueError, match=r"input must be \[N, C, H, W\], got shape \(4, 5, 5\)"):
        masked_conv2d(torch.zeros(4, 5, 5), torch.zeros(6, 4, 3, 3), mask_type="A")
    with pytest.raises(ValueError, match=r"masked_conv2d_mask: weight_shape must be .* got \(4, 2\)"):
        masked_conv2d_mask("A", (4, 2))
