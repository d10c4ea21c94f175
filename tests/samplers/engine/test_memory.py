"""Whether a step may write over its sample: who else holds the memory, and the answer where torch does not tell."""

import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.samplers import sample
from fastgen.samplers.engine.memory import nobody_else_holds

from ...backends import requires_cpu


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.randn(2, 3), id="torch"),
        # the reference hands out views of what it has computed, and they are taken for what they are
        pytest.param(lambda: philox_normal([1, 2], (2, 3)), id="fastgen", marks=requires_cpu),
    ],
)
def test_views_and_detached_tensors_hold_memory(make):
    x = make()
    assert nobody_else_holds(x)
    for other in (x[1:], x.detach(), x.T, x.view(-1)):
        assert not nobody_else_holds(x)
        del other
    assert nobody_else_holds(x)


def test_a_tensor_that_outlives_the_call_holds_memory():
    x, kept = torch.randn(3), []
    kept.append(x[:1])
    assert not nobody_else_holds(x)
    kept.clear()
    assert nobody_else_holds(x)


@requires_cpu
def test_without_the_private_name_memory_is_never_shared(monkeypatch):
    """Fresh memory for each step, and the same samples."""
    places: list[int] = []

    def model(x, t):
        places.append(x.data_ptr())
        return 0.1 * x

    def draw():
        places.clear()
        samples = sample(model, (2, 3, 8, 8), "ddim", steps=4, seeds=[1, 2], progress=False)
        return samples, len(set(places))

    expected, shared = draw()
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert not nobody_else_holds(torch.randn(3))
    samples, fresh = draw()
    assert torch.equal(samples, expected)
    assert shared == 1 and fresh > 1
