"""Compiles every Triton kernel for one architecture without a GPU and prints what it costs, as JSON lines.

Run as `python -m tests.kernels.compile_worker 90`. The launchers themselves are called, with CPU tensors; instead of running,
each launch is compiled for the arguments it was given, specialised as Triton specialises them: 1 becomes a constant, multiples
of 16 and aligned pointers are known to be so. So a kernel is compiled exactly as calls compile it.
"""

import contextlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastgen  # noqa: F401  (makes fastgen.kernels importable)
from fastgen.kernels import diffusion_loss, group_norm, philox_normal, q_sample, sampler_step

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
}  # fmt: skip
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
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


def _image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    x = torch.zeros(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, channels_last: bool, full: bool) -> None:
    x = _image(shape, dtype, channels_last)
    n, c = shape[:2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = [torch.zeros(size, dtype=wide) if full else None for size in ((c,), (c,), (n, c), (n, c), (n, c))]
    _, mean, rstd = group_norm.group_norm_fwd(x, groups, *params, 1e-5, int(full))
    group_norm.group_norm_bwd(x, x, mean, rstd, groups, *params, int(full))


def _sampler_step(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, full: bool, table_dtype: torch.dtype
) -> None:
    x = _image(shape, dtype, channels_last)
    table = torch.zeros(2, 27, dtype=table_dtype)
    if full:
        seeds = torch.zeros(shape[0], dtype=torch.int64)
        sampler_step.sampler_step_fwd(
            x, x, table, 1, x, [x] * 4, None, seeds, x, x, x, x, torch.zeros(shape[0]), True, True
        )
    else:
        sampler_step.sampler_step_fwd(x, x, table, 0, None, [], x, None, None, None, None, None, None, False, False)


def _q_sample(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, table_dtype: torch.dtype) -> None:
    x = _image(shape, dtype, channels_last)
    t, seeds = torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[0], dtype=torch.int64)
    tables = torch.zeros(1000, dtype=table_dtype), torch.zeros(1000, dtype=table_dtype)
    for target in (-1, 2):
        q_sample.q_sample_fwd(x, t, *tables, None, seeds, 5, target)
        q_sample.q_sample_fwd(x, t, *tables, x, None, 0, target)
        q_sample.q_sample_bwd(x, x if target >= 0 else None, t, *tables, target, True, True)


def _table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _diffusion_loss(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    hybrid: bool,
    prediction: int,
    table_dtype: torch.dtype,
) -> None:
    n, c, *spatial = shape
    x, model = _image(shape, dtype, channels_last), _image((n, (1 + hybrid) * c, *spatial), dtype, channels_last)
    table, bound = torch.zeros(1000, dtype=table_dtype), torch.zeros(1000, 3, dtype=table_dtype) if hybrid else None
    weights = table if hybrid else None
    arguments = (model, x, x, torch.zeros(n, dtype=torch.int64), table, table, weights, bound, prediction, 0.001)
    losses = diffusion_loss.diffusion_loss_fwd(*arguments)
    diffusion_loss.diffusion_loss_bwd(losses, *arguments)


def cases(arch: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and call of what is compiled. Everything for sm_90; the others leave out what differs in loads and stores alone."""
    for dtype, name in NAMES.items():
        for layout in ("contiguous", "channels-last"):
            last = layout == "channels-last"
            yield f"split {layout} {name}", lambda d=dtype, cl=last: _group_norm((2, 320, 64, 64), 32, d, cl, True)
            if arch == 90 or dtype in (torch.bfloat16, torch.float64):
                yield f"whole {layout} {name}", lambda d=dtype, cl=last: _group_norm((2, 320, 16, 16), 32, d, cl, True)
            yield (
                f"step {layout} {name}",
                lambda d=dtype, cl=last: _sampler_step((2, 4, 64, 64), d, cl, True, torch.float32),
            )
            yield f"noising {layout} {name}", lambda d=dtype, cl=last: _q_sample((2, 4, 64, 64), d, cl, _table_dtype(d))
            for hybrid in (False, True):
                prediction = 2 if last else 0
                yield (
                    f"{'hybrid ' * hybrid}loss {layout} {name}",
                    lambda d=dtype, cl=last, h=hybrid, p=prediction: _diffusion_loss(
                        (2, 4, 64, 64), d, cl, h, p, _table_dtype(d)
                    ),
                )
        # the largest groups that one program takes, forward and backward
        yield f"largest forward {name}", lambda d=dtype: _group_norm((2, 512, 32, 32), 32, d, False, True)
        yield f"largest backward {name}", lambda d=dtype: _group_norm((2, 256, 32, 32), 32, d, False, True)
        yield f"plain step {name}", lambda d=dtype: _sampler_step((2, 4, 64, 64), d, False, False, torch.float32)
    single = torch.float32
    yield "one of everything", lambda: _group_norm((1, 1, 1, 1), 1, single, False, True)
    yield "bare batch of one, odd sizes", lambda: _group_norm((1, 33, 77, 77), 3, single, False, False)
    yield "odd sizes, channels-last", lambda: _group_norm((1, 33, 77, 77), 3, single, True, True)
    yield "odd step, fp64 table", lambda: _sampler_step((1, 3, 7, 5), single, True, True, torch.float64)
    yield "odd noising, fp64 table", lambda: _q_sample((1, 3, 7, 5), single, True, torch.float64)
    yield "odd loss, fp64 table", lambda: _diffusion_loss((1, 3, 7, 5), single, True, True, 3, torch.float64)
    yield "normals", lambda: philox_normal.philox_normal(torch.zeros(2, dtype=torch.int64), (2, 4096), 1)
    yield "normals, odd", lambda: philox_normal.philox_normal(torch.zeros(1, dtype=torch.int64), (1, 33), -1)


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main(arch: int) -> None:
    seen = set()
    case = ""

    def compile_launch(kernel: JITFunction, source: ASTSource, options: dict[str, Any]) -> None:
        key = (source.hash(), str(options))
        if key in seen:
            return
        seen.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        instructions = re.findall(r"^\s+(?:@%p\d+ )?(\S*\.f64\S*)", compiled.asm["ptx"], re.MULTILINE)
        record = {"case": case, "kernel": kernel.fn.__name__, "arch": arch, **options, "f64": sorted(set(instructions))}
        print(json.dumps(record | _resources(compiled.asm["cubin"])), flush=True)

    for name, call in cases(arch):
        case = name
        with launches(compile_launch):
            call()


if __name__ == "__main__":
    main(int(sys.argv[1]))
