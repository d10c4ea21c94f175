"""`philox_normal`: the generator's known answers, its normals, and what they may depend on."""

import math

import pytest
import torch
from scipy import stats

from fastgen.ops import philox_normal
from fastgen.reference import philox_normal as reference

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (*PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_philox(counter, key, words):
    """The vectors that Random123 ships."""
    actual = reference.philox_4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(w) for w in actual] == words


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5), (3, 63), (3, 64), (3, 65), (3, 3, 7, 11), (3, 10007)])
@pytest.mark.parametrize("step", [0, 5, -1, 2**32 - 1])
def test_kernel_equals_reference(shape, step):
    seeds = torch.tensor([1, -5, 2**40 + 3])
    actual, exact = philox_normal(seeds, shape, step), reference.philox_normal(seeds, shape, step).double()
    error = (actual.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert actual.shape == shape and actual.is_contiguous() and error.max() <= 5e-7


@pytest.mark.isa
def test_extreme_words_stay_finite():
    """The conversion alone at the ends of its range: u is never 0, and 1 gives a radius of 0."""
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    z0, z1 = reference.box_muller(words, words.flip(0))
    assert z0.isfinite().all() and z1.isfinite().all()
    assert math.isclose(math.hypot(z0[0], z1[0]), math.sqrt(-2 * math.log(0.5 / 2**32)), rel_tol=1e-9)


@pytest.mark.isa
def test_normals_are_normal():
    z = philox_normal([20261120], (1, 1_000_000), 0)[0].double()
    assert (
        abs(z.mean()) < 4e-3 and abs(z.var() - 1) < 6e-3 and abs((z**3).mean()) < 1e-2 and abs((z**4).mean() - 3) < 3e-2
    )
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4):  # lanes of a block, and blocks
        assert abs((z[:-lag] * z[lag:]).mean()) < 4e-3
    assert 4.5 < z.abs().max() < 6.7


@pytest.mark.isa
def test_a_sample_depends_on_its_seed_and_step_alone():
    seeds = [3, 2**63 + 7, -1, 12]
    batch = philox_normal(seeds, (4, 1001), 2)
    for i, seed in enumerate(seeds):
        assert torch.equal(philox_normal([seed], (1, 1001), 2)[0], batch[i])
    assert torch.equal(philox_normal(seeds, (4, 37), 2), batch[:, :37])  # a prefix, not another draw
    assert torch.equal(philox_normal(seeds, (4, 7, 11, 13), 2).flatten(1), batch)
    assert len({float(philox_normal([1], (1, 1), step)) for step in range(-3, 5)}) == 8
    assert torch.equal(philox_normal([2**64 - 1], (1, 9), 0), philox_normal([-1], (1, 9), 0))


@pytest.mark.isa
def test_bits_do_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(philox_normal([1, 2, 3], (3, 50_001), 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_dtypes_and_nothing():
    z = philox_normal([1], (1, 100), 0)
    assert torch.equal(philox_normal([1], (1, 100), 0, dtype=torch.float64), z.double())
    assert torch.equal(philox_normal([1], (1, 100), 0, dtype=torch.bfloat16), z.bfloat16())
    assert philox_normal([], (0, 5)).shape == (0, 5) and philox_normal([1], (1, 0)).shape == (1, 0)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastgen.philox_normal.default, (torch.tensor([1, 2]), [2, 3, 5], 1))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "seeds must be integers of at most 64 bits", ([1.5], (1, 2))),
        (TypeError, "seeds must be integers of at most 64 bits", ([2**64], (1, 2))),
        (TypeError, "int64 tensor", (torch.tensor([1.0]), (1, 2))),
        (ValueError, "one-dimensional", (torch.tensor([[1]]), (1, 2))),
        (ValueError, r"shape must be \[N, \*\] with N = len\(seeds\) = 2", ([1, 2], (3, 4))),
        (ValueError, "shape must be", ([1], (1, -4))),
        (ValueError, "step must be in", ([1], (1, 2), 2**32)),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        philox_normal(*arguments)
    with pytest.raises(TypeError, match="dtype must be floating-point"):
        philox_normal([1], (1, 2), dtype=torch.int32)
