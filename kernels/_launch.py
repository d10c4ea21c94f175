"""What the launchers of all families share: the device, dense memory, and what no kernel here can take."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fastgen._dispatch import dtype_reasons
from fastgen.reference._layout import empty_like_layout, output_strides

MAX_ELEMENTS = 2**40  # grids are one-dimensional: 2^31 - 1 programs of at least 512 elements


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it that of ``tensor``."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def dense(t: Tensor, like: Tensor) -> Tensor:
    """``t`` itself where it has the dense strides of an output like ``like``, else a copy that has."""
    strides = output_strides(like)
    if all(size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return empty_like_layout(like, t.dtype).copy_(t)


def tensor_reasons(tensors: Iterable[Tensor | None]) -> list[str]:
    """Sentences against tensors of other dtypes, or of more elements than a launch covers."""
    given = [t for t in tensors if t is not None]
    return dtype_reasons(given) + [
        f"at most 2^40 elements fit a launch grid, got {t.numel()}" for t in given if t.numel() > MAX_ELEMENTS
    ]
