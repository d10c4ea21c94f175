"""`generator_normal` against torch itself: numbers, and the bytes of every generator's state; threads, lists, fallbacks, errors."""

import math
import os
import re
import signal
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastgen import _library
from fastgen.ops import generator_normal
from fastgen.reference import generator_normal as reference

from ..backends import requires_cpu
from .generator_normal_cases import DRAWN, corners, state, state_that_draws, states
from .numerics import DTYPES, assert_any_threads, assert_bar, assert_fake, poison_allocator

ops = sys.modules["fastgen.ops.generator_normal"]
LEAST = ops.LEAST
# How the torch under test rounds the angles of float32: the first use finds out in the same way.
WIDE = min((False, True), key=lambda wide: ops._distance(torch.float32, wide))
SIZES = [*range(16, 41), 47, 48, 63, 64, 65, 623, 624, 625, 640, 1248, 1250, 2501, 4099]


def units_off(actual: Tensor, expected: Tensor) -> float:
    """The largest error in units in the last place of each number expected; one under 2^-16 counts as that.

    There, at whole quarters of a turn, sine or cosine is 1e-7, and torch's own vectors and scalar code are 8 units apart.
    """
    error = (actual.double() - expected.double()).abs()
    kind = torch.finfo(expected.dtype)
    least = max(2.0**-16, kind.smallest_normal)
    return float((error / (kind.eps * 2.0 ** expected.double().abs().clamp_min(least).log2().floor())).max())


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


# --- the public function ---


def twins(seed: int = 3, count: int = 1) -> list[list[torch.Generator]]:
    """Two lists of generators in the same states."""
    return [[torch.Generator().manual_seed(seed + k) for k in range(count)] for _ in range(2)]


def rows(shape: tuple[int, ...], generators: list[torch.Generator], dtype: torch.dtype) -> Tensor:
    """As diffusers' `randn_tensor` draws from a list."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_as_torch_draws_it(dtype):
    (ours,), (theirs,) = twins()
    for size in (*range(41), LEAST - 1, LEAST, LEAST + 1, 3 * LEAST + 5):
        actual, expected = (
            generator_normal((size,), ours, dtype=dtype),
            torch.randn(size, generator=theirs, dtype=dtype),
        )
        assert actual.shape == (size,) and actual.dtype == dtype
        assert size == 0 or units_off(actual, expected) <= 4
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.isa
def test_draws_of_ours_and_of_torchs_in_turn():
    (ours,), (theirs,) = twins()
    others = [
        lambda g: torch.randn(3, generator=g),  # leaves a spare normal, which ours carries along
        lambda g: torch.rand(611, generator=g),
        lambda g: torch.randint(0, 9, (5,), generator=g),
        lambda g: torch.randn(2, generator=g, dtype=torch.float64),
        lambda g: torch.randperm(700, generator=g),
        lambda g: torch.empty(5, dtype=torch.float64).exponential_(generator=g),
    ]
    for i, other in enumerate(others * 3):
        assert torch.equal(other(ours), other(theirs))
        shape, dtype = (3, LEAST + 17 * i), DTYPES[i % 4]
        expected = torch.randn(shape, generator=theirs, dtype=dtype)
        assert units_off(generator_normal(shape, ours, dtype=dtype), expected) <= 4
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (3, LEAST + 5), (3, 4, 50, 50), (1, LEAST), (3, 0)])
def test_lists_of_generators(shape, dtype):
    ours, theirs = twins(count=shape[0])
    actual, expected = generator_normal(shape, ours, dtype=dtype), rows(shape, theirs, dtype)
    assert actual.shape == shape and (0 in shape or units_off(actual, expected) <= 4)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_of_one_counts_as_one(container):
    (ours,), (theirs,) = twins()
    actual = generator_normal((3, LEAST), container([ours]))
    assert units_off(actual, torch.randn(3, LEAST, generator=theirs)) <= 4


@pytest.mark.isa
@pytest.mark.parametrize("size", [5, LEAST + 3])
def test_a_generator_that_is_named_twice_goes_on(size):
    (a, b), (c, d) = twins(count=2)
    actual, expected = generator_normal((3, size), [a, b, a]), rows((3, size), [c, d, c], torch.float32)
    assert units_off(actual, expected) <= 4 and not torch.equal(actual[0], actual[2])
    assert torch.equal(a.get_state(), c.get_state()) and torch.equal(b.get_state(), d.get_state())


@pytest.fixture
def default_generator():
    """torch's default generator, put back afterwards."""
    before = torch.get_rng_state()
    yield torch.default_generator
    torch.set_rng_state(before)


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(7,), (2, LEAST)])
def test_the_default_generator(default_generator, shape):
    for generator in (None, default_generator):
        torch.manual_seed(5)
        expected, state_after = torch.randn(shape), torch.get_rng_state()
        torch.manual_seed(5)
        assert units_off(generator_normal(shape, generator), expected) <= 4
        assert torch.equal(torch.get_rng_state(), state_after)


