"""`philox_normal`: known answers, distribution, independence of batch, position and threads, errors."""

import pytest
import torch
from scipy import stats

from fastgen.ops import philox_normal
from fastgen.ops.philox_normal import INITIAL_NOISE_STEP
from fastgen.reference import _philox
from fastgen.reference import philox_normal as reference

from ..backends import requires_cpu
from .numerics import assert_any_threads, assert_registered

SEEDS = [0, 1, 42, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]


def signed(seeds: list[int]) -> torch.Tensor:
    return torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], dtype=torch.int64)


# The vectors of Random123's kat_vectors file, "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, answer):
    def words(text):
        return [torch.tensor(int(word, 16)) for word in text.split()]

    assert [int(w) for w in _philox.philox_4x32(words(counter), words(key))] == [int(w) for w in words(answer)]


def test_counter_and_key_of_an_element():
    """Block 0 of seed 0 at step 0 is the first known answer: the words reach the normals in the order promised."""
    r = [torch.tensor(w) for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    expected = torch.stack([*_philox.box_muller(r[0], r[1]), *_philox.box_muller(r[2], r[3])])
    torch.testing.assert_close(philox_normal([0], (1, 4), 0)[0].double(), expected, rtol=5e-7, atol=5e-10)


@pytest.mark.isa
@pytest.mark.parametrize("step", [INITIAL_NOISE_STEP, -2, 0, 1, 999, 2**31, 2**32 - 2, -(2**31)])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (3, 17, 13), (1, 1031), (4, 64, 64)])
def test_values(shape, step):
    shape = (len(SEEDS), *shape)
    actual, exact = philox_normal(SEEDS, shape, step), reference.philox_normal(signed(SEEDS), shape, step)
    assert actual.shape == shape and actual.dtype == torch.float32 and actual.is_contiguous()
    error = (actual.double() - exact.double()).abs() / exact.double().abs().clamp_min(1e-3)
    assert error.max() <= 5e-7


@pytest.mark.isa
@pytest.mark.parametrize(("seed", "step"), [(0, -1), (2024, 0), (2**63 + 12345, 17)])
def test_distribution(seed, step):
    """A million fixed normals: every moment within five of its standard deviations, and Kolmogorov-Smirnov."""
    n = 10**6
    z = philox_normal([seed], (1, n), step)[0].double()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4.2 < z.abs().max() < 6.8
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4, 8):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / n**0.5, lag


@pytest.mark.isa
def test_neighbouring_seeds_and_steps_are_not_correlated():
    n = 200_000
    seeds = [0, 1, 2, 2**32, 2**63]
    rows = torch.cat([philox_normal(seeds, (5, n), step).double() for step in (-2, -1, 0, 1)])
    correlation = rows @ rows.T / n - torch.eye(len(rows), dtype=torch.float64)
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / n**0.5


@pytest.mark.isa
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 31, 32, 33, 63, 65, 127, 1000, 4097])
def test_prefix(size):
    """An element's value does not depend on how many follow it: a vector's tail takes the bits of its body."""
    whole = philox_normal(SEEDS, (len(SEEDS), 5000), 3)
    assert torch.equal(philox_normal(SEEDS, (len(SEEDS), size), 3), whole[:, :size])


@pytest.mark.isa
def test_batch_and_position():
    shape = (3, 19, 11)
    whole = philox_normal(SEEDS, (len(SEEDS), *shape), 5)
    for i, seed in enumerate(SEEDS):
        assert torch.equal(philox_normal([seed], (1, *shape), 5)[0], whole[i])
    order = list(reversed(range(len(SEEDS))))
    assert torch.equal(philox_normal([SEEDS[i] for i in order], (len(SEEDS), *shape), 5), whole[order])
    twice = philox_normal([7, 7], (2, *shape), 5)
    assert torch.equal(twice[0], twice[1])
    assert torch.equal(philox_normal(SEEDS, (len(SEEDS), 19, 33), 5).flatten(1), whole.flatten(1))


