"""What a program in the making keeps: buffers that grow as they are read, and numbers one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 16  # outputs whose weights lie side by side
ALIGNED = 16  # numbers: where weights begin, 64 bytes of float32


@dataclass
class Buffer:
    """BUFFER_COLUMNS of `fastgen/_schema.py`, but for the offset."""

    channels: int
    height: int
    width: int
    constant: int = -1
    step: int = 1
    rows: int = 1
    left: int = 0
    right: int = 0

    def read(self, dy: int, first: int, last: int, behind: bool) -> None:
        """Columns ``first`` to ``last`` are read, and the row ``dy`` from the newest, or from the one above that by who is ``behind``."""
        self.rows = max(self.rows, 1 - dy + behind)
        self.left, self.right = max(self.left, -first), max(self.right, last - self.width + 1)


class Storage:
    """Buffers, packed weights and parameters: what an instruction says of them is an index or where they begin."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._weights: list[Tensor] = []
        self._parameters: list[Tensor] = []
        self._weight_count = self._parameter_count = 0

    def buffer(self, channels: int, height: int, width: int, *, constant: int = -1, step: int = 1) -> int:
        self.buffers.append(Buffer(channels, height, width, constant, step))
        return len(self.buffers) - 1

    def parameter(self, values: Tensor) -> int:
        self._parameters.append(values.detach().flatten())
        self._parameter_count += values.numel()
        return self._parameter_count - values.numel()

    def pack(self, weight: Tensor) -> int:
        """[O, K] as [panels, K, 16]."""
        outputs, total = weight.shape
        panels = -(-outputs // PANEL)
        packed = weight.new_zeros(panels * PANEL, total)
        packed[:outputs] = weight
        packed = packed.view(panels, PANEL, total).transpose(1, 2).reshape(-1)
        spare = -packed.numel() % ALIGNED
        self._weights += [packed, packed.new_zeros(spare)]
        begin = self._weight_count
        self._weight_count += packed.numel() + spare
        return begin

    def packed_weights(self, dtype: torch.dtype) -> Tensor:
        return _joined(self._weights, dtype)

    def joined_parameters(self, dtype: torch.dtype) -> Tensor:
        return _joined(self._parameters, dtype)

    def offsets(self) -> tuple[list[int], int]:
        """Where each buffer begins in the state of an image, and the size of that; rows are a power of two from here on."""
        offsets, state = [], 0
        for buffer in self.buffers:
            buffer.rows = 1 << (buffer.rows - 1).bit_length()
            offsets.append(state)
            if buffer.constant < 0:
                size = buffer.rows * (buffer.left + buffer.width + buffer.right) * buffer.channels
                state += -(-size // ALIGNED) * ALIGNED
        return offsets, state


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)
