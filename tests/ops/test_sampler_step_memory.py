"""`sampler_step(out=...)` in memory that arguments share: what is returned without ``out``, or an error; never another answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.ops import sampler_step
from fastgen.reference import _memory

from .numerics import DTYPES, LAYOUTS, laid_out, randn
from .sampler_step_cases import OPTIONS, STEP, make, make_table

SHAPE = (2, 3)
SIZE = 6
READ_FIRST = ("sample", "model_output", "uncond")
READ_LATER = ("noise", "variance", "mask", "known", "known_noise", "history[0]", "history[2]")


def arguments(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> dict:
    return {**make(OPTIONS["everything"], [dtype], [layout], shape), "table": make_table(torch.float32), "step": STEP}


def replaced(named: dict, name: str, value: Tensor) -> dict:
    """``named`` with the values of one argument put into the memory of ``value``."""
    if name.startswith("history"):
        k = int(name[8])
        value.copy_(named["history"][k])
        return {**named, "history": [value if i == k else h for i, h in enumerate(named["history"])]}
    value.copy_(named[name])
    return {**named, name: value}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*READ_FIRST, *READ_LATER])
def test_every_shift(name, dtype):
    """An argument and the output in one buffer, from apart on the left to apart on the right."""
    expected = sampler_step(**arguments(dtype=dtype))
    for shift in range(-SIZE - 1, SIZE + 2):
        buffer = torch.full((3 * SIZE + 4,), torch.nan, dtype=dtype)
        named = replaced(arguments(dtype=dtype), name, buffer[SIZE + 2 :][:SIZE].view(SHAPE))
        out = buffer[SIZE + 2 + shift :][:SIZE].view(SHAPE)
        if 0 < abs(shift) < SIZE or (shift == 0 and name in READ_LATER):
            before = buffer.clone()
            with pytest.raises(RuntimeError, match=rf"sampler_step: out shares memory with {name}".replace("[", r"\[")):
                sampler_step(**named, out=out)
            torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(sampler_step(**named, out=out), expected)


@pytest.mark.isa
@pytest.mark.parametrize("name", ["table", "seeds", "threshold"])
def test_small_arguments(name):
    named = {**arguments(), "table": make_table(torch.float64)}
    if name == "seeds":
        named = {**named, "noise": None, "seeds": torch.tensor([3, 4])}
    target = named[name].contiguous()
    out = target.view(torch.float32).reshape(-1)[:SIZE]
    if out.numel() < SIZE:  # two seeds, or two thresholds: the output lies around them
        buffer = torch.zeros(SIZE)
        inside = buffer.view(target.dtype)[: target.numel()]
        target, out = inside.copy_(target), buffer
    with pytest.raises(RuntimeError, match=f"out shares memory with {name}"):
        sampler_step(**{**named, name: target}, out=out.view(SHAPE))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READ_FIRST)
def test_over_what_is_read_first(name, layout, dtype):
    """Many tiles, in a layout of the output that is that of the sample or not."""
    shape = (3, 4, 33, 31)
    expected = sampler_step(**arguments(shape, dtype), return_corrected=True)
    for other in LAYOUTS:
        named = arguments(shape, dtype, layout)
        named = replaced(named, name, laid_out(named[name].clone(), other))
        for outputs in (
            [named[name], torch.empty_like(named["sample"])],
            [torch.empty(shape, dtype=dtype), named[name]],
        ):
            kept = named[name].clone()
            for written, right in zip(sampler_step(**named, return_corrected=True, out=outputs), expected, strict=True):
                torch.testing.assert_close(written, right, rtol=0, atol=0)
            named[name].copy_(kept)


@pytest.mark.isa
def test_outputs_may_not_overlap_each_other():
    expected = sampler_step(**arguments(), return_prediction=True, return_corrected=True)
    for shift in range(-SIZE - 1, SIZE + 2):
        buffer = torch.zeros(5 * SIZE)
        parts = [buffer[:SIZE], buffer[2 * SIZE :][:SIZE], buffer[2 * SIZE + shift :][:SIZE]]
        out = [part.view(SHAPE) for part in parts]
        call = dict(**arguments(), return_prediction=True, return_corrected=True, out=out)
        if 2 * SIZE + shift < SIZE or abs(shift) < SIZE:
            with pytest.raises(RuntimeError, match=r"corrected shares memory with (out|prediction)"):
                sampler_step(**call)
        else:
            assert all(torch.equal(a, b) for a, b in zip(sampler_step(**call), expected, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize(
    ("out", "overlaps"),
    [
        (torch.zeros(1).expand(SHAPE), True),
        (torch.zeros(3).expand(SHAPE), True),
        (torch.zeros(4).as_strided(SHAPE, (1, 1)), True),
        (torch.zeros(11).as_strided(SHAPE, (4, 3)), True),  # hard to say: no two are one
        (torch.zeros(4).as_strided((2, 2), (0, 3)), True),
        (torch.zeros(3, 2).T, False),
        (torch.zeros(2, 6)[:, ::2], False),
        (torch.zeros(7, 4)[::4, :3], False),
    ],
)
def test_an_output_may_not_overlap_itself(out, overlaps):
    named = arguments(tuple(out.shape))
    if overlaps:
        with pytest.raises(RuntimeError, match="out overlaps itself"):
            sampler_step(**named, out=out)
    else:
        assert torch.equal(sampler_step(**named, out=out), sampler_step(**named))


@pytest.mark.isa
def test_memory_counts_not_storage_or_dtype():
    """NumPy's memory twice, and the same bytes as another dtype."""
    memory = np.zeros(SIZE, dtype=np.float32)
    first, second = (torch.from_numpy(memory).view(SHAPE) for _ in range(2))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="out shares memory with noise"):
        sampler_step(**replaced(arguments(), "noise", first), out=second)
    assert torch.equal(sampler_step(**replaced(arguments(), "sample", first), out=second), sampler_step(**arguments()))
    narrow = second.view(torch.bfloat16)[:, :3]
    with pytest.raises(RuntimeError, match="out shares memory with model_output"):
        sampler_step(**replaced(arguments(), "model_output", narrow), out=second)


