"""`generator_normal` as it is called: generators and lists of them, threads, and where torch draws itself."""

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

from fastgen.ops import generator_normal

from ..backends import requires_cpu
from .generator_normal_cases import DRAWN, units_off
from .numerics import DTYPES

ops = sys.modules["fastgen.ops.generator_normal"]
LEAST = ops.LEAST


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
    with pytest.raises((RuntimeError, NotImplementedError), match="Long"):  # which of the two is torch's affair
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
