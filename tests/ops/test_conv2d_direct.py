"""`conv2d_direct` and `upsample_conv2d_direct`: convolutions in bfloat16 by matrix tiles. Where there is no matrix unit the
reference answers, and the kernels run in the last test, over emulated tiles."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgen
from fastgen import _library
from fastgen.ops import conv2d, conv2d_plan, upsample_conv2d, upsample_conv2d_plan
from fastgen.ops._convolution_plan import DIRECT, packed_bytes
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.reference import _convolution_direct as reference
from fastgen.reference._convolution import output_strides

from .. import emulated_tiles
from ..backends import requires_checkout, requires_cpu
from .conv2d_cases import OPERANDS, direct_arguments, operands, plain, weight_of, whole_numbers, wide
from .numerics import (
    LAYOUTS,
    assert_any_threads,
    assert_bar,
    assert_registered,
    guarded,
    laid_out,
    poison_allocator,
    randn,
    relative,
    strided,
)

BF16 = torch.bfloat16
KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("fastgen::conv2d_direct", "CPU")
FAMILIES = [("conv2d", 1), ("conv2d", 3), ("upsample_conv2d", 3)]
# [N, C, H, W], K: one pixel, one column, rows shorter and longer than a tile and of whole tiles; channels and outputs that leave
# a block, a panel and a pair of panels part empty.
SHAPES = [
    ((1, 1, 1, 1), 1), ((3, 20, 1, 1), 17), ((2, 3, 5, 7), 5), ((2, 33, 13, 1), 40), ((1, 70, 9, 34), 48), ((2, 32, 16, 16), 64),
    ((1, 320, 4, 6), 16), ((1, 8, 3, 32), 33), ((1, 40, 3, 7), 100),
]  # fmt: skip


def run(family, *args):
    return getattr(torch.ops.fastgen, f"{family}_direct")(*args)


def ones_like(arguments):
    """Of the arguments of the raw op, those that `plain` takes."""
    _, _, _, bias, scale, shift, _, embedding, residual, _, _ = arguments
    return dict(zip(OPERANDS, (bias, scale, shift, embedding, residual), strict=True))


def expected(family, kernel, x, weight, **options):
    return plain(x, weight, padding=kernel // 2, upsample=family != "conv2d", **options)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_values(shape, k, family, kernel, layout):
    weight = weight_of(shape, k, kernel, BF16)
    x, packed, *rest = direct_arguments(shape, k, kernel, weight=weight, family=family)
    x, packed, rest[6] = guarded(laid_out(x, layout)), guarded(packed), guarded(laid_out(rest[6], layout))
    poison_allocator(4 * k * x.numel() // shape[1] * x.element_size())
    actual = run(family, x, packed, *rest)
    given, options = ones_like((x, packed, *rest)), {"activation": "silu", "output_scale": 0.5}
    exact = expected(family, kernel, x.double(), weight.double(), **wide(given), **options)
    assert_bar(actual, expected(family, kernel, x, weight, **given, **options), exact, 0)
    assert relative(actual, reference.direct(x, packed, *rest, 2 if family != "conv2d" else 1)) <= 1e-3
    assert list(actual.stride()) == output_strides(actual.shape, x)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_whole_numbers_are_rounded_once(shape, k, family, kernel, layout):
    """Of which every sum is exact: what is left is the rounding of the output."""
    x, weight = (
        laid_out(whole_numbers(*shape, seed=1).to(BF16), layout),
        whole_numbers(k, shape[1], kernel, kernel, seed=2),
    )
    bias, embedding = whole_numbers(k, seed=3), whole_numbers(shape[0], k, seed=4)
    packed = getattr(torch.ops.fastgen, f"{family}_direct_pack")(weight)
    actual = run(family, x, packed, k, bias, None, None, 0, embedding, None, 1.0, None)
    exact = expected(family, kernel, x.double(), weight.double(), bias=bias.double(), embedding=embedding.double())
    assert torch.equal(actual, exact.to(BF16))


@pytest.mark.isa
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_packed_weights_are_those_of_the_reference(dtype, family, kernel):
    weight = weight_of((1, 35), 37, kernel, dtype)
    for given in (
        weight,
        weight.to(memory_format=torch.channels_last),
        weight.flip(2).flip(2),
        weight[:, ::2],
        weight[:1],
    ):
        packed = getattr(torch.ops.fastgen, f"{family}_direct_pack")(guarded(given))
        scale = 2 if family != "conv2d" else 1
        assert torch.equal(packed, reference.pack(given, scale)) and packed.is_contiguous()
        assert packed.nbytes == packed_bytes(scale, DIRECT, given.shape)
        if scale == 1:
            assert torch.equal(reference.unpack(packed, *given.shape[:2])[0], given.to(BF16))


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [10, 16, 35])
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_nan_and_infinity_reach_what_their_kernels_see(family, kernel, width, value):
    x, packed, k, *rest = direct_arguments((3, 33, 6, width), 24, kernel, 0, family=family)
    rest[1], rest[2] = None, None
    clean = run(family, x, packed, k, *rest)
    for row, column in ((4, 4), (0, 0), (5, width - 1)):
        spoiled = x.clone()
        spoiled[1, 3, row, column] = value
        y = run(family, spoiled, packed, k, *rest)
        seen = torch.zeros(3, 1, *x.shape[2:], dtype=torch.float64)
        seen[1, 0, row, column] = 1
        touched = expected(family, kernel, seen, torch.ones(k, 1, kernel, kernel, dtype=torch.float64)) > 0
        assert not y[touched].isfinite().any()
        assert torch.equal(y[~touched], clean[~touched])


@pytest.mark.isa
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_any_strides(family, kernel, kind):
    size = 2 if family != "conv2d" else 1
    x, packed, *rest = direct_arguments((2, 40, 8, 12), 48, kernel, family=family)
    x, rest[6] = strided(x, kind), strided(randn(2, 48, size * 8, size * 12, dtype=BF16), kind)
    actual = run(family, x, packed, *rest)
    other = run(family, x.contiguous(), packed, *rest[:6], rest[6].contiguous(), *rest[7:])
    assert (
        torch.equal(actual, other) if KERNEL else relative(actual, other) <= 1e-3
    )  # the library's bits follow the layout


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_bits_do_not_depend_on_threads_or_time(family, kernel, layout):
    x, packed, *rest = direct_arguments((2, 80, 37, 29), 72, kernel, family=family)
    x = laid_out(x, layout)
    assert_any_threads(lambda: run(family, x, packed, *rest))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_groups_of_rows_are_one_convolution(layout):
    """Pixels past the bytes of a group: some begin in the middle of a sample, whose bits are those of the sample alone."""
    x, packed, k, bias, scale, shift, activation, embedding, residual, factor, _ = direct_arguments((3, 64, 70, 60), 24)
    x = laid_out(x, layout)
    together = run("conv2d", x, packed, k, bias, scale, shift, activation, embedding, residual, factor, None)
    for i in range(3):
        alone = (t[i : i + 1] for t in (x, scale, shift, embedding, residual))
        x_of, scale_of, shift_of, embedding_of, residual_of = alone
        y = run(
            "conv2d", x_of, packed, k, bias, scale_of, shift_of, activation, embedding_of, residual_of, factor, None
        )
        assert torch.equal(together[i : i + 1], y)


@pytest.mark.isa
def test_no_sample():
    for family, kernel in FAMILIES:
        packed = getattr(torch.ops.fastgen, f"{family}_direct_pack")(weight_of((0, 4), 5, kernel, BF16))
        size = 6 if family != "conv2d" else 3
        y = run(family, torch.zeros(0, 4, 3, 3, dtype=BF16), packed, 5, *(None,) * 3, 0, None, None, 1.0, None)
        assert y.shape == (0, 5, size, size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kernel"), FAMILIES)
def test_fakes(family, kernel, layout):
    x, packed, *rest = direct_arguments((2, 16, 8, 8), 20, kernel, family=family)
    assert_registered(getattr(torch.ops.fastgen, f"{family}_direct").default, (laid_out(x, layout), packed, *rest))
    assert_registered(
        getattr(torch.ops.fastgen, f"{family}_direct_pack").default, (weight_of((1, 6), 4, kernel, BF16),)
    )


def test_plans(monkeypatch):
    """By the table of the variant that has a matrix unit, whichever is loaded."""
    monkeypatch.setattr(_library, "ISA", "amx")
    x, weight = torch.zeros(1, 128, 32, 32, dtype=BF16), torch.zeros(128, 128, 3, 3, dtype=BF16)
    plan = conv2d_plan(x, weight, padding=1)
    assert plan.outputs == DIRECT and "matrix tiles" in plan.algorithm and "times as fast" in plan.reason
    assert plan.weight_bytes == 2 * weight.numel()
    assert upsample_conv2d_plan(x, weight).outputs == DIRECT
    assert conv2d_plan(x.float(), weight.float(), padding=1).outputs in (2, 4)
    with fastgen.set_exact(True):
        assert conv2d_plan(x, weight, padding=1).outputs == DIRECT  # it rounds what the library rounds
        assert upsample_conv2d_plan(x, weight).outputs == 0  # and sums of weights
        assert conv2d_plan(x.half(), weight.half(), padding=1).outputs == 0
    monkeypatch.setattr(_library, "ISA", "avx512_bf16")
    assert conv2d_plan(x, weight, padding=1).outputs != DIRECT


@pytest.mark.skipif(_library.ISA != "amx", reason="the plan takes matrix tiles only where there is a matrix unit")
@pytest.mark.parametrize("op", [conv2d, upsample_conv2d])
def test_the_public_ops_follow_the_weight(op):
    WEIGHTS.clear()
    shape, k, up = (1, 64, 16, 16), 48, op is upsample_conv2d
    x, weight = randn(*shape, dtype=BF16), nn.Parameter(weight_of(shape, k, 3, BF16))
    given, options = operands(shape, k, BF16, 2 if up else 1), {} if up else {"padding": 1}
    for change in (
        lambda: None,
        lambda: weight.mul_(-2),
        lambda: weight[3].fill_(1.0),
        lambda: weight.data.copy_(weight.data.flip(0)),
    ):
        with torch.no_grad():
            change()
            for _ in range(2):
                actual = op(x, weight, **options, **given, activation="silu")
                beside = plain(x, weight, **given, activation="silu", upsample=up)
                exact = plain(x.double(), weight.double(), **wide(given), activation="silu", upsample=up)
                assert_bar(actual, beside, exact, 0)
    assert set(WEIGHTS.find(weight)) == {(2 if up else 1, DIRECT)}
    WEIGHTS.clear()


@pytest.mark.long
@requires_checkout
def test_kernels_over_emulated_tiles(tmp_path):
    library = emulated_tiles.build(tmp_path, "conv2d", "upsample_conv2d", "_product")
    output = emulated_tiles.run_tests(
        library, ["conv2d_direct", "upsample_conv2d_direct"], "-m", "isa", str(Path(__file__))
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) >= 100
