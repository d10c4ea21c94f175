"""`uncompiled`: `torch.compiler.disable` without its import of torch._dynamo, which takes seconds, before anything is compiled."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """``function``, which `torch.compile` leaves alone: it is called between two compiled parts."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return cast(Function, call)
