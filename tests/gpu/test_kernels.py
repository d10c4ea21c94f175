"""The checks of the Triton kernels that the interpreter runs on a CPU, run on a GPU: values, bits, strides, ends of memory."""

import importlib

import pytest

from ..backends import MISSING

# A GPU without Triton, or the interpreter asked for, is nothing this file can test.
for backend in ("cuda", "triton"):
    if backend in MISSING:
        pytest.skip(MISSING[backend], allow_module_level=True)

_checks = importlib.import_module("tests.kernels.interpreter.checks")
globals().update(
    {name: value for name, value in vars(_checks).items() if name.startswith("test_") or name == "kernels"}
)
pytestmark = pytest.mark.gpu


def test_they_run_on_the_gpu():
    assert _checks.DEVICE == "cuda", "TRITON_INTERPRET is set: the kernels would not run on the GPU"
