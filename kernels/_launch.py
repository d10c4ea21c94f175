"""Starting kernels: on the device of their tensors, and after the first time of a kind past Triton's JIT.

A launch through the JIT finds out what every argument is, writes it into a string and looks the compiled kernel up by that:
about 12 us for 19 arguments, where starting the compiled kernel takes 3 (tritonbench#1005). `launch` keeps what the first call
of a kind compiled, by a key that says what Triton compiles anew for, and starts that.
"""

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

KEPT = 4096  # compiled kernels remembered; Triton itself forgets none, so starting over costs one slow launch each
# `compiled[grid](*arguments)` starts a kernel with every parameter in its place, constants too, in these versions.
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)

_compiled: dict[Any, Any] = {}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it that of ``tensor``."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    num_warps: int,
    enable_fp_fusion: bool,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """``kernel[(programs,)]`` of ``args`` and the named ``constants``, directly where it was compiled for such arguments before.
    ``num_stages`` of loads in flight in a loop are Triton's own choice where not given.

    The interpreter, and a Triton whose compiled kernels may be started in another way, get every launch as it is written.
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if not (DIRECT and isinstance(kernel, JITFunction)):
        kernel[(programs,)](*args, **constants, **options)
        return
    names, general = _parameters(kernel)
    values = tuple(constants[name] for name in names)
    key = (kernel, *options.values(), values, kinds(args, general))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*args, *values)
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    if isinstance(compiled, triton.compiler.CompiledKernel):
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = compiled


def kinds(args: tuple[Any, ...], general: frozenset[int] = frozenset()) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: one entry an argument, equal for two calls that one compiled kernel can serve.

    Of a tensor the device, the dtype and whether it begins at a multiple of 16 bytes; of a number its width and whether it is 1
    or a multiple of 16, but of those at the positions ``general`` the width alone; and where there is None.
    """
    found: list[Any] = []
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            found.append((value.dtype, value.get_device(), value.data_ptr() % 16 == 0))
        elif value is None:
            found.append(None)
        elif isinstance(value, tuple):
            found.append(kinds(value))
        elif type(value) is not int:  # a float is a float, whatever it is
            found.append(type(value))
        elif value == 1 and index not in general:
            found.append("one")
        else:
            width = 32 if -(2**31) <= value < 2**31 else 64 if value < 2**63 else "unsigned"
            found.append(width if index in general or value % 16 else (width, "times 16"))
    return tuple(found)


@functools.cache
def _parameters(kernel: JITFunction) -> tuple[tuple[str, ...], frozenset[int]]:
    """(Names of the constants of ``kernel`` in order, positions of what it is not specialised on)."""
    names = tuple(p.name for p in kernel.params if p.is_constexpr)
    assert all(p.is_constexpr for p in kernel.params[len(kernel.params) - len(names) :]), "constants come last"
    return names, frozenset(p.num for p in kernel.params if p.do_not_specialize)
