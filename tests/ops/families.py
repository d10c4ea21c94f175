"""The case files of all op families, found by name: one `tests/ops/<family>_cases.py` feeds the tests of every device.

What a case file may hold, besides the arguments of its own CPU tests:

    example(dtype)      keyword arguments of the public op, its floating tensors in ``dtype``: the dtype policy
    calls()             small :class:`Call` of every raw op, held to the reference in float64: Triton's interpreter, a GPU
    check_*(kernels)    what else the Triton kernels must show there; ``kernels.<op>`` runs one on the device under test
    examples()          further arguments of the public op: between them and the example every tensor argument of the raw ops
                        is given. `tests/ops/raw_calls.py` records what becomes of them, and spoils it
    SAME_ARGUMENTS      raw op that no example reaches -> raw op that is called with the same arguments
    UNSEEN              raw op that is not called under a mode of the dispatcher -> a function that makes arguments of it
    harmless(op, name, how, arguments)
                        whether the raw op may take that argument spoiled so
    unknown_to_fakes(op, name, how)
                        whether only the values of another argument say that it may not, which a fake cannot read
    NO_GRADIENT        True where the op refuses tensors that require them
    OWN_DTYPE           positions of the outputs that do not follow the dtype of the main argument
    REFUSED             further refusals: a raw op, the arguments to change, and what the message says
    MAPPED              :class:`OfTensors` for `vmap`, each of which may be mapped; the main one comes first
    EXPORTED            name -> :class:`OfTensors`, those for a batch of k, which is the first dimension of each
    TWICE               True where the op can be differentiated twice
    counted(step)       the op as a loop calls it that counts its steps up
    gates(arch)         large :class:`Call` that are compiled for sm_``arch`` and not run. A name that ends in fp64 may use
                        fp64 instructions, one that ends in "fp64 table" may round its coefficients, no other may
    STORES_IN_A_LOOP    names of kernels that load again after a store; all others load everything first
    REGISTERS           kernel -> registers a thread that it may use, where that is more than others may
    NO_STORAGE_TYPE     names of kernels that see no operand of the storage type, and so are the same for all of them
    gpu_*()             what the public op must show on a GPU

Checks are plain pytest functions: parametrised by marks, taken over by the file that runs them.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SUFFIX = "_cases"


@dataclass(frozen=True)
class Call:
    """One call of a raw op. Without ``tolerance`` each output is held to the tolerance of its own dtype."""

    name: str
    op: str
    make: Callable[[], tuple[Any, ...]]  # its arguments, on the CPU
    tolerance: torch.dtype | None = None  # float32 where normals, made in float32, enter a float64 output
    least: float = (
        1e-2  # an error is relative to the largest value or this: 1, the size of the terms, for sums that cancel
    )
    cut: int | None = None  # the channel at which outputs are cut in two, each part relative to its own largest value


@dataclass(frozen=True)
class OfTensors:
    """A function of tensors alone, and those tensors for ``k``."""

    function: Callable[..., Any]
    make: Callable[[int], list[Tensor]]


def case_files() -> dict[str, ModuleType]:
    """Family -> its case file."""
    names = sorted(path.stem for path in Path(__file__).parent.glob(f"*{SUFFIX}.py"))
    return {name.removesuffix(SUFFIX): importlib.import_module(f"{__package__}.{name}") for name in names}


def calls(kind: str = "calls", *args: Any) -> Iterator[Call]:
    """All families' ``calls()``, or their ``gates(arch)``."""
    for module in case_files().values():
        yield from getattr(module, kind, lambda *_: ())(*args)


def checks(prefix: str) -> dict[str, Callable[..., None]]:
    """All families' functions that begin with ``prefix``, as pytest wants to find them."""
    return {
        f"test_{family}_{name.removeprefix(prefix)}": function
        for family, module in case_files().items()
        for name, function in vars(module).items()
        if name.startswith(prefix)
    }
