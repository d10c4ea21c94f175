"""Loading: defines the raw ops, gives each its reference and fake, and loads the compiled libraries over them.

A library that fails to load is a line in :data:`FAILURES` (and so in ``fastgen doctor``), never an import error: the
reference answers in its place.
"""

import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _schema

LIBRARY_DIR = Path(__file__).parent / "lib"
CUDA_NAMESPACE = f"{_schema.NAMESPACE}_cuda"  # the CUDA C++ kernels stand beside the Triton ones, not over them

FAILURES: dict[str, str] = {}  # library or variant -> why it is not in use
ISA: str | None = None  # the CPU variant in use, None where only the reference is there
ISA_REASON = "nothing loaded yet"
CUDA_LOADED = False
CPU_LIBRARY: ctypes.CDLL | None = None  # the variant in use, for what is called without the dispatcher

any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

_libraries: list[torch.library.Library] = []  # an op lives as long as the Library that defined it


def reference(op: str) -> ModuleType:
    """The module of :mod:`fastgen.reference` that defines ``op``."""
    return importlib.import_module(f"fastgen.reference.{_schema.FAMILY_OF[op]}")


def find_kernels() -> None:
    """Make ``fastgen.kernels`` importable from a source checkout, where the Triton kernels stand beside the package."""
    checkout = Path(__file__).parent.parent / "kernels"
    installed = Path(__file__).parent / "kernels"
    if not installed.exists() and (checkout / "_launch.py").exists():
        module = ModuleType("fastgen.kernels", "Triton kernels, one file an op family.")
        module.__path__ = [str(checkout)]
        sys.modules["fastgen.kernels"] = module
        setattr(sys.modules[__package__], "kernels", module)  # noqa: B010  (as an import leaves it)


def define() -> None:
    """Define every raw op with its reference (used where no kernel is loaded) and its fake."""
    ops = torch.library.Library(_schema.NAMESPACE, "DEF")
    cuda = torch.library.Library(CUDA_NAMESPACE, "DEF")
    _libraries.extend((ops, cuda))
    for op, family in _schema.FAMILY_OF.items():
        schema = op + _schema.SCHEMAS[family][op]
        ops.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        cuda.define(schema)
        ops.impl(op, checked(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_schema.NAMESPACE}::{op}", checked(op, "_fake"), lib=ops)
        if not getattr(torch.ops.fastgen, op).default._schema.is_mutable:
            torch.library.register_vmap(f"{_schema.NAMESPACE}::{op}", _one_by_one(op), lib=ops)


def checked(op: str, kind: str = "") -> Callable[..., Any]:
    """The reference of ``op``, or its ``"_fake"``, once its check has seen the arguments: what a kernel refuses, these refuse."""
    check, function = (getattr(reference(op), name) for name in (f"{op}_check", op + kind))

    def call(*args: Any) -> Any:
        check(*args)
        if not any_autocast():
            return function(*args)
        device = next((arg.device.type for arg in args if isinstance(arg, torch.Tensor)), "cpu")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):  # the op has its dtypes, and sums in float32
            return function(*args)

    return call


def _one_by_one(op: str) -> Callable[..., Any]:
    """The batching rule of `torch.func.vmap`: the op for each slice in turn; inside a slice the samples go together."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        function = getattr(torch.ops.fastgen, op).default

        def slice_of(arg: Any, dim: Any, i: int) -> Any:
            if isinstance(arg, list):
                return [slice_of(a, d, i) for a, d in zip(arg, dim or [None] * len(arg), strict=True)]
            return arg if dim is None else arg.select(dim, i)

        if info.batch_size == 0:
            raise RuntimeError(f"{op}: a vmap over a dimension of size 0 has no result to take the shape from")
        slices = ([slice_of(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(info.batch_size))
        results = [function(*given) for given in slices]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def implement(op: str, function: Callable[..., Any]) -> None:
    """Give ``op`` a CPU kernel in Python: one that chooses among compiled ones by what they cannot see."""
    library = torch.library.Library(_schema.NAMESPACE, "IMPL")
    _libraries.append(library)
    library.impl(op, function, "CPU")


def load() -> None:
    """Load the best CPU variant of this machine, or the one that ``FASTGEN_ISA`` names, and the CUDA library if built."""
    global ISA, ISA_REASON, CPU_LIBRARY, CUDA_LOADED
    try:
        _cpu = importlib.import_module("fastgen._cpu")
    except ImportError as error:
        FAILURES["cpu"] = ISA_REASON = f"the compiled extension is not installed: {error}"
    else:
        ISA, ISA_REASON = _load_cpu(_cpu)
        CPU_LIBRARY = None if ISA is None else ctypes.CDLL(str(LIBRARY_DIR / f"libfastgen_{ISA}.so"))
    cuda = LIBRARY_DIR / "libfastgen_cuda.so"
    if cuda.exists():
        CUDA_LOADED = _try_load("cuda", cuda)
    else:
        FAILURES["cuda"] = "the CUDA library was not built (FASTGEN_CUDA=1 at build time, with nvcc on PATH, builds it)"


def _load_cpu(cpu: ModuleType) -> tuple[str | None, str]:
    if os.environ.get("FASTGEN_ISA") == "reference":
        return None, "FASTGEN_ISA=reference"
    supported: list[str] = cpu.supported_isas()  # best first
    wanted = os.environ.get("FASTGEN_ISA")
    if wanted is not None and wanted not in supported:
        known = ", ".join(cpu.known_isas())
        FAILURES[wanted] = f"FASTGEN_ISA={wanted}: this CPU cannot run it, or it is none of {known}"
        warnings.warn(f"fastgen: {FAILURES[wanted]}; taking the best of {', '.join(supported)}", stacklevel=2)
        wanted = None
    for isa in [wanted] if wanted else supported:
        path = LIBRARY_DIR / f"libfastgen_{isa}.so"
        if not path.exists():
            FAILURES[isa] = f"not built: {path.name} is not there"
        elif _try_load(isa, path):
            return isa, f"FASTGEN_ISA={wanted}" if wanted else "the best this CPU runs among those built"
    return None, "no CPU variant could be loaded"


def _try_load(name: str, path: Path) -> bool:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        FAILURES[name] = str(error)
        return False
    return True
