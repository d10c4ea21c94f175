"""Runs the interpreter's checks in a process of their own: Triton decides at import how its kernels run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from ..backends import requires_triton

CHECKS = sorted((Path(__file__).parent / "interpreter").glob("*checks.py"))


@requires_triton
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CHECKS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= 700
