"""`categorical_sample`: the levels of the reference, their distribution, what a draw depends on, and errors."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.ops import categorical_sample
from fastgen.reference import _philox, _sampling

from .categorical_sample_cases import NEAR, OPTIONS, assert_drawn, margin, seeds_of
from .numerics import (
    DTYPES,
    LAYOUTS,
    PLACES,
    STRIDES,
    assert_any_threads,
    assert_fake,
    assert_registered,
    chi_square,
    guarded,
    laid_out,
    place,
    randn,
    strided,
)


def named(option: str) -> dict:
    temperature, top_k, top_p = OPTIONS[option]
    return {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}


def check(logits: Tensor, option: str, element: int = 0, step: int = 0) -> None:
    seeds = seeds_of(logits.shape[0])
    arguments = {"seeds": seeds, "element": element, "step": step, **named(option)}
    drawn, log_probs = categorical_sample(logits, **arguments, return_log_prob=True)
    assert_drawn(drawn, logits, seeds, element, step, OPTIONS[option])
    assert drawn.is_contiguous() and torch.equal(categorical_sample(logits, **arguments), drawn)
    wide = logits.dtype == torch.float64
    assert log_probs.dtype == (torch.float64 if wide else torch.float32) and log_probs.is_contiguous()
    if drawn.numel():
        exact = torch.log_softmax(logits.double(), 1).gather(1, drawn[:, None])[:, 0]
        # half a unit of the difference to the largest logit, and of the logarithm
        rounding = 1e-14 if wide else 2e-7
        torch.testing.assert_close(log_probs.double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(dtype, option, layout):
    check(place((3 * randn(3, 37, 5, 7)).to(dtype), layout), option, element=11, step=3)


@pytest.mark.isa
@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 256, 1000])
@pytest.mark.parametrize("option", OPTIONS)
def test_any_number_of_levels(option, count):
    for dtype in (torch.float32, torch.bfloat16):
        check(guarded((2 * randn(20, count)).to(dtype)), option)
        check(guarded((2 * randn(20, count)).round().to(dtype)), option)  # many are equal


@pytest.mark.isa
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(PLACES),
    option=st.sampled_from(list(OPTIONS)),
    element=st.integers(0, 2**62 - 1),
    step=st.integers(-(2**31), 2**32 - 1),
)
def test_anything(shape, dtype, layout, option, element, step):
    check(place((4 * randn(*shape)).to(dtype), layout), option, element, step)


@pytest.mark.isa
@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind):
    check(strided(randn(2, 9, 4, 6, dtype=torch.float32), kind), "top_k and top_p")


def test_the_margin_sees_what_is_near():
    """What excuses a different draw is small only at a step of the sum."""
    u = _sampling.uniforms(torch.tensor([1]), 0, 0, 1).double().item()
    for offset in (0.0, 1e-7, 1e-3):
        logits = torch.tensor([[u + offset, 1 - u - offset]], dtype=torch.float64).log()
        found = margin(logits, torch.tensor([1]), 0, 0, 1.0, 0, 1.0).item()
        assert (found < NEAR) == (offset < 1e-6) and abs(found - offset) < 1e-12


def probabilities(row: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Of every level, by the words of the docstring."""
    kept = sorted(range(len(row)), key=lambda k: (-row[k].item(), k))[: top_k or len(row)]
    weights = torch.softmax(row[kept].double() / temperature, 0)
    held, most = 0.0, 0
    while most == 0 or held < top_p - 1e-12:
        held, most = held + weights[most].item(), most + 1
        if most == len(kept):
            break
    result = torch.zeros(len(row), dtype=torch.float64)
    result[kept[:most]] = weights[:most] / weights[:most].sum()
    return result


@pytest.mark.isa
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "greedy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution(dtype, option):
    """Chi-square of 40,000 draws along a stream and of 4,000 across seeds, at the level of 1e-4; another distribution fails."""
    row = (1.5 * randn(23, seed=5)).to(dtype)
    expected = probabilities(row, *OPTIONS[option])
    along = categorical_sample(row[None, :, None].expand(1, 23, 40_000), seeds=[12], **named(option))
    across = categorical_sample(row.expand(4_000, 23), seeds=torch.arange(4_000), step=3, **named(option))
    for drawn in (along, across):
        counts = torch.bincount(drawn.flatten(), minlength=23)
        if (expected > 0).sum() == 1:
            assert counts[expected.argmax()] == counts.sum()
        else:
            assert chi_square(counts, expected) > 1e-4
            other = expected.clone()
            other[expected > 0] = expected[expected > 0].roll(1)
            assert chi_square(counts, other) < 1e-9


