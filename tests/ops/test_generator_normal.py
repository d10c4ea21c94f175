"""The kernel of `generator_normal` against torch itself: numbers, and the bytes of the state that it leaves."""

import sys

import pytest
import torch
from torch import Tensor

from fastgen import _library
from fastgen.reference import generator_normal as reference

from ..backends import requires_cpu
from .generator_normal_cases import DRAWN, corners, state, state_that_draws, states, units_off
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_fake, poison_allocator

ops = sys.modules["fastgen.ops.generator_normal"]
# How the torch under test rounds the angles of float32: the first use finds out in the same way.
WIDE = min((False, True), key=lambda wide: ops._distance(torch.float32, wide))
SIZES = [*range(16, 41), 47, 48, 63, 64, 65, 623, 624, 625, 640, 1248, 1250, 2501, 4099]


def by_torch(before: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """torch's normals, and the state it leaves."""
    generator = torch.Generator()
    generator.set_state(before)
    return torch.randn(shape, generator=generator, dtype=dtype), generator.get_state()


def assert_as_torch(before: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    normals, after = torch.ops.fastgen.generator_normal(before, shape, dtype, WIDE)
    expected, expected_after = by_torch(before, shape, dtype)
    assert torch.equal(after, expected_after)
    assert normals.shape == expected.shape and normals.dtype == dtype and normals.is_contiguous()
    assert units_off(normals, expected) <= 4


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DRAWN)
def test_numbers_and_state(dtype):
    """Every size, from the beginning and the end of a block of 624 words and between, with a spare normal and without."""
    for size in SIZES:
        for drawn in (0, 1, 5, 607, 623, 624):
            assert_as_torch(state(size, drawn, spare=size % 2 == 1), (size,), dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DRAWN)
def test_a_million_and_three(dtype):
    assert_as_torch(state(7, drawn=17), (2**20 + 3,), dtype)


@pytest.mark.isa
def test_the_hardest_words():
    """Radii from 0 to the greatest, angles at and beside each eighth of a turn."""
    words = corners()
    for first in range(0, len(words), 608):
        chosen = words[first : first + 608]
        assert_as_torch(state_that_draws(chosen), (len(chosen),), torch.float32)


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(16,), (1, 16), (4, 2, 2), (2, 3, 5, 7), (1, 1, 17), (3, 100)])
def test_any_shape(shape):
    assert_as_torch(state(3, 4), shape, torch.float32)


@requires_cpu
@pytest.mark.skipif(
    _library.ISA == "portable"
    or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    or not torch.__version__.startswith("2.13."),
    reason="torch's own bits come of its vectors with fused multiply-adds, as torch 2.13 is compiled",
)
def test_the_bits_are_torchs_own():
    """Not within a few units: the images of a seed are those of before. In float64 torch calls libm, which rounds otherwise."""
    for before, size in ((state(1), 2**20 + 3), (state_that_draws(corners()[:608]), 608)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            normals, _ = torch.ops.fastgen.generator_normal(before, (size,), dtype, WIDE)
            bits = torch.int32 if dtype == torch.float32 else torch.int16  # a zero has two
            assert torch.equal(normals.view(bits), by_torch(before, (size,), dtype)[0].view(bits))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DRAWN)
def test_the_bar_of_the_numerics(dtype):
    """Against float64, of the angle as it is rounded."""
    before = state(11, 3)
    actual, _ = torch.ops.fastgen.generator_normal(before, (20_011,), dtype, WIDE)
    exact, _ = reference.generator_normal(before, (20_011,), dtype, WIDE)
    assert_bar(actual, by_torch(before, (20_011,), dtype)[0], exact.double())


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_state_a_sample(dtype):
    before, shape = states(1, 2, 2**63 + 5, 4), (4, 5, 67)
    normals, after = torch.ops.fastgen.generator_normal(before, shape, dtype, WIDE)
    for i, row in enumerate(before):
        alone, left = torch.ops.fastgen.generator_normal(row.clone(), shape[1:], dtype, WIDE)
        assert torch.equal(normals[i], alone) and torch.equal(after[i], left)


@pytest.mark.isa
def test_states_anywhere_in_memory():
    """At any byte, in rows with something between them; and they are read alone."""
    before = states(1, 2, 3)
    wide = torch.full((3, 5056 + 13), 255, dtype=torch.uint8)
    wide[:, 7:-6] = before
    expected = torch.ops.fastgen.generator_normal(before, (3, 70), torch.float32, WIDE)
    for given, wanted in ((wide[:, 7:-6], expected), (before[:1].expand(3, 5056), None)):
        copy = given.clone()
        found = torch.ops.fastgen.generator_normal(given, (3, 70), torch.float32, WIDE)
        wanted = wanted or torch.ops.fastgen.generator_normal(copy.contiguous(), (3, 70), torch.float32, WIDE)
        assert torch.equal(given, copy)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300_001,), (3, 70_003), (16, 2048), (5, 16_384)])
def test_bits_do_not_depend_on_threads(shape, dtype):
    """One state and one a sample; as many samples as threads, fewer and more."""
    one, each = state(5, 600), states(*range(shape[0])) if len(shape) > 1 else state(6, 1)
    for before in (one, each):
        assert_any_threads(lambda before=before: torch.ops.fastgen.generator_normal(before, shape, dtype, WIDE))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DRAWN)
def test_everything_is_written(dtype):
    for size in (16, 17, 31, 4099):
        poison_allocator(size * dtype.itemsize)
        normals, after = torch.ops.fastgen.generator_normal(state(1), (size,), dtype, WIDE)
        assert normals.isfinite().all() and torch.equal(after, by_torch(state(1), (size,), dtype)[1])


@pytest.mark.parametrize(
    ("before", "shape"), [(state(1), [17]), (state(1, 3), [2, 5, 7]), (states(1, 2), [2, 16]), (states(4), [1, 33])]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(before, shape, dtype):
    assert_fake(torch.ops.fastgen.generator_normal.default, (before, shape, dtype, True))


def spoiled_state(left: int, following: int) -> Tensor:
    spoiled = state(1)
    spoiled[8:12].view(torch.int32).fill_(left)
    spoiled[16:24].view(torch.int64).fill_(following)
    return spoiled


@requires_cpu
@pytest.mark.parametrize(("left", "following"), [(0, 0), (-1, 3), (2, 624), (400, 3), (624, 1 + 2**32)])
def test_a_state_that_torch_never_leaves_is_refused(left, following):
    with pytest.raises(
        RuntimeError, match=rf"states\[0\] must be as torch leaves it: .* got left = {left}, next = {following}"
    ):
        torch.ops.fastgen.generator_normal(spoiled_state(left, following), (16,), torch.float32, False)