@pytest.mark.isa
def test_seeds_are_64_bits():
    """Signed and unsigned names of the same bits agree; every half of the seed and the step count."""
    for unsigned in (2**63, 2**63 + 5, 2**64 - 1):
        assert torch.equal(philox_normal([unsigned], (1, 9)), philox_normal([unsigned - 2**64], (1, 9)))
    values = philox_normal([0, 1, 2**31, 2**32, 2**62, 2**63], (6, 9))
    assert len({tuple(row.tolist()) for row in values}) == 6
    steps = [philox_normal([3], (1, 9), step) for step in (-(2**31), -2, -1, 0, 1, 2**31 - 1)]
    assert len({tuple(row[0].tolist()) for row in steps}) == 6


def test_seeds_as_a_tensor():
    expected = philox_normal(SEEDS, (len(SEEDS), 10), 2)
    assert torch.equal(philox_normal(signed(SEEDS), (len(SEEDS), 10), 2), expected)
    strided = torch.stack([signed(SEEDS), torch.zeros(len(SEEDS), dtype=torch.int64)], dim=1)[:, 0]
    assert torch.equal(philox_normal(strided, torch.Size((len(SEEDS), 10)), 2), expected)
    assert torch.equal(philox_normal(tuple(SEEDS), [len(SEEDS), 10], 2, device="cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_a_cast(dtype):
    z = philox_normal([1, 2], (2, 3, 5), 4, dtype=dtype)
    assert z.dtype == dtype and torch.equal(z, philox_normal([1, 2], (2, 3, 5), 4).to(dtype))


@pytest.mark.isa
def test_range_of_step():
    """Negative steps count from the end of the 32-bit range."""
    for step in (-1, -2, -(2**31)):
        assert torch.equal(philox_normal([9], (1, 8), step), philox_normal([9], (1, 8), step + 2**32))
    assert torch.equal(philox_normal([9], (1, 8)), philox_normal([9], (1, 8), -1))
    for step in (2**32, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"step must be in \[-2\^31, 2\^32\), got {step}"):
            philox_normal([9], (1, 8), step)


@pytest.mark.parametrize(
    ("seeds", "shape"), [([], (0,)), ([], (0, 3)), ([1], (1, 0)), ([1, 2], (2, 3, 0)), ([], (0, 0))]
)
def test_nothing(seeds, shape):
    z = philox_normal(seeds, shape, 0)
    assert z.shape == shape and z.dtype == torch.float32
    assert reference.philox_normal(signed(seeds), shape, 0).shape == shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("shape", [(3, 100_003), (10, 77), (1, 300_001)])
def test_bits_do_not_depend_on_threads(shape):
    assert_any_threads(lambda: philox_normal(range(shape[0]), shape, 1))


def test_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first = philox_normal([5], (1, 100))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(philox_normal([5], (1, 100)), first)


@pytest.mark.parametrize(("seeds", "shape"), [([1, 2], (2, 3, 5)), ([2**63], (1,)), ([], (0, 4)), ([3], (1, 0))])
def test_opcheck(seeds, shape):
    assert_registered(torch.ops.fastgen.philox_normal.default, (signed(seeds), list(shape), 3))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"seeds must be integers of at most 64 bits, got \[1.5\]", ([1.5], (1, 2)), {}),
        (TypeError, "integers of at most 64 bits", ([2**64], (1, 2)), {}),
        (TypeError, "integers of at most 64 bits", ([-(2**63) - 1], (1, 2)), {}),
        (TypeError, "int64 tensor or a list of integers, got torch.float32", (torch.zeros(1), (1, 2)), {}),
        (TypeError, "int64 tensor .* got torch.int32", (torch.zeros(1, dtype=torch.int32), (1, 2)), {}),
        (ValueError, r"seeds must be one-dimensional, got shape \(1, 1\)", (torch.zeros(1, 1).long(), (1, 2)), {}),
        (ValueError, r"N = len\(seeds\) = 2, got \(3, 4\)", ([1, 2], (3, 4)), {}),
        (ValueError, r"shape must be \[N, \*\] .* got \(\)", ([], ()), {}),
        (ValueError, r"shape must be .* got \(1, -1\)", ([1], (1, -1)), {}),
        (TypeError, "dtype must be floating-point, got torch.int64", ([1], (1, 2)), {"dtype": torch.int64}),
    ],
)
def test_errors(error, message, arguments, options):
    with pytest.raises(error, match=f"philox_normal: .*{message}"):
        philox_normal(*arguments, **options)
