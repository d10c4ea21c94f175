"""Raw ops as the public ops call them, recorded family by family, and the same calls with one tensor spoiled.

What is recorded comes from the case files: ``example``, ``examples``, ``SAME_ARGUMENTS``, ``UNSEEN``; so does what still fits
when it is spoiled, ``harmless``. Kernels, references, fakes and Triton's launchers are all asked to refuse the rest.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastgen
from fastgen import _schema

from .families import case_files

FAMILIES = case_files()


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every raw op that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _schema.NAMESPACE:
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


def recorded_calls() -> dict[str, list[tuple]]:
    """Raw op -> what it was called with, with gradients and without."""
    calls: dict[str, list[tuple]] = {op: [] for op in _schema.FAMILY_OF}
    for family, module in FAMILIES.items():
        for named in [module.example(torch.float32), *getattr(module, "examples", list)()]:
            main = next((name for name, value in named.items() if is_floating(value)), None)
            differentiable = main is not None and "out" not in named and not hasattr(module, "NO_GRADIENT")
            for gradients in (False, True) if differentiable else (False,):
                given = {**named, main: named[main].clone().requires_grad_()} if gradients else named
                with Recorder() as recorder:
                    results = tree_flatten(getattr(fastgen.ops, family)(**given))[0]
                    if gradients:
                        sum(r.sum() for r in results).backward()
                for op, args in recorder.calls:
                    calls[op].append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        for op, other in getattr(module, "SAME_ARGUMENTS", {}).items():
            calls[op] = calls[other]
        for op, make in getattr(module, "UNSEEN", {}).items():
            calls[op] = [make()]
    return calls


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


CALLS = recorded_calls()


def arguments(op: str, kind: str = "") -> list[str]:
    """The names of the arguments of ``op`` whose types contain ``kind``."""
    return [a.name for a in getattr(torch.ops.fastgen, op).default._schema.arguments if kind in str(a.type)]


def changed(op: str, args: tuple, changes: dict[str, Any]) -> tuple:
    """``args`` of ``op`` with some of them, by name, given otherwise."""
    return tuple(changes.get(name, value) for name, value in zip(arguments(op), args, strict=True))


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"dimension {d} too short": lambda t, d=d: t.narrow(d, 0, t.shape[d] - 1) for d in range(4)},
    **{f"dimension {d} empty": lambda t, d=d: t.narrow(d, 0, 0) for d in range(4)},
    **{f"dimension {d} of one": lambda t, d=d: t.narrow(d, 0, 1) for d in range(4)},
    **{f"dimension {d} too long": lambda t, d=d: torch.cat([t, t], d) for d in range(4)},
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "a scalar": lambda t: t.flatten()[0],
    "integers": lambda t: t.long() if t.is_floating_point() else t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "the meta device": lambda t: t.to("meta"),
}


def spoiled(op: str) -> Iterator[tuple[str, str, tuple]]:
    """(argument, what is wrong with it, all arguments), one tensor at a time."""
    harmless = getattr(FAMILIES[_schema.FAMILY_OF[op]], "harmless", lambda *_: False)
    for args in CALLS[op]:
        leaves, tree = tree_flatten(args)
        names = [
            name
            for name, value in zip(arguments(op), args, strict=True)
            for _ in (value if isinstance(value, list) else [value])
        ]
        for i, leaf in enumerate(leaves):
            for how, change in SPOILED.items():
                if not isinstance(leaf, Tensor) or (how.startswith("dimension") and int(how.split()[1]) >= leaf.dim()):
                    continue
                if how.endswith("of one") and leaf.shape[int(how.split()[1])] == 1:
                    continue
                if not harmless(op, names[i], how, dict(zip(arguments(op), args, strict=True))):
                    yield names[i], how, tree_unflatten([*leaves[:i], change(leaf), *leaves[i + 1 :]], tree)
