"""Coefficient tables: what a solver is to `fastgen.ops.sampler_step`, computed once, on the host, in float64."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ops import COLUMNS

_DEFAULTS = {"clip_min": -math.inf, "clip_max": math.inf, "guidance_scale": 1.0}


def coefficient_table(rows: Sequence[Mapping[str, float]], history: Sequence[Sequence[float]] = ()) -> Tensor:
    """Rows of named coefficients -> [steps, len(COLUMNS) + K] float64, columns as `sampler_step` reads them.

    Args:
        rows: one mapping a step from names of :data:`fastgen.ops.COLUMNS` to values; what is not named is 0 (no clipping, a
            guidance scale of 1).
        history: for each step the coefficients c_0 .. c_{K-1}; empty for a solver without history.

    Raises:
        ValueError: no rows, an unknown column, a history of another length, or a value that is NaN.
    """
    if not rows:
        raise ValueError("coefficient_table: rows must not be empty")
    if history and len(history) != len(rows):
        raise ValueError(f"coefficient_table: history must have one entry a row, got {len(history)} for {len(rows)}")
    values = []
    for i, row in enumerate(rows):
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise ValueError(
                f"coefficient_table: row {i} names unknown columns {unknown}; the known ones are {COLUMNS}"
            )
        extra = list(history[i]) if history else []
        values.append([float(row.get(name, _DEFAULTS.get(name, 0.0))) for name in COLUMNS] + extra)
    table = torch.tensor(values, dtype=torch.float64)
    if table.isnan().any():
        raise ValueError(f"coefficient_table: NaN in rows {table.isnan().any(1).nonzero().flatten().tolist()}")
    return table
