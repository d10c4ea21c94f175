"""Which backend takes a call on a GPU, and why not the others.

On the CPU the dispatcher of torch itself picks (the loaded ISA variant, or the reference). On CUDA the first backend whose
``reasons(op, *args)`` is empty takes the call. The same sentences feed `fastgen doctor`, the warning of a fallback and the
skip messages of tests.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _library, _schema

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class CudaCpp:
    """CUDA C++ kernels of `csrc/cuda`, loaded from ``libfastgen_cuda.so``."""

    name = "cuda"

    @staticmethod
    def reasons(op: str, *args: Any) -> list[str]:
        if not _library.CUDA_LOADED:
            return [_library.FAILURES.get("cuda", "the CUDA library is not loaded")]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{_library.CUDA_NAMESPACE}::{op}", "CUDA"):
            return [f"{op} has no CUDA C++ kernel: Triton takes it"]
        return []

    @staticmethod
    def kernel(op: str) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, _library.CUDA_NAMESPACE), op).default


class Triton:
    """Triton kernels of `kernels/`, installed as ``fastgen.kernels``; imported at the first call that needs one."""

    name = "triton"

    @staticmethod
    def reasons(op: str, *args: Any) -> list[str]:
        """Sentences against a call; without arguments, those against every call."""
        absent = Triton._absent(op)
        return absent if absent or not args else Triton._module(op).reasons(op, *args)

    @staticmethod
    def kernel(op: str) -> Callable[..., Any]:
        return getattr(Triton._module(op), op)

    @staticmethod
    def _module(op: str) -> ModuleType:
        return importlib.import_module(f"fastgen.kernels.{_schema.FAMILY_OF[op]}")

    @staticmethod
    @functools.cache
    def _absent(op: str) -> list[str]:
        """Why there is no Triton function of ``op`` at all."""
        if importlib.util.find_spec("triton") is None:
            return ["triton is not installed"]
        family = _schema.FAMILY_OF[op]
        try:
            module = Triton._module(op)
        except ImportError as error:
            missing = error.name in ("fastgen.kernels", f"fastgen.kernels.{family}")
            return [
                f"{family} has no Triton kernels"
                if missing
                else f"the Triton kernels of {family} failed to load: {error}"
            ]
        return [] if hasattr(module, op) else [f"{op} has no Triton kernel"]


CUDA_BACKENDS = (CudaCpp, Triton)


def cuda_reasons(op: str, *args: Any) -> dict[str, list[str]]:
    """Per CUDA backend the reasons against it; the first with an empty list takes the call."""
    return {backend.name: backend.reasons(op, *args) for backend in CUDA_BACKENDS}


@functools.cache
def warn_once(message: str) -> None:
    """Say that a call does not run as it could, once per op and cause."""
    warnings.warn(f"fastgen: {message}", stacklevel=3)


def cuda_entry(op: str) -> Callable[..., Any]:
    """The function registered for ``op`` under the CUDA key: picks the backend, call by call."""

    def entry(*args: Any) -> Any:
        refusals = []
        for backend in CUDA_BACKENDS:
            reasons = backend.reasons(op, *args)
            if not reasons:
                return backend.kernel(op)(*args)
            refusals += reasons
        warn_once(f"{op} runs on the plain-torch reference: {'; '.join(refusals)}")
        return _library.checked(op)(*args)

    return entry


def register_cuda() -> None:
    """Register the CUDA entries of all raw ops; imports neither CUDA nor Triton."""
    library = torch.library.Library(_schema.NAMESPACE, "IMPL")
    _library._libraries.append(library)
    for op, family in _schema.FAMILY_OF.items():
        if family not in _schema.CPU_ONLY:
            library.impl(op, cuda_entry(op), "CUDA")


def cpu_reasons(*tensors: Tensor | None) -> list[str]:
    """Why the compiled CPU kernels cannot take these tensors."""
    return ([_library.ISA_REASON] if _library.ISA is None else []) + dtype_reasons(tensors)


def dtype_reasons(tensors: Iterable[Tensor | None]) -> list[str]:
    """A sentence for each tensor of a dtype that no kernel takes, on any device."""
    return [
        f"the kernels take float64, float32, bfloat16 and float16, not {tensor.dtype}"
        for tensor in tensors
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES
    ]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call. Without it a call costs about 2 microseconds, with it about 17."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
