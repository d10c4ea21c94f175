"""Dynamic thresholding: each sample's own bound, a quantile of its absolute values (Saharia et al. 2022, section 2.3)."""

import math

import torch
from torch import Tensor


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """[N], the ``ratio`` quantile of |x0| of each sample, between 1 and ``max_value``.

    Equal to ``torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, max_value)``, but only the values above the quantile are
    sorted, and there is no limit on their number. NaN where a sample has one.

    Args:
        x0: [N, *], any floating dtype; worked on in float32 at least.
        ratio: in [0, 1].
        max_value: at least 1; where the upper bound is below the lower, it wins, as in torch.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    values = x0.to(wide).abs().flatten(1)
    place = ratio * (values.shape[1] - 1)
    low = math.floor(place)
    above = values.shape[1] - low  # how many values stand at the lower neighbour of the quantile or above
    if above <= values.shape[1] // 2:
        top = values.topk(above, dim=1).values
        lower, upper = top[:, -1], top[:, max(above - 2, 0)]
        lower = torch.where(top[:, 0].isnan(), top[:, 0], lower)  # topk puts NaN first
    else:
        ordered = values.sort(dim=1).values
        lower, upper = ordered[:, low], ordered[:, min(low + 1, values.shape[1] - 1)]
        lower = torch.where(ordered[:, -1].isnan(), ordered[:, -1], lower)
    return torch.lerp(lower, upper, place - low).clamp(1, max_value)
