"""Arguments of `group_norm` for its tests on every device, and what a user writes without it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import guarded, randn

SHAPES = [
    ((2, 32, 8, 8), 8), ((1, 6, 5, 7), 3), ((3, 10), 5), ((1, 4, 65, 33), 1), ((2, 24, 17), 2), ((2, 8, 3, 4, 5), 4),
    ((5, 320, 16, 16), 32), ((1, 16, 96, 96), 2), ((2, 1030, 2, 2), 2), ((4, 8, 1, 1), 2), ((1, 6, 31, 64), 3),
]  # fmt: skip


def plain(x: Tensor, groups: int, weight, bias, channel_bias=None, scale=None, shift=None, activation=None) -> Tensor:
    """The same in plain torch, in the dtype of ``x``, one call a step: what a user would write."""

    def spread(p: Tensor) -> Tensor:
        return p.to(x.dtype).reshape(*p.shape, *[1] * (x.dim() - 2))

    y = x if channel_bias is None else x + spread(channel_bias)
    y = F.group_norm(y, groups, *(None if p is None else p.to(x.dtype) for p in (weight, bias)))
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    return F.silu(y) if activation == "silu" else y


def gradients(function, x, groups, params, activation, grad) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params.values())]
    y = function(leaves[0], groups, **dict(zip(params, leaves[1:], strict=True)), activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def parameters(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    n, c = shape[:2]
    sizes = {"weight": (c,), "bias": (c,), "channel_bias": (n, c), "scale": (n, c), "shift": (n, c)}
    return {name: guarded(randn(*size, seed=i + 10, dtype=dtype)) for i, (name, size) in enumerate(sizes.items())}


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 6, 5, 7)
    return {"input": randn(*shape, dtype=dtype), "num_groups": 3, **parameters(shape, dtype), "activation": "silu"}
