"""What `philox_normal` means, in plain torch: the generator itself is in `_philox`, which other references draw from too."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import require
from ._philox import normals


def philox_normal(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    """Standard normals [N, *] in float32."""
    require("philox_normal", math.prod(shape) < 2**63, f"shape has more than 2^63 elements, got {tuple(shape)}")
    return normals(seeds, shape, step)


def philox_normal_check(seeds: Tensor, shape: Sequence[int], step: int) -> None:
    one_a_sample = seeds.dim() == 1 and len(shape) > 0 and shape[0] == seeds.shape[0]
    require("philox_normal", seeds.dtype == torch.int64, f"seeds must be int64, got {seeds.dtype}")
    require(
        "philox_normal",
        one_a_sample,
        f"seeds must be [N] and shape [N, *], got {tuple(seeds.shape)} and {tuple(shape)}",
    )
    require("philox_normal", all(size >= 0 for size in shape), f"shape must not be negative, got {tuple(shape)}")


def philox_normal_fake(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    return seeds.new_empty(tuple(shape), dtype=torch.float32)