@pytest.mark.isa
def test_uniforms_are_those_of_the_reference():
    """Two levels of equal weight, then of weights 1 : 3, split the uniforms where they say; and these are even and never 0 or 1."""
    seeds = seeds_of(4)
    u = _sampling.uniforms(seeds, 5, -2, 10_001)
    for first in (0.5, 0.25):
        logits = torch.tensor([first, 1 - first]).log()[None, :, None].expand(4, 2, 10_001)
        drawn = categorical_sample(logits, seeds=seeds, element=5, step=-2)
        near = (u - first).abs() < 1e-6
        assert torch.equal(drawn[~near], (u >= first).long()[~near])
    assert u.min() > 0 and u.max() < 1 and chi_square(torch.histc(u, 50, 0, 1), torch.full((50,), 0.02).double()) > 1e-4
    assert torch.equal(u * 2**24, (u * 2**24).round())


def test_uniforms_stand_apart_from_the_normals():
    """Word for word the Philox block of another counter; normals of the same place are made of other words."""
    block = torch.tensor([[3]])
    key = (torch.tensor([[17]]), torch.tensor([[0]]))
    words = [
        _philox.philox_4x32(torch.broadcast_tensors(block, 0 * block, 0 * block + 9, 0 * block + last), key)
        for last in (0, 1)
    ]
    u = _sampling.uniforms(torch.tensor([17]), 12, 9, 4)[0]
    assert torch.equal(u, torch.cat([((w >> 9) + 0.5) * 2.0**-23 for w in words[1]])[:, 0].float())
    assert all(a.item() != b.item() for a, b in zip(*words, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("option", ["plain", "top_k and top_p"])
def test_what_a_draw_depends_on(option):
    """Not the batch, nor the layout, nor the threads; one position drawn alone is that of the image."""
    logits, seeds = 2 * randn(5, 256, 9, 11, dtype=torch.float32), seeds_of(5)
    function = partial(categorical_sample, element=40, step=7, **named(option))
    whole = function(logits, seeds=seeds)
    assert torch.equal(function(logits[2:3], seeds=seeds[2:3]), whole[2:3])
    assert torch.equal(function(logits.flip(0), seeds=seeds.flip(0)), whole.flip(0))
    assert torch.equal(function(laid_out(logits, "channels_last"), seeds=seeds), whole)
    for y, x in ((0, 0), (4, 7), (8, 10)):
        alone = categorical_sample(logits[:, :, y, x], seeds=seeds, element=40 + 11 * y + x, step=7, **named(option))
        assert torch.equal(alone, whole[:, y, x])
    assert_any_threads(lambda: function(logits, seeds=seeds))
    for other in ({"element": 41}, {"step": 8}):
        changed = categorical_sample(logits, seeds=seeds, **{"element": 40, "step": 7, **other}, **named(option))
        assert (changed != whole).double().mean() > 0.3
    assert torch.equal(
        categorical_sample(logits, seeds=seeds, step=-1), categorical_sample(logits, seeds=seeds, step=2**32 - 1)
    )


@pytest.mark.isa
def test_of_equal_logits_the_first_are_kept():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 2.0])[None, :, None].expand(1, 6, 4_000)
    for options, levels in (
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.4}, [1, 2]),
        ({"top_k": 4, "top_p": 0.7}, [1, 2, 3]),
        ({"temperature": 0.0}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
    ):
        drawn = categorical_sample(logits, seeds=[3], **options)
        assert drawn.unique().tolist() == levels, options


