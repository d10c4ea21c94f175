"""The Triton kernels of every family against the reference in float64: run by the interpreter, and on a GPU by `tests/gpu`.

Nothing here knows a family: calls and further checks come from the case files, `tests/ops/<family>_cases.py`.
"""

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch, _library, _schema
from tests.kernels.device import DEVICE, Kernels, close, guard, guarded_outputs, moved
from tests.ops import families
from tests.ops.numerics import widened

CALLS = list(families.calls())


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels()


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op} {call.name}")
def test_call(call, kernels):
    """Values; shapes, dtypes and strides of the fake; the ends of memory; on a GPU, where programs race, the same bits again."""
    arguments = guard(call.make())
    with guarded_outputs():
        actual = outputs(getattr(kernels, call.op)(*arguments))
    again = outputs(getattr(kernels, call.op)(*arguments)) if DEVICE == "cuda" else actual
    expected = outputs(_library.checked(call.op)(*widened(arguments)))
    fake = outputs(_library.checked(call.op, "_fake")(*arguments))
    for a, b, e, f in zip(actual, again, expected, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (f.shape, f.dtype, f.stride())
        assert torch.equal(a, b)
        close(a, e, call.tolerance, call.least, call.cut)


globals().update(families.checks("check_"))


def test_every_op_with_a_triton_kernel_is_called():
    functional = {op for op in _schema.FAMILY_OF if "!" not in _schema.SCHEMAS[_schema.FAMILY_OF[op]][op]}
    assert {op for op in functional if not _dispatch.Triton.reasons(op)} == {call.op for call in CALLS}


def test_the_device_is_the_one_under_test():
    assert moved(torch.zeros(1), DEVICE).device.type == DEVICE
