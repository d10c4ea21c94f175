"""`group_norm` as CUDA autocast calls it: fp16 is read, fp32 is written, and nothing is rounded to fp16 in between."""

import importlib
from unittest import mock

import pytest
import torch

from fastgen.reference import group_norm as reference
from fastgen.reference._layout import output_strides
from tests.kernels.interpreter.checks import close, group_norm_case, guarded_outputs, on_device

module, plan = (importlib.import_module(f"fastgen.kernels.{name}") for name in ("group_norm", "_group_norm_plan"))
group_norm_wide_fwd = on_device(module.group_norm_wide_fwd)
group_norm_bwd = on_device(module.group_norm_bwd)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 4, 4), 4), ((1, 6, 50, 70), 3), ((3, 16), 4)])
@pytest.mark.parametrize("split", [False, True])
def test_group_norm_wide(shape, groups, layout, split):
    x, grad, params = group_norm_case(shape, torch.float16, layout, True)
    grad, wide = grad.float(), [p.double() for p in params]
    with mock.patch.object(plan, "WHOLE_NUMBERS", 0 if split else plan.WHOLE_NUMBERS):
        with guarded_outputs():
            forward = group_norm_wide_fwd(x, groups, *params, 1e-5, 1)
        with guarded_outputs():
            backward = group_norm_bwd(grad, x, *forward[1:], groups, *params, 1)
    expected = reference.group_norm_fwd(x.double(), groups, *wide, 1e-5, 1)
    expected_bwd = reference.group_norm_bwd(grad.double(), x.double(), *expected[1:], groups, *wide, 1)
    assert all(t.dtype == torch.float32 for t in (*forward, *backward[1:])) and backward[0].dtype == torch.float16
    for actual, wanted in zip((*forward, *backward[1:]), (*expected, *expected_bwd[1:]), strict=True):
        close(actual, wanted, torch.float32)
    close(backward[0], expected_bwd[0], torch.float16)
    assert list(forward[0].stride()) == list(backward[0].stride()) == output_strides(x)
