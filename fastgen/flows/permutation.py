"""`Permutation`, `Reverse` and `Shift`: channels in another order, whatever the dtype and the device; the log-det is 0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .indices import Indices
from .transform import Context, Transform, no_log_det


class Permutation(Transform):
    """Channel i of the output is channel ``permutation[i]`` of the input.

    Args:
        permutation: of 0 to C - 1; input is [N, C, *].

    Raises:
        ValueError: ``permutation`` is none.
    """

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        super().__init__()
        order = permutation.tolist() if isinstance(permutation, Tensor) else list(permutation)
        if sorted(order) != list(range(len(order))):
            raise ValueError(
                f"{type(self).__name__}: permutation must have each of 0 to {len(order) - 1} once, got {order}"
            )
        self.order = Indices(order)
        self.back = Indices(sorted(range(len(order)), key=order.__getitem__))

    @classmethod
    def random(cls, channels: int, seed: int) -> "Permutation":
        """One drawn with ``seed``, the same on every machine."""
        generator = torch.Generator("cpu").manual_seed(seed)
        return cls(torch.randperm(channels, generator=generator, device="cpu"))

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self._taken(input, self.order), no_log_det(input)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self._taken(input, self.back), no_log_det(input)

    def _taken(self, input: Tensor, order: Indices) -> Tensor:
        _check_channels(self, input, len(order))
        return input.index_select(1, order.values)


class Reverse(Transform):
    """Channel i of the output is channel C - 1 - i of the input, for input [N, C, *] with any C."""

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        _check_channels(self, input, None)
        return input.flip(1), no_log_det(input)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.forward(input, context)


class Shift(Transform):
    """Channel i of the output is channel i - ``by`` of the input, around the end: half of C swaps halves of an even C."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        _check_channels(self, input, None)
        return input.roll(self.by, 1), no_log_det(input)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        _check_channels(self, input, None)
        return input.roll(-self.by, 1), no_log_det(input)

    def extra_repr(self) -> str:
        return f"by={self.by}"


def _check_channels(layer: Transform, input: Tensor, channels: int | None) -> None:
    if input.dim() < 2 or channels not in (None, input.shape[1]):
        wanted = "C" if channels is None else str(channels)
        raise ValueError(f"{type(layer).__name__}: input must be [N, {wanted}, *], got shape {tuple(input.shape)}")
