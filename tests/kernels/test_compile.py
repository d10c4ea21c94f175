"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills, without stray fp64, within its budget, reads and writes
in vectors what lies in order, and reads all it needs before it writes. For sm_90 also with tensors that begin off 16 bytes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ..backends import requires_triton
from ..ops.families import case_files
from . import ptx

# What a launch of W warps may use a thread, of 65,536 registers a multiprocessor: 4 programs of 4 warps, 2 of 8, 1 of 16.
REGISTERS = 128
REGISTERS_FP64 = 255
SHARED_BYTES = 16 * 1024
STORES_IN_A_LOOP = {name for module in case_files().values() for name in getattr(module, "STORES_IN_A_LOOP", ())}
# What single kernels may use more.
OWN_REGISTERS = {
    name: most for module in case_files().values() for name, most in getattr(module, "REGISTERS", {}).items()
}
OWN_SHARED = {
    name: most for module in case_files().values() for name, most in getattr(module, "SHARED_BYTES", {}).items()
}
OWN_STACK = {name: most for module in case_files().values() for name, most in getattr(module, "STACK", {}).items()}
NO_STORAGE_TYPE = {name for module in case_files().values() for name in getattr(module, "NO_STORAGE_TYPE", ())}


def faults(record: dict[str, Any]) -> list[str]:
    """What a compiled kernel does that it may not, a sentence each."""
    wide = record["case"].endswith("fp64")
    # fp64 division is a subroutine: it takes stack for its return and what it must keep, not a spill in a loop
    stack = OWN_STACK.get(record["kernel"], {}).get(record["case"].rpartition(" ")[2], 16 if wide else 0)
    spills = record["stack"] > stack or record["local"] > 0
    # the coefficients of an fp64 table are rounded in the kernel, and that is all
    stray = set(record["f64"]) - ({"cvt.rn.f32.f64"} if record["case"].endswith("fp64 table") else set())
    found = {
        "spills": spills,
        "fp64 instructions": bool(stray) and not wide,
        "registers": record["reg"] > (REGISTERS_FP64 if wide else OWN_REGISTERS.get(record["kernel"], REGISTERS)),
        "shared memory": record["shared"] > SHARED_BYTES,
        "loads that wait for a store": record["loads after a store"] > 0 and record["kernel"] not in STORES_IN_A_LOOP,
        "narrow loads or stores": record["aligned"] and "contiguous" in record["case"] and bool(lacking(record)),
    }
    return [f"{name}: {record}" for name, is_so in found.items() if is_so]


DTYPES = ("fp64", "fp32", "bf16", "fp16")


@pytest.mark.long
@requires_triton
@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_compile(arch):
    records, kernels = compiled(arch)
    assert kernels >= NO_STORAGE_TYPE
    for dtype in DTYPES:
        own = {record["kernel"] for record in records if record["case"].endswith(dtype)}
        assert own >= kernels - NO_STORAGE_TYPE, f"no gate compiles these in {dtype}: {kernels - NO_STORAGE_TYPE - own}"
    assert {record["kernel"] for record in records} == kernels
    assert [sentence for record in records for sentence in faults(record)] == []
    assert not STORES_IN_A_LOOP - {record["kernel"] for record in records if record["loads after a store"]}


@pytest.mark.long
@requires_triton
@pytest.mark.parametrize("arch", [80, 100])
def test_compile_in_bf16(arch):
    """On other architectures the dtype that most is done for: what is compiled differs little from one to the next."""
    records, kernels = compiled(arch, "bf16")
    assert {record["kernel"] for record in records} >= kernels - NO_STORAGE_TYPE
    assert [sentence for record in records for sentence in faults(record)] == []


def compiled(arch: int, *dtype: str) -> tuple[list[dict[str, Any]], set[str]]:
    """The records of the gates, and the names of all kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_worker", str(arch), *dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stderr[-4000:]
    *records, last = [json.loads(line) for line in result.stdout.splitlines()]
    return records, set(last["all kernels"])


def lacking(record: dict[str, Any]) -> dict[int, int]:
    """Width -> bytes a thread that should move in accesses of this width or more, and do not."""
    moved = [(int(size), count) for kind in ("loads", "stores") for size, count in record[kind].items()]
    wanted = {int(width): bytes for width, bytes in record["vectors"].items()}
    found = {}
    for width in wanted:
        short = sum(v for w, v in wanted.items() if w >= width) - sum(size * n for size, n in moved if size >= width)
        if short > 0:
            found[width] = short
    return found


PTX = """
  @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
  ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 ];
  st.global.v2.b32 [ %rd3 ], { %r1, %r2 };
  ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
  ld.global.b64 { %rd7 }, [ %rd8 ];
  ld.param.b64 %rd9, [kernel_param_0];
"""


def test_what_is_read_from_ptx():
    assert ptx.accesses(PTX) == [("ld", 16), ("ld", 2), ("st", 8), ("ld", 8)]
    assert ptx.widths(PTX, "ld") == {2: 1, 16: 1} and ptx.widths(PTX, "st") == {8: 1}
    assert ptx.loads_after_a_store(PTX) == 1 and ptx.loads_after_a_store(PTX.split("  st.")[0]) == 0


def test_narrow_accesses_are_found():
    """Two operands of 16 bytes a thread, one of 8: each load or store that is narrower shows."""
    record = {"vectors": {"16": 32, "8": 8}, "loads": {"16": 1, "8": 1, "2": 4}, "stores": {"16": 1}}
    assert lacking(record) == {}
    assert lacking({**record, "stores": {"2": 8}}) == {16: 16, 8: 16}
    assert lacking({**record, "loads": {"16": 1, "4": 2}}) == {8: 8}
