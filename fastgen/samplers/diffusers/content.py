"""The attributes of a scheduler by their content: as keys, and as copies."""

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .symbolic import NotLinear

PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, type})


def is_operand(value: Any) -> bool:
    """Whether an attribute is one of the tensors that steps work on; those of a schedule have one dimension at most."""
    return isinstance(value, Tensor) and value.dim() > 1


def key_of(name: str, value: Any) -> Any:
    """The content of a value, as something hashable.

    Raises:
        NotLinear: it is of another kind than the attributes of a schedule are.
    """
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, Tensor):
        if is_operand(value):
            return "operand", value.dtype
        content = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return value.dtype, value.shape, value.device, content
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return tuple([key_of(name, element) for element in value])
    if isinstance(value, FunctionType):  # one that closes over nothing is what its code is: schedulers make them anew
        if value.__closure__ or value.__kwdefaults__:
            return value
        return value.__code__, key_of(name, value.__defaults__), id(value.__globals__)
    if isinstance(value, Mapping):  # a configuration; what begins with a line is not its scheduler's
        return tuple([(k, key_of(name, v)) for k, v in value.items() if not str(k).startswith("_")])
    raise NotLinear(f"{name} is a {type(value).__name__}")


def fresh(value: Any) -> Any:
    """The same content in memory of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return [fresh(element) for element in value] if type(value) is list else value
