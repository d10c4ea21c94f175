"""The op families on a CUDA device: what the CPU tests ask, asked of the GPU.

Nothing here knows a family: calls and further tests come from the case files, `tests/ops/<family>_cases.py`.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgen import _dispatch, _schema

from ..backends import requires_cuda
from ..ops import families
from ..ops.numerics import assert_registered

pytestmark = [pytest.mark.gpu, requires_cuda]

FIRST = {call.op: call for call in reversed(list(families.calls()))}  # of each raw op
globals().update(families.checks("gpu_"))


def on_gpu(call: families.Call) -> tuple:
    return tree_map_only(Tensor, Tensor.cuda, call.make())


@pytest.mark.parametrize("op", FIRST)
def test_a_compiled_kernel_takes_the_call(op):
    """A fallback to the reference would pass every test of values."""
    reasons = _dispatch.cuda_reasons(op, *on_gpu(FIRST[op]))
    assert not all(reasons.values()), reasons


@pytest.mark.parametrize("op", FIRST)
def test_opcheck(op):
    assert_registered(getattr(torch.ops.fastgen, op).default, on_gpu(FIRST[op]))


@pytest.mark.parametrize("op", FIRST)
def test_nothing_waits_for_the_device(op):
    arguments, kernel = on_gpu(FIRST[op]), getattr(torch.ops.fastgen, op)
    kernel(*arguments)  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_family_was_asked():
    asked = {_schema.FAMILY_OF[op] for op in FIRST}
    assert asked == set(families.case_files()) - set(_schema.CPU_ONLY)