@requires_cpu
def test_a_draw_by_another_thread_meanwhile_is_noticed(default_generator, monkeypatch):
    """It comes first, and ours is drawn again after it: both as if they had waited for each other."""
    torch.manual_seed(5)
    expected = [torch.rand(1), torch.randn(LEAST)]
    kernel, others = ops._kernel, []

    def interrupted(*arguments):
        if not others:
            others.append(torch.rand(1))
        return kernel(*arguments)

    monkeypatch.setattr(ops, "_kernel", interrupted)
    torch.manual_seed(5)
    actual = generator_normal((LEAST,))
    assert torch.equal(others[0], expected[0]) and units_off(actual, expected[1]) <= 4


def test_threads_that_share_a_generator_do_not_share_numbers():
    (ours,), (theirs,) = twins()
    drawn: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(generator_normal((LEAST,), ours) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [torch.randn(LEAST, generator=theirs) for _ in range(80)]
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert units_off(*(torch.stack(sorted(found, key=lambda t: t[0].item())) for found in (drawn, expected))) <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_draws():
    """The child has the lock as the fork found it, but not the thread that would release it."""
    with ops._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends a child that waits for ever
            torch.set_num_threads(
                1
            )  # after a parallel region of the parent the child has no other threads, as with torch
            os._exit(0 if generator_normal((LEAST,)).isfinite().all() else 1)
    assert os.waitpid(child, 0)[1] == 0


# --- where torch draws ---


@pytest.fixture
def forgetful():
    """What the first use finds is found again, and afterwards forgotten."""
    ops._verdict.cache_clear()
    yield
    ops._verdict.cache_clear()


@requires_cpu
def test_the_kernel_is_what_draws(monkeypatch):
    called = []
    monkeypatch.setattr(ops, "_kernel", lambda *a, kernel=ops._kernel: called.append(a[1]) or kernel(*a))
    for shape, generators in (((LEAST,), 1), ((3, LEAST), 1), ((3, LEAST), 3), ((3, LEAST - 1), 3), ((LEAST - 1,), 1)):
        generator_normal(shape, twins(count=generators)[0])
    assert called == [(LEAST,), (3, LEAST), (3, LEAST)]
    assert [dtype for dtype in DTYPES if not ops.reasons(dtype)] == list(DRAWN)


def other_bytes(states, shape, dtype, wide_angle):
    """As if torch had grown its state."""
    return torch.ops.fastgen.generator_normal.default(
        torch.cat([states, states.new_zeros(8)]), shape, dtype, wide_angle
    )


def other_numbers(states, shape, dtype, wide_angle):
    normals, after = torch.ops.fastgen.generator_normal.default(states, shape, dtype, wide_angle)
    return normals + 8 * torch.finfo(dtype).eps * normals, after


def other_numbers_of_halves(states, shape, dtype, wide_angle):
    return (other_numbers if dtype.itemsize == 2 else torch.ops.fastgen.generator_normal.default)(
        states, shape, dtype, wide_angle
    )


def other_end(states, shape, dtype, wide_angle):
    normals, after = torch.ops.fastgen.generator_normal.default(states, shape, dtype, wide_angle)
    return normals, after.roll(1)


def nan(states, shape, dtype, wide_angle):
    normals, after = torch.ops.fastgen.generator_normal.default(states, shape, dtype, wide_angle)
    return normals * math.nan, after


@requires_cpu
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (other_bytes, "the kernel cannot read the generators of torch .*: generator_normal: states must be uint8"),
        (other_numbers, r"torch .* draws other float32 normals than the kernel, \d+ units in the last place off"),
        (other_end, "torch .* draws other float32 normals than the kernel, or leaves another state"),
        (nan, "torch .* draws other float32 normals than the kernel, or leaves another state"),
    ],
)
def test_another_torch_draws_itself(monkeypatch, forgetful, kernel, reason):
    monkeypatch.setattr(ops, "_kernel", kernel)
    (found,) = ops.reasons(torch.float32)
    assert re.search(reason, found)
    ours, theirs = twins(count=2)
    assert torch.equal(generator_normal((2, LEAST), ours), rows((2, LEAST), theirs, torch.float32))
    assert torch.equal(generator_normal((2, LEAST), ours[0]), torch.randn(2, LEAST, generator=theirs[0]))


