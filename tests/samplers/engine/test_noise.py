"""Noise of torch's generators: what torch draws, from large batches on by the kernel of `generator_normal`."""

import importlib

import pytest
import torch

from fastgen.samplers import draw_normal
from fastgen.samplers.engine.noise import draw_like

from ...backends import requires_cpu
from ...ops.generator_normal_cases import DRAWN

LARGE = (2, 3, 40, 40)  # 4,800 numbers a sample
ops = importlib.import_module("fastgen.ops.generator_normal")


@pytest.fixture
def kernel_calls(monkeypatch):
    """The shapes that the kernel is asked for."""
    ops.reasons()  # the first use asks for some by itself
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(ops, "_kernel", lambda *a, kernel=ops._kernel: shapes.append(tuple(a[1])) or kernel(*a))
    return shapes


@requires_cpu
def test_one_generator_and_one_a_sample(kernel_calls):
    for count in (1, 2):
        ours, theirs = ([torch.Generator().manual_seed(k) for k in range(count)] for _ in range(2))
        shape = LARGE if count == 1 else (1, *LARGE[1:])
        expected = torch.cat([torch.randn(shape, generator=g) for g in theirs])
        torch.testing.assert_close(draw_normal(LARGE, ours, "cpu"), expected, rtol=5e-7, atol=1e-11)
    assert kernel_calls == [LARGE, LARGE]


@requires_cpu
@pytest.mark.parametrize("dtype", DRAWN)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_noise_like_a_tensor(kernel_calls, layout, dtype):
    x = torch.zeros(LARGE, dtype=dtype)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1),
        "expanded": x[:1].expand(LARGE),
    }[layout]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected, after = torch.randn_like(x), torch.get_rng_state()
        torch.manual_seed(3)
        actual = draw_like(x)
        assert torch.equal(torch.get_rng_state(), after)
    assert actual.stride() == expected.stride() and actual.dtype == dtype
    tolerance = {"rtol": 1e-2 if dtype.itemsize == 2 else 5e-7, "atol": 1e-11}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert kernel_calls == ([tuple(x.shape)] if layout == "contiguous" else [])
