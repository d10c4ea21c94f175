"""Whether a step may write over its sample, and what is given out again: who else holds memory, and where torch does not tell."""

import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.samplers import sample
from fastgen.samplers.engine.memory import Recycled, nobody_else_holds

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


# ---- Recycled ------------------------------------------------------------------------------------------------------------------

LARGE = (Recycled.SMALL // 4,)


def place(pool, **kwargs):
    """Where one that nobody keeps was."""
    return pool.like(torch.empty(LARGE, **kwargs)).data_ptr()


def test_what_nobody_holds_is_given_out_again():
    pool = Recycled()
    first = pool.like(torch.empty(LARGE))
    assert pool.like(torch.empty(LARGE)).data_ptr() != first.data_ptr()
    at = first.data_ptr()
    del first
    assert place(pool) == place(pool) == at


HOLDERS = {
    "a view": lambda x: x[5:9],
    "itself detached": lambda x: x.detach(),
    "an array of NumPy": lambda x: x.numpy(),
    "a slice of that array": lambda x: x.numpy()[3:4],
    "a capsule of DLPack": lambda x: torch.utils.dlpack.to_dlpack(x),
    "another library's tensor": lambda x: torch.from_dlpack(x),
    "a saved tensor of autograd": lambda x: x * torch.ones(1, requires_grad=True),
    "its storage": lambda x: x.untyped_storage(),
}


@pytest.mark.parametrize("how", HOLDERS)
def test_what_somebody_holds_is_not(how):
    pool = Recycled()
    x = pool.like(torch.empty(LARGE)).fill_(7)
    held, at = HOLDERS[how](x), x.data_ptr()
    del x
    for _ in range(3):
        other = pool.like(torch.empty(LARGE))
        assert other.data_ptr() != at
        other.fill_(0)
    del other, held
    assert at in {place(pool) for _ in range(2)}


def test_only_what_is_alike_is_given_out_again():
    """Other sizes, strides and dtypes are other memory, and so is what was made in inference mode."""
    pool = Recycled()
    at = place(pool)
    rows = torch.empty(8, LARGE[0])
    assert pool.like(rows).shape == rows.shape and pool.like(rows.T.contiguous().T).stride() == (1, 8)
    assert place(pool, dtype=torch.float64) != at
    with torch.inference_mode():
        inside = pool.like(torch.empty(LARGE))
        assert inside.is_inference() and inside.data_ptr() != at
    assert not pool.like(torch.empty(LARGE)).is_inference()


def test_small_and_foreign_memory_is_the_allocator_s():
    pool = Recycled()
    pool.like(torch.empty(3)), pool.like(torch.empty(LARGE, device="meta"))
    assert pool._own == []


def test_what_is_remembered_is_bounded_and_forgotten():
    pool = Recycled(limit=3)
    kept = [pool.like(torch.empty(LARGE)) for _ in range(7)]
    assert len({x.data_ptr() for x in kept}) == 7 and len(pool._own) == 3
    pool.release()
    assert pool._own == []


def test_without_the_private_name_nothing_is_given_out_again(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    pool = Recycled()
    first = pool.like(torch.empty(LARGE))
    held = [pool.like(torch.empty(LARGE)) for _ in range(10)]
    assert len({x.data_ptr() for x in (first, *held)}) == 11
