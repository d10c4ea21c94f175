"""`geglu_direct`: the gated linear unit in bfloat16 by matrix tiles. Where there is no matrix unit the reference answers, and the
kernel runs in the last test, over emulated tiles."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen import _library
from fastgen._schema import GELU_APPROXIMATIONS
from fastgen.ops import geglu, geglu_plan
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.reference import geglu as reference

from .. import emulated_tiles
from ..backends import requires_checkout
from .geglu_cases import SHAPES, direct_arguments, plain, tensors
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_registered, guarded, poison_allocator, randn

BF16 = torch.bfloat16
ops = torch.ops.fastgen
# Several blocks of rows (one takes 512 KB of 32 channels at a time), pairs of panels past those that a thread takes at once, one
# tile of rows and one more than a square of them.
LARGE = [(8300, 20, 20), (40, 33, 300), (16, 32, 16), (33, 64, 32)]


@pytest.mark.isa
@pytest.mark.parametrize("approximate", range(len(GELU_APPROXIMATIONS)))
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_values(shape, approximate):
    x, weight, bias = tensors(shape, BF16)
    packed = guarded(ops.geglu_direct_pack(weight))
    for given in (bias, None):
        poison_allocator(shape[0] * shape[2] * 2)
        actual = ops.geglu_direct(x, packed, shape[2], given, approximate)
        name = GELU_APPROXIMATIONS[approximate]
        wide = None if given is None else given.double()
        exact = plain(x.double(), weight.double(), wide, approximate=name)
        assert_bar(actual, plain(x, weight, given, approximate=name), exact, 0)
        assert actual.dtype == BF16 and actual.is_contiguous()


@pytest.mark.isa
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_whole_numbers_are_rounded_once(shape):
    """Gates far out, where GELU is the gate or 0: every sum is exact, and what is left is the rounding of the output."""
    m, c, d = shape
    x, weight = (randn(*size, seed=k).mul(2).round().to(BF16) for k, size in ((1, (m, c)), (2, (2 * d, c))))
    bias = torch.cat(
        [torch.full((d,), 3.0), torch.full((d,), 2.0**13).where(torch.arange(d) % 2 == 0, torch.tensor(-(2.0**13)))]
    )
    actual = ops.geglu_direct(x, ops.geglu_direct_pack(weight), d, bias, 0)
    exact = plain(x.double(), weight.double(), bias.double())
    assert torch.equal(actual, exact.to(BF16))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_the_reference(dtype):
    for rows, channels in ((2, 1), (6, 5), (32, 32), (34, 33), (74, 300)):
        weight = randn(channels, rows, dtype=dtype).t()
        for given in (weight, weight.contiguous(), guarded(weight.contiguous())):
            assert torch.equal(ops.geglu_direct_pack(given), reference.geglu_direct_pack(given))


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stays_in_its_row(value):
    x, weight, bias = tensors((40, 20, 18), BF16)
    clean = ops.geglu_direct(x, ops.geglu_direct_pack(weight), 18, bias, 0)
    x[17, 7] = value
    y = ops.geglu_direct(x, ops.geglu_direct_pack(weight), 18, bias, 0)
    others = torch.arange(40) != 17
    assert not y[17].isfinite().any() and torch.equal(y[others], clean[others])
    x[17, 7], weight[5, 3] = 0, math.nan
    y = ops.geglu_direct(x, ops.geglu_direct_pack(weight), 18, bias, 0)
    others = torch.arange(18) != 5
    assert y[:, 5].isnan().all() and torch.equal(y[others.expand(40, 18)].reshape(40, 17)[:17], clean[:17, others])


@pytest.mark.isa
def test_strides():
    x, weight, bias = tensors((37, 40, 20), BF16)
    packed = ops.geglu_direct_pack(weight)
    expected = ops.geglu_direct(x, packed, 20, bias, 0)
    wide = torch.full((37, 100), math.nan, dtype=BF16)
    wide[:, 3:83:2] = x
    for given in (torch.cat([x, x], 1)[:, :40], x.t().contiguous().t(), wide[:, 3:83:2], x.flip(0).flip(0)):
        torch.testing.assert_close(ops.geglu_direct(given, packed, 20, bias, 0), expected, rtol=1e-2, atol=1e-3)
    apart = torch.stack([bias, bias], -1)[:, 0]
    assert torch.equal(ops.geglu_direct(x, packed, 20, apart, 0), expected)
    one = ops.geglu_direct(x[:1].expand(37, 40), packed, 20, bias, 0)
    torch.testing.assert_close(one, expected[:1].expand(37, 20), rtol=1e-2, atol=1e-3)


@pytest.mark.isa
def test_bits_do_not_depend_on_threads_or_time():
    x, weight, bias = tensors((300, 50, 150), BF16)
    packed = ops.geglu_direct_pack(weight)
    assert_any_threads(lambda: ops.geglu_direct(x, packed, 150, bias, 0))


@pytest.mark.isa
def test_no_row():
    _, weight, bias = tensors((1, 6, 3), BF16)
    assert ops.geglu_direct(torch.zeros(0, 6, dtype=BF16), ops.geglu_direct_pack(weight), 3, bias, 0).shape == (0, 3)


def test_fakes():
    x, packed, features, bias, approximate = direct_arguments()
    assert_registered(ops.geglu_direct.default, (x, packed, features, bias, approximate))
    assert_registered(ops.geglu_direct_pack.default, (tensors((5, 6, 3), BF16)[1],))


@pytest.mark.skipif(_library.ISA != "amx", reason="the plan takes matrix tiles only where there is a matrix unit")
def test_the_public_op_takes_tiles_and_follows_the_weight():
    WEIGHTS.clear()
    x, weight, bias = tensors((5, 40, 18), BF16)
    weight = nn.Parameter(weight.clone())
    with torch.no_grad():
        for _ in range(2):
            assert_bar(
                geglu(x, weight, bias), plain(x, weight, bias), plain(*(t.double() for t in (x, weight, bias))), 0
            )
            weight.mul_(-1.5)
        geglu(x, weight)
        plan = geglu_plan(x, weight.detach())
        assert plan.packed and "matrix tiles" in plan.reason and WEIGHTS.bytes == plan.weight_bytes == 2 * 2 * 32 * 64
    WEIGHTS.clear()


@pytest.mark.long
@requires_checkout
def test_kernel_over_emulated_tiles(tmp_path):
    library = emulated_tiles.build(tmp_path, "geglu", "_product")
    output = emulated_tiles.run_tests(library, ["geglu_direct", "geglu_direct_pack"], "-m", "isa", str(Path(__file__)))
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) >= 40
