"""`sampler_step_out` without the dispatcher: the bits of the op, and the op itself wherever somebody could tell."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.ops import _sampler_step_direct as _direct

from ..backends import requires_cpu
from .numerics import DTYPES, randn
from .sampler_step_cases import STEP, make_table

SHAPE = (2, 3, 5, 7)


def step(dtype, history=0, noise=False, outputs=0, table=None, **changed):
    """(what is returned by the call, a function that makes it): operands by name, of which some may be changed."""
    names = ["sample", "model_output", "noise"]
    operands = {name: randn(*SHAPE, seed=k, dtype=dtype) for k, name in enumerate(names)} | changed
    if not noise:
        operands["noise"] = None
    past = [randn(*SHAPE, seed=10 + k, dtype=dtype) for k in range(history)]
    if table is None:
        table = make_table(torch.float64 if dtype == torch.float64 else torch.float32)
    outs = [torch.full(SHAPE, float("nan"), dtype=dtype) if k <= outputs else None for k in range(3)]
    sample, model, drawn = operands["sample"], operands["model_output"], operands["noise"]
    _direct.sampler_step_out(sample, model, table, STEP, past, drawn, *outs)
    return [out for out in outs if out is not None]


@pytest.fixture
def calls(monkeypatch):
    """Which way calls went: "op" or "kernel"."""
    seen: list[str] = []
    op, kernel = _direct._op, _direct._kernel
    monkeypatch.setattr(_direct, "_op", lambda *args: seen.append("op") or op(*args))
    monkeypatch.setattr(_direct, "_kernel", lambda packed: seen.append("kernel") or kernel(packed))
    return seen


@requires_cpu
@pytest.mark.isa
@pytest.mark.parametrize("outputs", [0, 1, 2])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("history", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_op(dtype, history, noise, outputs, calls, monkeypatch):
    direct = step(dtype, history, noise, outputs)
    monkeypatch.setattr(_direct, "_plain", lambda *_: False)
    expected = step(dtype, history, noise, outputs)
    assert calls == ["kernel", "op"]
    assert len(direct) == outputs + 1 and all(torch.equal(a, b) for a, b in zip(direct, expected, strict=True))


@requires_cpu
def test_a_row_again_and_again(calls):
    """A table of one row that is expanded: each of its rows is that one."""
    table = make_table(torch.float32)
    again = table[STEP : STEP + 1].expand(1 << 30, -1)
    assert torch.equal(step(torch.float32, 1, table=table)[0], step(torch.float32, 1, table=again)[0])
    assert calls == ["kernel", "kernel"]


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", set()) | {str(func)}
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


@requires_cpu
def test_who_watches_sees_the_op(calls):
    with Seeing() as mode:
        step(torch.float32)
    assert "fastgen.sampler_step_out.default" in mode.seen
    with torch.profiler.profile() as profile:
        step(torch.float32)
    assert any("sampler_step_out" in event.key for event in profile.key_averages())
    assert calls == ["op", "op"]


@requires_cpu
@pytest.mark.parametrize(
    "changed",
    [
        {"model_output": randn(*SHAPE, dtype=torch.bfloat16)},
        {"model_output": randn(2, 3, 7, 5, dtype=torch.float32).transpose(2, 3)},
        {"sample": randn(*SHAPE, dtype=torch.float32).to(memory_format=torch.channels_last)},
        {"sample": torch._neg_view(randn(*SHAPE, dtype=torch.float32))},
        {"model_output": randn(*SHAPE, dtype=torch.float32).as_subclass(Own)},
        {"table": make_table(torch.float64)},
        {"table": make_table(torch.float32).T.contiguous().T},
    ],
    ids=["dtype", "strides", "channels_last", "negative", "subclass", "table", "columns apart"],
)
def test_what_does_not_lie_as_the_kernel_reads_it_goes_to_the_op(changed, calls):
    plain = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in changed.items() if name != "table"
    }
    plain = {name: (value.as_subclass(torch.Tensor)).float().resolve_neg() for name, value in plain.items()}
    actual, expected = step(torch.float32, 2, **changed)[0], step(torch.float32, 2, **plain)[0]
    assert calls == ["op", "kernel"]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@requires_cpu
def test_a_row_that_is_not_there_is_refused(calls):
    for table, message in (
        (make_table(torch.float32, history=3), "needs 27 columns"),
        (make_table(torch.float32)[:STEP], "row"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step(torch.float32, 4, outputs=2, table=table)
    assert calls == ["op", "op"]


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(_direct, "_kernel", None)
    assert step(torch.float32, 1)[0].isfinite().all()
