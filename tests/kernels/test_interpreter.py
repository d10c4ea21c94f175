"""Runs the interpreter's checks in processes of their own: Triton decides at import how its kernels run."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..backends import requires_triton

CHECKS = sorted((Path(__file__).parent / "interpreter").glob("*checks.py"))


def broken(triton: str, numpy: str) -> str:
    """Why Triton's own interpreter fails with these versions, whatever the kernel; empty where it does not."""
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} fails by itself with NumPy {numpy} ('only 0-dimensional arrays can be "
            "converted to Python scalars'): it needs NumPy < 2.4 or a later Triton"
        )
    return ""


@pytest.mark.long
@requires_triton
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(checks):
    if why := broken(importlib.metadata.version("triton"), importlib.metadata.version("numpy")):
        pytest.skip(why)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed, skipped = (int((re.search(rf"(\d+) {word}", result.stdout) or [0, 0])[1]) for word in ("passed", "skipped"))
    assert passed > skipped, f"{checks.name} checks next to nothing: {passed} passed, {skipped} skipped"


def test_the_reason_names_both_versions():
    assert "Triton 3.6.0 fails by itself with NumPy 2.4.6" in broken("3.6.0", "2.4.6")
    assert broken("3.6.0", "2.3.5") == broken("3.9.0", "2.4.6") == ""
