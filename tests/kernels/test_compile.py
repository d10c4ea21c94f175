"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills, without stray fp64, within its budget."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ..backends import requires_triton
from ..ops.families import case_files

# What a launch of W warps may use a thread, of 65,536 registers a multiprocessor: 4 programs of 4 warps, 2 of 8, 1 of 16.
REGISTERS = 128
REGISTERS_FP64 = 255
SHARED_BYTES = 16 * 1024
NO_STORAGE_TYPE = {name for module in case_files().values() for name in getattr(module, "NO_STORAGE_TYPE", ())}


def faults(record: dict[str, Any]) -> list[str]:
    """What a compiled kernel does that it may not, a sentence each."""
    wide = record["case"].endswith("fp64")
    # fp64 division is a subroutine: it takes stack for its return and what it must keep, not a spill in a loop
    spills = record["stack"] > (16 if wide else 0) or record["local"] > 0
    # the coefficients of an fp64 table are rounded in the kernel, and that is all
    stray = set(record["f64"]) - ({"cvt.rn.f32.f64"} if record["case"].endswith("fp64 table") else set())
    found = {
        "spills": spills,
        "fp64 instructions": bool(stray) and not wide,
        "registers": record["reg"] > (REGISTERS_FP64 if wide else REGISTERS),
        "shared memory": record["shared"] > SHARED_BYTES,
    }
    return [f"{name}: {record}" for name, is_so in found.items() if is_so]


@pytest.mark.long
@requires_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compile(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_worker", str(arch)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    *records, last = [json.loads(line) for line in result.stdout.splitlines()]
    kernels = set(last["all kernels"])
    assert kernels >= NO_STORAGE_TYPE
    for dtype in ("fp64", "fp32", "bf16", "fp16"):
        own = {record["kernel"] for record in records if record["case"].endswith(dtype)}
        assert own >= kernels - NO_STORAGE_TYPE, f"no gate compiles these in {dtype}: {kernels - NO_STORAGE_TYPE - own}"
    assert {record["kernel"] for record in records} == kernels
    assert [sentence for record in records for sentence in faults(record)] == []
