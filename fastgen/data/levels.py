"""Grey levels of images in [-1, 1], where level k of K is ``2 k / (K - 1) - 1``, and in [0, 1), as flows have them dequantised.

There a level is an interval: k is every number in [k / K, (k + 1) / K).
"""

from torch import Tensor


def to_levels(images: Tensor, levels: int) -> Tensor:
    """The levels 0 to K - 1 of ``images`` in [-1, 1], int64."""
    return ((images + 1) * ((levels - 1) / 2)).round().long()


def from_unit_interval(x: Tensor, levels: int) -> Tensor:
    """The images in [-1, 1] in whose K ``levels`` the numbers ``x`` fall; beyond the first and the last of them, those."""
    return (x * levels).floor().clamp(0, levels - 1) * (2 / (levels - 1)) - 1
