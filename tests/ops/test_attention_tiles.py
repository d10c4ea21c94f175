"""`attention` over matrix tiles and over pairs of bfloat16, on any machine that has a compiler.

Built with the emulation of either, and held to the tests of the op.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .. import fresh
from ..backends import requires_checkout

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

BUILDING = """
import runpy, sys, setuptools
from pathlib import Path
setuptools.setup = lambda **_: None
sys.argv, folder = ["setup.py"], Path(sys.argv[1])
describe = runpy.run_path("setup.py")["describe_build"]
describe.__globals__["CPU_SOURCES"] = [Path("csrc/cpu/attention.cpp"), Path("csrc/cpu/attention_bwd.cpp")]
build = describe(folder, folder / "objects")
build.compilations = [step for step in build.compilations if "attention" in step[0]]
build.links = [step for step in build.links if "libfastgen_" in step[0]]
(folder / "lib").mkdir()
sys.exit(build.run_plainly())
"""
# Without kernels of its own the process takes these.
TESTING = """
import sys, torch, fastgen, pytest
torch.ops.load_library(sys.argv[1])
for op in ("attention", "attention_bwd"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{op}", "CPU")
sys.exit(pytest.main(sys.argv[2:]))
"""


def isa() -> str:
    """One whose vectors are shorter than a row of a tile."""
    try:
        from fastgen import _cpu
    except ImportError:
        return "portable"
    return "avx2" if "avx2" in _cpu.supported_isas() else "portable"


@pytest.mark.long
@requires_checkout
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("what", ["TILES", "PAIRS"])
def test_emulated(what, tmp_path):
    environment = {
        **os.environ,
        "FASTGEN_ISA_BUILD": isa(),
        "FASTGEN_CUDA": "0",
        "FASTGEN_CXXFLAGS": f"-DFASTGEN_EMULATED_{what}",
    }
    built = subprocess.run(
        [sys.executable, "-c", BUILDING, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    library = str(tmp_path / f"lib/libfastgen_{isa()}.so")
    options = ["-q", "-m", "isa", "-p", "no:cacheprovider", str(ROOT / "tests/ops/test_attention.py")]
    options += ["-k", "dtype2 or not_finite or packed or any_shape or threads"]
    result = fresh.run(
        TESTING, library, *options, check=False, timeout=900, FASTGEN_ISA="reference", FASTGEN_REQUIRE=""
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= 45
