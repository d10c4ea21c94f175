"""The one rule for the memory layout of an output, used by references and fakes; `csrc/common/tensor.h` says the same in C++."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """True if ``x`` [N, C, *spatial] stores its channels innermost, and is not plainly contiguous too."""
    return x.dim() >= 3 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def together(input: Tensor, skip: Tensor | None) -> Tensor:
    """What an op takes that has a second input: the channels of both, one after the other."""
    return input if skip is None else torch.cat([input, skip], 1)


def _order(dims: int, channels_last: bool) -> list[int]:
    """The dimensions of a dense tensor from the slowest to the fastest."""
    return [0, *range(2, dims), 1] if channels_last else list(range(dims))


def output_strides(x: Tensor) -> list[int]:
    """Dense strides for an output of the shape of ``x`` that keeps its layout: channels-last, or else contiguous."""
    return dense_strides(x.shape, is_channels_last(x))


def dense_strides(shape: Sequence[int], channels_last: bool) -> list[int]:
    """The strides of a tensor [N, C, *spatial] without gaps, its channels innermost or not."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(_order(len(shape), channels_last)):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return strides


def empty_with_channels(x: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor [N, channels, *spatial] in the layout and the dtype of ``x`` [N, C, *spatial]."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty_strided(shape, dense_strides(shape, is_channels_last(x)), dtype=x.dtype, device=x.device)


def empty_like_layout(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of the shape of ``x`` in the layout of :func:`output_strides`."""
    return torch.empty_strided(x.shape, output_strides(x), dtype=dtype or x.dtype, device=x.device)


def copy_like(value: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``value`` in the layout of :func:`output_strides` and the dtype of ``x`` or ``dtype``, made without writing into
    a tensor, which autograd and the transforms of `torch.func` can follow."""
    order = _order(x.dim(), is_channels_last(x))
    copy = value.permute(order).to(dtype or x.dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.permute([order.index(dim) for dim in range(x.dim())])


def strides_in_order_of(x: Tensor, shape: Sequence[int]) -> list[int]:
    """Dense strides for ``shape`` with its dimensions in the order in which those of ``x`` lie, expanded ones outermost."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(_order_of(x)):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return strides


def _order_of(x: Tensor) -> list[int]:
    """The dimensions of ``x`` from the largest stride to the smallest, those of stride 0 before them."""
    strides = x.stride()
    return [d for d in range(x.dim()) if strides[d] == 0] + sorted(
        (d for d in range(x.dim()) if strides[d] != 0), key=lambda d: -strides[d]
    )


def empty_in_order_of(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of ``shape`` with the strides of :func:`strides_in_order_of`, in the dtype of ``x``."""
    return torch.empty_strided(tuple(shape), strides_in_order_of(x, shape), dtype=x.dtype, device=x.device)


def copy_in_order_of(value: Tensor, x: Tensor) -> Tensor:
    """A copy of ``value`` with those strides and the dtype of ``x``, made without writing as :func:`copy_like` makes it."""
    order = _order_of(x)
    copy = value.permute(order).to(x.dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.permute([order.index(dim) for dim in range(x.dim())])


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and element arithmetic are carried out for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
