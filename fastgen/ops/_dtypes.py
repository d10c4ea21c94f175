"""One policy, on every device, for floating dtypes that no kernel takes, such as float8: float32 copies, and one warning.

Every value of such a dtype is a float32 value, so a copy loses nothing; outputs in the dtype of the main argument are rounded
once. What is not a floating-point tensor is a TypeError of the op's own checks, which name the argument.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch


def foreign(*tensors: Tensor | None) -> bool:
    """Whether one of ``tensors`` has a dtype that no kernel takes."""
    for tensor in tensors:  # noqa: SIM110  (a generator costs as much as the op's other checks)
        if tensor is not None and tensor.dtype not in _dispatch.KERNEL_DTYPES:
            return True
    return False


def in_float32(op: str, function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """``function`` of raw arguments, with a float32 copy of each that is foreign; its outputs in ``dtype``, where one is given."""

    def copied(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [copied(v) for v in value]
        if not isinstance(value, Tensor) or not value.is_floating_point() or not foreign(value):
            return value
        if not torch.compiler.is_compiling():  # a warning would break the graph
            _dispatch.warn_once(f"{op} computes with a float32 copy: no kernel takes {value.dtype}")
        return value.float()

    def call(*args: Any) -> Any:
        outputs = function(*map(copied, args))
        if dtype is None:
            return outputs
        return outputs.to(dtype) if isinstance(outputs, Tensor) else tuple(output.to(dtype) for output in outputs)

    return call
