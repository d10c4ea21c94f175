"""Calling an autograd Function without the toll that torch takes at every call."""

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a Function with ``setup_context`` and no default arguments.

    torch binds default arguments by `inspect.signature` at each call: 34 of the 48 microseconds of a tiny forward. Only
    functorch's transforms and the compiler, which look at ``apply`` itself, get the long way.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
