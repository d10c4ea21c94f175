"""Compiles every Triton kernel for one architecture without a GPU and prints what it costs, as JSON lines.

Run as `python -m tests.kernels.compile_worker 90`, or with a dtype after it for the gates of that alone. What is called stands in
the `gates` of the case files, `tests/ops/<family>_cases.py`. The launchers themselves are called, with CPU tensors; instead of
running, each launch is compiled for the arguments it was given, specialised as Triton specialises them: 1 becomes a constant,
multiples of 16 and aligned pointers are known to be so. So a kernel is compiled exactly as calls compile it; for sm_90 also as
calls do whose tensors begin off 16 bytes.
"""

import contextlib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
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
    torch.int32: "*i32", torch.uint8: "*u8",
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
            if value.data_ptr() % 16 == 0:
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


def vectors_of(args: tuple[Any, ...], kwargs: dict[str, Any], programs: int) -> dict[int, int]:
    """Of a launch whose operands lie in order and aligned, width -> bytes a thread that it should move in accesses of that width
    or more: 16 bytes where a thread has as much of an operand, else all it has. The operands are the tensors with (nearly, tiles
    are padded) an element or more for each element of all tiles; the tile is the product of the constants named BLOCK."""
    tile = math.prod(value for name, value in kwargs.items() if name.startswith("BLOCK"))
    found: dict[int, int] = {}
    for value in (v for arg in args for v in (arg if isinstance(arg, tuple) else (arg,))):
        if isinstance(value, Tensor) and 2 * value.numel() >= programs * tile:
            held = tile * value.element_size() // (32 * kwargs["num_warps"])
            if held >= 4 and (held, value.element_size()) != (8, 8):  # `ptx.widths` counts no single fp64
                found[min(held, 16)] = found.get(min(held, 16), 0) + held
    return found


@contextlib.contextmanager
def launches(found: Callable[[JITFunction, ASTSource, dict[str, Any], dict[int, int]], None]) -> Iterator[None]:
    """Hands every launch inside to ``found`` instead of a GPU: the kernel, what is compiled, its options and `vectors_of` it."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs[key] for key in OPTIONS if key in kwargs}
        found(self, source_of(self, args, kwargs), options, vectors_of(args, kwargs, math.prod(grid)))

    with mock.patch.object(JITFunction, "run", run):
        yield


def misaligned(value: Any) -> Any:
    """The tensors of ``value`` one element behind a multiple of 16 bytes, their strides as they were."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(misaligned, value))
    if not isinstance(value, Tensor):
        return value
    extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    moved = torch.zeros(extent + 1, dtype=value.dtype).as_strided(value.shape, value.stride(), 1)
    return (
        moved.copy_(value) if value.dtype == torch.int64 and value.is_contiguous() else moved
    )  # what a launcher may read


def modules() -> list[ModuleType]:
    """Every file of `fastgen.kernels`."""
    files = sorted(Path(fastgen.kernels.__path__[0]).glob("*.py"))
    return [importlib.import_module(f"fastgen.kernels.{file.stem}") for file in files]


def kernels() -> Iterator[JITFunction]:
    """Every kernel there is: the jitted functions of `fastgen.kernels` whose names end in `_kernel`."""
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__:
                yield value


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def main(arch: int, dtype: str = "") -> None:
    for module in modules():
        records.forget_lines(module)
    seen = set()
    case, aligned = "", True

    def compile_launch(
        kernel: JITFunction, source: ASTSource, options: dict[str, Any], vectors: dict[int, int]
    ) -> None:
        key = (source.hash(), str(options))
        if key in seen:
            return
        seen.add(key)
        record = {
            "case": case,
            "kernel": name_of(kernel),
            "arch": arch,
            **options,
            "aligned": aligned,
            "vectors": vectors,
        }
        print(json.dumps(record | records.record_of(source, arch, options)), flush=True)

    for call in families.calls("gates", arch):
        if not call.name.endswith(dtype):
            continue
        # what is loaded element by element differs little from one architecture and dtype to the next
        for aligned in (True, False) if arch == 90 and call.name.endswith("bf16") else (True,):
            case = call.name
            arguments = call.make()
            with launches(compile_launch):
                _dispatch.Triton.kernel(call.op)(*(arguments if aligned else misaligned(arguments)))
    print(json.dumps({"all kernels": sorted(map(name_of, kernels()))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
