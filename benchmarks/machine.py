"""The machine of a run: what it is, what software is on it, and its own limits (GEMM rate), measured in the same run."""

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen import _library

from .cases import DTYPES, random_tensor

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "diffusers", "pytest-benchmark", "matplotlib")
GENERATED = ("benchmarks/results", "benchmarks/README.md", "README.md")  # a run and its report change these
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_CPU_ISAS = {"avx512f": "avx512", "avx2": "avx2", "sve": "sve", "asimd": "neon"}  # the widest first
_CPU_FAMILIES = ("epyc", "xeon", "ryzen", "threadripper", "core")


def describe(device: torch.device) -> dict[str, Any]:
    """CPU, memory, caches and, with CUDA, the GPU."""
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M) or [""])[0].split())
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    facts: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "caches": _caches(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device.type,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = gpu.name
        facts["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        facts["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        facts["multiprocessors"] = gpu.multi_processor_count
    return facts


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastgen": fastgen.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # the metadata lacks the build (+cpu, +cu130)
    return found


def name(device: torch.device) -> str:
    """The folder of this machine's results: `epyc-avx2-2-threads`, or the GPU's name."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_properties(device).name)
    facts = describe(device)
    maker = next((word for word in _CPU_FAMILIES if word in facts["cpu"].lower()), _slug(facts["cpu"]))
    widest = next((isa for flag, isa in _CPU_ISAS.items() if flag in facts["cpu_flags"]), platform.machine())
    threads = torch.get_num_threads()
    return f"{maker}-{widest}-{threads}-thread{'s' if threads > 1 else ''}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The commit of a checkout, and whether files other than the results and the pages made of them differ from it; id None
    outside git."""
    try:
        changed = _git(root, "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in GENERATED))
        return {
            "id": _git(root, "rev-parse", "HEAD"),
            "time": _git(root, "show", "-s", "--format=%cI"),
            "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(changed),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "time": None, "branch": None, "dirty": None}


def fastgen_build() -> dict[str, Any]:
    """Which kernels answered: the ISA variant and why, and the CUDA library."""
    return {"isa": _library.ISA, "isa_reason": _library.ISA_REASON, "cuda_library": _library.CUDA_LOADED}


def load_average() -> list[float] | None:
    """1, 5 and 15 minute load: a figure well above the threads of the run says the machine was not quiet."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def resident_bytes() -> int:
    """Of this process, as it is now; 0 where the system does not say."""
    fields = _read("/proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def gemm_rate(device: torch.device, dtype: str, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, the median of several."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = random_tensor((size, size), device, dtype, seed=1)
    b = random_tensor((size, size), device, dtype, seed=2)
    times = []
    for _ in range(7):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def gemm_rates(device: torch.device) -> dict[str, float]:
    """GEMM rates in FLOP/s per dtype; fp16 only on a GPU, where it matters."""
    return {d: gemm_rate(device, d) for d in DTYPES if d != "fp16" or device.type == "cuda"}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _read(index / "type").strip(), _read(index / "level").strip()
        if kind in ("Data", "Unified"):
            caches[f"L{level}"] = _read(index / "size").strip()
    return caches


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True).stdout.strip()
