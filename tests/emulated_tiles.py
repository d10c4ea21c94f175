"""Kernels over matrix tiles on a machine without a matrix unit: built with the emulation of
`csrc/common/simd/matrix_tiles.h`, for a process that has loaded no others.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from . import fresh

CSRC = Path(__file__).parents[1] / "csrc"
_TORCH = Path(torch.__file__).parent
_FLAGS = [
    "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w", "-DFASTGEN_EMULATED_TILES",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-I{_TORCH}/include", f"-I{_TORCH}/include/torch/csrc/api/include",
]  # fmt: skip
_LINK = [
    f"-Wl,--version-script={CSRC}/common/hidden.map", f"-L{_TORCH}/lib", "-Wl,--as-needed", "-lstdc++", "-ltorch_cpu", "-lc10",
]  # fmt: skip

_RUN = """
import sys, pytest, torch, fastgen
library, ops, *options = sys.argv[1:]
torch.ops.load_library(library)
for op in ops.split(","):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{op}", "CPU"), op
sys.exit(pytest.main(options))
"""


def build(folder: Path, *stems: str) -> Path:
    """The library of these sources of `csrc/cpu`, in ``folder``; skips where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = folder / "libemulated.so"
    sources = [str(CSRC / "cpu" / f"{stem}.cpp") for stem in stems]
    result = subprocess.run(
        [*compiler.split(), "-shared", *_FLAGS, *sources, "-o", str(library), *_LINK], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return library


def run_tests(library: Path, ops: list[str], *options: str, timeout: float = 900) -> str:
    """pytest with ``options`` where ``library`` holds the only kernels, those of ``ops`` among them; its output."""
    options = ("-q", "-p", "no:cacheprovider", *options)
    result = fresh.run(
        _RUN,
        str(library),
        ",".join(ops),
        *options,
        check=False,
        timeout=timeout,
        FASTGEN_ISA="reference",
        FASTGEN_REQUIRE="",
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout
