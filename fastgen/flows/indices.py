"""`Indices`: a constant list of channels as a module, on the device of the model that holds it."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Indices(nn.Module):
    """``values``, int64: a buffer that follows its model, and stands in no state dict, since its model's config says it.

    It keeps its numbers beside the buffer: a model built on the meta device gets them back with its first real device.
    """

    values: Tensor

    def __init__(self, values: Iterable[int]) -> None:
        super().__init__()
        self._list = [int(value) for value in values]
        self.register_buffer("values", torch.tensor(self._list, dtype=torch.int64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            moved = fn(self.values[:0])
        except NotImplementedError:  # nothing can be copied out of the meta device
            moved = fn(torch.empty(0, dtype=torch.int64, device="cpu"))
        if moved.device != self.values.device:
            self.values = torch.tensor(self._list, dtype=torch.int64, device=moved.device)
        return self

    def __len__(self) -> int:
        return len(self._list)

    def extra_repr(self) -> str:
        shown = [str(value) for value in self._list[:4]]
        return ", ".join([*shown, *(["..."] if len(self) > 4 else []), f"{len(self)} in all"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Nothing to load."""
