"""Per-sample coefficients of the training ops, in plain torch: table entries at each sample's timestep, and the targets."""

import torch
from torch import Tensor

from .._schema import PREDICTION_TYPES


def check_range(op: str, t: Tensor, steps: int) -> None:
    """On the CPU a timestep out of range raises; elsewhere asking would wait for the device."""
    if t.device.type == "cpu":
        outside = (t < 0) | (t >= steps)
        if outside.any():
            n = int(outside.nonzero()[0])
            raise RuntimeError(f"{op}: t must be in [0, {steps}), got t[{n}] = {int(t[n])}")


def at_timesteps(t: Tensor, dtype: torch.dtype, *tables: Tensor) -> list[Tensor]:
    """``table[t]`` [N, *rest] in ``dtype`` for each [T, *rest]; NaN where ``t`` is out of range: no table is read past its end."""
    steps = tables[0].shape[0]
    inside = (t >= 0) & (t < steps)
    index = t.clamp(0, steps - 1)
    rows = (table.to(dtype)[index] for table in tables)
    return [torch.where(inside.reshape(-1, *[1] * (row.dim() - 1)), row, torch.nan) for row in rows]


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """[N] -> a shape that broadcasts over ``like`` [N, *]."""
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))


def target_of(prediction: int, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a model is trained to predict; ``alpha`` and ``sigma`` broadcast over ``x0``."""
    name = PREDICTION_TYPES[prediction]
    if name == "epsilon":
        return noise
    if name == "sample":
        return x0
    return alpha * noise - sigma * x0 if name == "v_prediction" else noise - x0
