"""Per-sample coefficients of the training ops, in plain torch: table entries at each sample's timestep, and the targets."""

import torch
from torch import Tensor

from .._schema import PREDICTION_TYPES


def at_timesteps(op: str, t: Tensor, dtype: torch.dtype, *tables: Tensor) -> list[Tensor]:
    """``table[t]`` [N, *rest] in ``dtype`` for each table [T, *rest].

    On the CPU a timestep out of range raises; elsewhere, where asking would wait for the device, its row is NaN. No backend
    reads past a table.
    """
    steps = tables[0].shape[0]
    inside = (t >= 0) & (t < steps)
    if t.device.type == "cpu" and not inside.all():
        n = int((~inside).nonzero()[0])
        raise RuntimeError(f"{op}: t must be in [0, {steps}), got t[{n}] = {int(t[n])}")
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
