"""Moments of the channels of a tensor, kept beside it: a convolution gathers them as it stores its output, and the norm after it
reads them instead of the output.

They count while the tensor is the same object with the same memory, shape, strides and version counter, which any operation in
place raises, through a view too. The norm compares some values as well, which sees whole tensors changed behind the counter's back,
by ``.data`` or NumPy. A copy, a view or a pickle has no moments; they go when the tensor dies.
"""

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class _Known(NamedTuple):
    """A tensor as it was when its moments were taken."""

    tensor: "weakref.ref[Tensor]"
    storage: torch.UntypedStorage  # kept, so that no other memory comes to lie there
    address: int
    version: int
    shape: torch.Size
    strides: tuple[int, ...]
    moments: Tensor


# Kind of packed weights -> bytes of an output from which on its moments are worth gathering. Smaller ones lie in a cache when the
# norm reads them. Time of convolution and norm with moments over that without, Xeon with AMX, two threads: of fp32, 1.00 for 1 to
# 2 MiB, 0.98 for 5 MiB, 0.94 to 0.99 for 16 to 32 MiB; by matrix tiles of bfloat16, whose products leave less time to hide it in,
# 0.98 to 1.04 for 1 to 16 MiB.
LEAST_BYTES = {"packed": 4 << 20, "direct": math.inf}

_KNOWN: dict[int, _Known] = {}  # id of the tensor


def remember(tensor: Tensor, moments: Tensor) -> None:
    """Keep the ``moments`` [N, C, 3] of ``tensor``; not of an inference tensor, whose changes nobody counts."""
    if type(tensor) is not Tensor or tensor.is_inference():
        return
    key = id(tensor)

    def died(reference: "weakref.ref[Tensor]") -> None:
        known = _KNOWN.get(key)
        if known is not None and known.tensor is reference:  # and not that of a new tensor at the same address
            _KNOWN.pop(key, None)

    _KNOWN[key] = _Known(
        weakref.ref(tensor, died), tensor.untyped_storage(), tensor.data_ptr(), tensor._version, tensor.shape,
        tensor.stride(), moments,
    )  # fmt: skip


def worth(kind: str, input: Tensor, outputs: int, scale: int) -> bool:
    """Whether moments are worth gathering of an output of so many channels, with ``scale`` rows for one of ``input``."""
    n, _, height, width = input.shape
    return n * outputs * height * width * scale**2 * input.element_size() >= LEAST_BYTES[kind]


def recall(tensor: Tensor) -> Tensor | None:
    """The moments of ``tensor``, where it is as it was when they were taken."""
    known = _KNOWN.get(id(tensor))
    if known is None or known.tensor() is not tensor:
        return None
    same = (
        not tensor.is_inference()  # a new .data may make it one
        and known.version == tensor._version
        and known.address == tensor.data_ptr()
        and known.shape == tensor.shape
        and known.strides == tensor.stride()
    )
    if not same:
        _KNOWN.pop(id(tensor), None)
    return known.moments if same else None