@requires_cpu
def test_a_dtype_at_a_time(monkeypatch, forgetful):
    """An older torch draws the low-precision dtypes in another way, the others alike."""
    monkeypatch.setattr(ops, "_kernel", other_numbers_of_halves)
    assert ops.reasons(torch.float32) == ops.reasons(torch.float64) == []
    assert all(len(ops.reasons(dtype)) == 1 for dtype in (torch.bfloat16, torch.float16)) and len(ops.reasons()) == 2


def test_other_dtypes_are_torchs():
    (ours,), (theirs,) = twins()
    expected = torch.randn(LEAST, generator=theirs, dtype=torch.complex64)
    assert torch.equal(generator_normal((LEAST,), ours, dtype=torch.complex64), expected)
    with pytest.raises((RuntimeError, NotImplementedError)):
        generator_normal((LEAST,), ours, dtype=torch.int64)


def test_fake_tensors_are_torchs():
    (ours,), (theirs,) = twins()
    with FakeTensorMode():
        assert generator_normal((2, LEAST), ours).shape == (2, LEAST)
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert generator_normal((2, LEAST), device="meta").device.type == "meta"


def test_vmap_is_asked_what_it_wants():
    """As torch.randn: an error, or numbers that differ or not, by its argument."""

    def noisy(x):
        return x + generator_normal((LEAST,))

    noisy(torch.zeros(1))  # the first use is behind it

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(noisy)(torch.zeros(2, 1))
    different = torch.vmap(noisy, randomness="different")(torch.zeros(2, 1))
    assert not torch.equal(different[0], different[1])


def test_under_the_compiler(default_generator):
    compiled = torch.compile(lambda x: x + generator_normal((2, LEAST)), backend="eager", fullgraph=True)
    torch.manual_seed(1)
    expected = 1 + torch.randn(2, LEAST)
    torch.manual_seed(1)
    assert torch.equal(compiled(torch.ones(1)), expected)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "generator must be a torch.Generator or a list of them, got 5", ((2, 3), 5)),
        (TypeError, r"generator must be a torch.Generator or a list of them, got \[None\]", ((2, 3), [None])),
        (ValueError, r"generator must be one, or one a sample \(3\), got 2", ((3, 4), twins(count=2)[0])),
        (ValueError, r"generator must be one, or one a sample \(1\), got 2", ((), twins(count=2)[0])),
        (ValueError, r"generator must be one, or one a sample \(3\), got 0", ((3, 4), [])),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=f"generator_normal: {message}"):
        generator_normal(*arguments)
