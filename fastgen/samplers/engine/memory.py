"""Whether a step may write over its sample: fresh memory of the size of a batch costs more than the step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def nobody_else_holds(tensor: Tensor) -> bool:
    """Whether no other tensor shares the memory of ``tensor``: a view of it, or itself detached.

    Names that refer to the same tensor object are not counted. torch tells by a private name only; where that is missing the
    answer is no, and the caller takes fresh memory.
    """
    count = _count_of_uses()
    return count is not None and count(tensor) == _uses_of_a_lone_tensor()


def _count_of_uses() -> Callable[[Tensor], int] | None:
    of_storage: Any = getattr(torch._C, "_storage_Use_Count", None)
    return None if of_storage is None else lambda tensor: of_storage(tensor.untyped_storage()._cdata)


@functools.cache
def _uses_of_a_lone_tensor() -> int:
    count = _count_of_uses()
    return 0 if count is None else count(torch.empty(1))
