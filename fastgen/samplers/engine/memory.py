"""Whether a step may write over its sample: fresh memory of the size of a batch costs more than the step."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def nobody_else_holds(tensor: Tensor) -> bool:
    """Whether nothing else shares the memory of ``tensor``: no view of it, nor itself detached, nor its storage by itself.

    Names that refer to the same tensor object are not counted. torch tells by a private name only; where that is missing the
    answer is no, and the caller takes fresh memory.
    """
    count = _count_of_uses()
    return count is not None and count(tensor) == _uses_of_a_lone_tensor()


def _count_of_uses() -> Callable[[Tensor], tuple[int, int]] | None:
    """Counts tensors that share a storage, and Python's references to the storage as an object."""
    of_storage: Any = getattr(torch._C, "_storage_Use_Count", None)
    if of_storage is None:
        return None

    def count(tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        return of_storage(storage._cdata), sys.getrefcount(storage)

    return count


@functools.cache
def _uses_of_a_lone_tensor() -> tuple[int, int]:
    count = _count_of_uses()
    return (0, 0) if count is None else count(torch.empty(1))


class Recycled:
    """Memory for outputs that are as large as a batch, from earlier ones that nobody holds any more.

    Fresh memory of that size comes from the system page by page, which costs as much as a step. What is handed out is an alias;
    as long as a tensor of the caller's shares it, views and exports included, it is not handed out again.

    Args:
        limit: how many are remembered; the oldest is forgotten, and freed by whoever holds it.
    """

    SMALL = 1 << 17  # bytes, below which an allocator hands out memory that it has kept

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._own: list[tuple[tuple[Any, ...], Tensor]] = []

    def keeps(self, tensor: Tensor) -> bool:
        """Whether memory of this size and place is worth being handed out again."""
        return tensor.nbytes >= self.SMALL and tensor.is_cpu

    def like(self, tensor: Tensor) -> Tensor:
        """Uninitialised, as ``torch.empty_like(tensor)``."""
        if not self.keeps(tensor):
            return torch.empty_like(tensor)
        kind = tensor.shape, tensor.stride(), tensor.dtype, torch.is_inference_mode_enabled()
        for known, own in self._own:
            if known == kind and nobody_else_holds(own):
                return own.detach()
        self._own = self._own[1 - self._limit :]
        self._own.append((kind, torch.empty_like(tensor)))
        return self._own[-1][1].detach()

    def release(self) -> None:
        """Forget all of them: what nobody holds is freed."""
        self._own = []