@pytest.mark.isa
def test_a_level_of_minus_infinity_is_never_drawn():
    logits = torch.full((1, 200, 5_000), -math.inf)
    logits[:, 150], logits[:, 7] = 3.0, 3.0 - 80.0  # e^-80 of the other: likelier than any -inf
    drawn, log_probs = categorical_sample(logits, seeds=[9], return_log_prob=True)
    assert (drawn == 150).all() and (log_probs == 0).all()
    for options in ({"temperature": 100.0}, {"temperature": 100.0, "top_k": 50}, {"temperature": 1e4, "top_p": 0.99}):
        assert categorical_sample(logits, seeds=[9], **options).unique().tolist() == [7, 150]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype):
    """The largest is taken off first: nothing overflows, and what lies far below it is not drawn."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([largest, -largest, 0.0, largest], dtype=dtype)[None, :, None].expand(1, 4, 500)
    drawn, log_probs = categorical_sample(logits, seeds=[4], return_log_prob=True)
    assert drawn.unique().tolist() == [0, 3]
    torch.testing.assert_close(log_probs.double(), torch.full((1, 500), -math.log(2)).double(), rtol=1e-6, atol=0.0)
    tiny = categorical_sample(randn(3, 9, 50).to(dtype), seeds=[1, 2, 3], temperature=1e-30)
    assert torch.equal(tiny, categorical_sample(randn(3, 9, 50).to(dtype), seeds=[1, 2, 3], temperature=0.0))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("value", "what"), [(math.nan, "a NaN"), (math.inf, "inf as the largest")])
def test_a_logit_that_is_not_finite_is_named(value, what, layout):
    for level in (0, 5, 16, 18):
        logits = laid_out(randn(3, 19, 4, 5, dtype=torch.float32), layout)
        logits[1, level, 2, 3], logits[2, level, 0, 0] = value, value
        with pytest.raises(ValueError, match=rf"categorical_sample: .* must be finite, got {what} at .* = \[1, 2, 3\]"):
            categorical_sample(logits, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"got -inf as the largest at \[N, \*\] = \[0\]"):
        categorical_sample(torch.full((1, 5), -math.inf), seeds=[1])


@pytest.mark.isa
def test_the_raw_op_marks_it_instead():
    logits = randn(4, 19, dtype=torch.float32)
    logits[0, 3], logits[2], logits[3, 18] = math.nan, -math.inf, math.inf
    for option in ("plain", "greedy", "top_k and top_p"):
        drawn, scores = torch.ops.fastgen.categorical_sample(logits, seeds_of(4), 0, 0, *OPTIONS[option], True)
        assert (drawn < 0).tolist() == scores.isnan().tolist() == [True, False, True, True]


@pytest.mark.isa
def test_nothing():
    for shape in ((0, 5, 3), (2, 5, 0), (0, 5)):
        drawn, log_probs = categorical_sample(torch.zeros(shape), seeds=range(shape[0]), return_log_prob=True)
        assert drawn.shape == log_probs.shape == (shape[0], *shape[2:])


def test_there_is_no_gradient():
    logits = torch.zeros(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="categorical_sample: there is no gradient in logits: detach it"):
        categorical_sample(logits, seeds=[1, 2])
    with torch.no_grad():
        assert categorical_sample(logits, seeds=[1, 2]).shape == (2,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a floating-point tensor, got list"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must be a floating-point tensor, got torch.int64"),
        ({"logits": torch.zeros(2)}, ValueError, r"logits must be \[N, K, \*\] with K >= 1, got shape \(2,\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits must be .* with K >= 1, got shape \(2, 0\)"),
        ({"seeds": [1]}, ValueError, r"seeds must be one per sample \(2\), got shape \(1,\)"),
        ({"seeds": [1.0, 2.0]}, TypeError, "seeds must be integers"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be an int64 tensor"),
        ({"element": -1}, ValueError, r"element must be in \[0, 2\^62\), got -1"),
        ({"step": 2**32}, ValueError, r"step must be in \[-2\^31, 2\^32\), got 4294967296"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and not negative, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite and not negative, got inf"),
        ({"top_k": 0}, ValueError, "top_k must be an integer of at least 1, or None, got 0"),
        ({"top_k": 2.5}, ValueError, "top_k must be an integer of at least 1, or None, got 2.5"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], or None, got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], or None, got 1.1"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"categorical_sample: {message}"):
        categorical_sample(**{"logits": torch.zeros(2, 3), "seeds": [1, 2], **change})


@pytest.mark.isa
def test_registered():
    op = torch.ops.fastgen.categorical_sample.default
    arguments = (randn(2, 7, 3, 5, dtype=torch.bfloat16), seeds_of(2), 3, 1, 0.9, 4, 0.8)
    assert_registered(op, (*arguments, True))
    assert_fake(op, (*arguments, False))
    assert_fake(op, (randn(2, 7), *arguments[1:], True))


@pytest.mark.isa
def test_seeds_are_read_where_they_lie():
    logits, apart = randn(3, 7, 5, dtype=torch.float32), torch.arange(6)[::2]
    drawn, near = (
        torch.ops.fastgen.categorical_sample(logits, seeds, 0, 0, 1.0, 0, 1.0, False)[0]
        for seeds in (apart, apart.contiguous())
    )
    assert torch.equal(drawn, near)
