"""Compiles every Triton kernel for one architecture without a GPU and prints what it costs, as JSON lines.

Run as `python -m tests.kernels.compile_worker 90`. What is called stands in the `gates` of the case files,
`tests/ops/<family>_cases.py`. The launchers themselves are called, with CPU tensors; instead of running,
each launch is compiled for the arguments it was given, specialised as Triton specialises them: 1 becomes a constant, multiples
of 16 and aligned pointers are known to be so. So a kernel is compiled exactly as calls compile it.
"""

import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastgen.kernels
from fastgen import _dispatch
from tests.kernels import records
from tests.ops import families

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def source_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """What Triton would compile for this launch."""
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k not in OPTIONS})
    signature, constants, attributes = {}, {}, {}

    def specialise(value: Any, path: tuple[int, ...], fixed: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise(v, (*path, i), fixed) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = ALIGNED
            return POINTERS[value.dtype]
        if isinstance(value, float) and not kernel.params[path[0]].is_constexpr:
            return "fp32"
        if isinstance(value, int) and not isinstance(value, bool) and (value != 1 or fixed):
            if value % 16 == 0 and not fixed:
                attributes[path] = ALIGNED
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        constants[path] = value
        return "constexpr"

    for index, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = specialise(value, (index,), parameter.do_not_specialize)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


@contextlib.contextmanager
def launches(found: Callable[[JITFunction, ASTSource, dict[str, Any]], None]) -> Iterator[None]:
    """Hands every launch inside to ``found`` instead of a GPU."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found(self, source_of(self, args, kwargs), {key: kwargs[key] for key in OPTIONS if key in kwargs})

    with mock.patch.object(JITFunction, "run", run):
        yield


def kernels() -> Iterator[JITFunction]:
    """Every kernel there is: the jitted functions of `fastgen.kernels` whose names end in `_kernel`."""
    for file in sorted(Path(fastgen.kernels.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"fastgen.kernels.{file.stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__:
                yield value


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def main(arch: int) -> None:
    seen = set()
    case = ""

    def compile_launch(kernel: JITFunction, source: ASTSource, options: dict[str, Any]) -> None:
        key = (source.hash(), str(options))
        if key in seen:
            return
        seen.add(key)
        record = {"case": case, "kernel": name_of(kernel), "arch": arch, **options}
        print(json.dumps(record | records.record_of(source, arch, options)), flush=True)

    for call in families.calls("gates", arch):
        case = call.name
        with launches(compile_launch):
            _dispatch.Triton.kernel(call.op)(*call.make())
    print(json.dumps({"all kernels": sorted(map(name_of, kernels()))}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
