"""Which backends a test needs. `FASTGEN_REQUIRE=cpu,triton` turns a skip for a missing one into a failure."""

import importlib.util
import os

import pytest
import torch

from fastgen import _dispatch


def _missing() -> dict[str, str]:
    reasons = {}
    cpu = _dispatch.cpu_reasons()
    if cpu:
        reasons["cpu"] = "; ".join(cpu)
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "triton is not installed"
    if not torch.cuda.is_available():
        reasons["cuda"] = "there is no CUDA device"
    return reasons


MISSING = _missing()
REQUIRED = [name for name in os.environ.get("FASTGEN_REQUIRE", "").split(",") if name]


def requires(backend: str) -> pytest.MarkDecorator:
    """Skip where ``backend`` is missing, with the reason; do not skip (and so fail) where it is required."""
    return pytest.mark.skipif(backend in MISSING and backend not in REQUIRED, reason=MISSING.get(backend, ""))


requires_cpu = requires("cpu")
requires_triton = requires("triton")
requires_cuda = requires("cuda")
