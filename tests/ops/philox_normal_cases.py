"""Arguments of `philox_normal` for its tests."""

from typing import Any

import torch


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"seeds": torch.tensor([1, -5]), "shape": (2, 3, 5), "step": 3, "dtype": dtype}
