"""Calling an autograd Function without the toll torch takes at every call; by private names of torch, with a public fallback."""

from typing import Any

import torch

from ._watchers import transforms_active


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a Function with ``setup_context`` and no default arguments.

    torch binds default arguments by `inspect.signature` at each call: 34 of the 48 microseconds of a tiny forward. Only
    functorch's transforms and the compiler, which look at ``apply`` itself, get the long way, and everybody where this torch
    has no shorter one.
    """
    if not _HAS_DIRECT or torch.compiler.is_compiling() or transforms_active():
        return function.apply(*args)
    return _direct_apply(function, *args)


def _direct_apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The C function below `Function.apply`, which that calls once it has seen to transforms and default arguments."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def direct_apply_works() -> bool:
    """Whether this torch has the shorter way, tried on a Function that doubles a number; no backward, which would start threads."""
    if not hasattr(torch._C, "_are_functorch_transforms_active"):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            y = _direct_apply(_Double, torch.ones((), device="cpu", requires_grad=True))
        return isinstance(y, torch.Tensor) and type(y.grad_fn).__name__ == "_DoubleBackward"
    except (AttributeError, TypeError, RuntimeError):
        return False


_HAS_DIRECT = direct_apply_works()
