"""CUDA C++ without a GPU: its arithmetic on the host, and that its library builds and loads where torch has no CUDA."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastgen.reference.philox_normal import philox_normal

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

SHIM = """
#include "common/philox_scalar.h"
extern "C" void fill(float* out, std::uint64_t seed, std::uint32_t step, std::int64_t first, std::int64_t blocks) {
  for (std::int64_t b = 0; b < blocks; ++b)
    fastgen::scalar::normals_4(static_cast<std::uint64_t>(first + b), step, seed, out + 4 * b);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_scalar_normals_are_those_of_the_reference(tmp_path):
    (tmp_path / "shim.cpp").write_text(SHIM)
    library = tmp_path / "shim.so"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O2", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", tmp_path / "shim.cpp", "-o", library],
        check=True,
    )
    fill = ctypes.CDLL(str(library)).fill
    for seed, step in ((0, 0), (-5, -1), (2**40 + 3, 7)):
        actual = torch.full((1, 40_000), float("nan"))
        arguments = (seed % 2**64, step % 2**32, 0, actual.numel() // 4)
        kinds = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64)
        fill(ctypes.c_void_p(actual.data_ptr()), *(kind(value) for kind, value in zip(kinds, arguments, strict=True)))
        expected = philox_normal(torch.tensor([seed]), (1, 40_000), step).double()
        error = (actual.double() - expected).abs() / expected.abs().clamp_min(1e-3)
        assert error.max() <= 5e-7


LOADING = """
import sys, torch, fastgen
torch.ops.load_library(sys.argv[1])
has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen_cuda::{op}", "CUDA")
assert has("philox_normal") and not has("group_norm_fwd")
"""


def built(folder: Path) -> Path:
    """The library, built in ``folder``; or as it was built before from the same sources by the same tools."""
    sources = (path for part in ("common", "cuda") for path in sorted((ROOT / "csrc" / part).rglob("*.*")))
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [torch.__version__, version, *(path.read_text() for path in (ROOT / "setup.py", *sources))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    kept = ROOT / f".cache/cuda/{key}.so"
    if kept.exists():
        return kept
    environment = {**os.environ, "FASTGEN_CUDA": "1", "FASTGEN_CUDA_ARCHS": "90", "FASTGEN_ISA_BUILD": "portable"}
    program = (
        "import runpy, sys; sys.argv = ['setup.py']; from pathlib import Path; import setuptools; "
        "setuptools.setup = lambda **_: None; names = runpy.run_path('setup.py'); "
        f"build = names['describe_build'](Path({str(folder)!r}), Path({str(folder / 'objects')!r})); "
        "build.compilations = [c for c in build.compilations if '/cuda/' in c[0]]; "
        "build.links = [c for c in build.links if 'cuda' in c[0]]; "
        f"Path({str(folder / 'lib')!r}).mkdir(); sys.exit(build.run_plainly())"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".tmp", delete=False) as temporary:
        temporary.write((folder / "lib/libfastgen_cuda.so").read_bytes())
    os.replace(temporary.name, kept)
    return kept


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_the_library_builds_and_loads_without_cuda_in_torch(tmp_path):
    library = built(tmp_path)
    loaded = subprocess.run([sys.executable, "-c", LOADING, library], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    nm = shutil.which("nm")
    if nm is not None:
        symbols = subprocess.run(
            [nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        foreign = [
            line for line in symbols.splitlines() if "cuda" in line and "aoti_torch_device_type_cuda" not in line
        ]
        assert not foreign, f"symbols that only a CUDA torch or runtime has: {foreign}"
        assert "c10" not in symbols and "at6native" not in symbols and "_Py" not in symbols