@st.composite
def views(draw):
    """A view [2, 3] of a buffer of 64 elements, of any strides."""
    strides = draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))
    return strides, draw(st.integers(0, 63 - strides[0] - 2 * strides[1]))


@pytest.mark.isa
@settings(max_examples=300, deadline=None)
@given(views(), views(), st.sampled_from([*READ_FIRST, *READ_LATER]))
def test_any_two_views(one, other, name):
    """Right, or an error where any element is shared; no error where the addresses are apart and the output is its own."""
    buffer = randn(64, seed=5).float()
    argument, out = (buffer.as_strided(SHAPE, strides, offset) for strides, offset in (one, other))
    named = arguments()
    if name.startswith("history"):
        named["history"][int(name[8])] = argument
    else:
        named[name] = argument
    expected = sampler_step(**named)
    places = [
        [offset + i * strides[0] + j * strides[1] for i in range(2) for j in range(3)]
        for strides, offset in (one, other)
    ]
    single = len(set(places[1])) == SIZE
    apart = max(places[0]) < min(places[1]) or max(places[1]) < min(places[0])
    try:
        result = sampler_step(**named, out=out)
    except RuntimeError as error:
        assert "memory" in str(error)
        assert not (apart and single) or "overlaps itself" in str(error)
    else:
        assert single and torch.equal(result, expected)
        assert not set(places[0]) & set(places[1]) or (name in READ_FIRST and places[0] == places[1])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), max_size=4), st.integers(0, 5))
def test_the_extent_of_a_tensor(dimensions, offset):
    sizes, strides = [n for n, _ in dimensions], [s for _, s in dimensions]
    buffer = torch.arange(300, dtype=torch.int64)
    view = buffer.as_strided(sizes, strides, offset)
    first, end = _memory.extent(view)
    assert (first - buffer.data_ptr()) // 8 == view.min() and (end - buffer.data_ptr()) // 8 == view.max() + 1
    assert _memory.overlaps_itself(view) or view.unique().numel() == view.numel()


def test_copies_where_nothing_may_be_written_over():
    """Under a transform of torch.func and for a dtype that no kernel takes, results are copied into the output."""
    named = arguments()
    sample = named.pop("sample")
    out = torch.zeros(4, *SHAPE)
    samples = torch.stack([sample * k for k in range(4)])
    torch.vmap(lambda x, o: sampler_step(x, **named, out=o))(samples, out)
    for k in range(4):
        assert torch.equal(out[k], sampler_step(samples[k], **named))
    low = sample.to(torch.float8_e5m2)
    with pytest.raises(RuntimeError, match="out shares memory with sample"):
        sampler_step(low[:, :2], low[:, :2].clone(), named["table"], STEP, out=low[:, 1:])
