"""Convolutions whose weight other projects multiply by a mask before each call: which of our masks it is, and the op instead."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import _packed_weights, masked_conv2d, masked_conv2d_mask
from ..ops._watchers import transforms_active
from .stand_in import bare

RASTER = ("A", "B")
STACKS = ("vertical_A", "vertical_B", "horizontal_A", "horizontal_B")

_KNOWN = WeakTensorKeyDictionary()  # mask -> (as it was seen, its type)


def mask_type(mask: Tensor) -> str | None:
    """Which mask of :func:`fastgen.ops.masked_conv2d` this one [K or 1, C or 1, kh, kw] is; None where it is none of
    :data:`RASTER` and :data:`STACKS`, or nobody may look at its numbers."""
    if type(mask) is not Tensor or torch.compiler.is_compiling() or transforms_active():
        return None
    seen, found = _KNOWN.get(mask, (None, None))
    if seen is None or not seen.fits(mask):
        found = next((name for name in (*RASTER, *STACKS) if _is(mask, name)), None)
        if not _packed_weights.reasons(mask):
            _KNOWN[mask] = _packed_weights.Seen(mask), found
    return found


def _is(mask: Tensor, name: str) -> bool:
    kind = masked_conv2d_mask(name, (1, 1, *mask.shape[2:]), device=mask.device)
    return bool((mask == kind).all())


def unmaskable(conv: Any, mask: Any, types: Sequence[str]) -> Iterator[str]:
    """Why this convolution under this mask is nothing for the op, sentences for the report."""
    yield from misfits(conv)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2:] != conv.kernel_size:
        yield "its mask is not [K, C, kh, kw]"
    elif all(size % 2 for size in conv.kernel_size) and mask_type(mask) not in types:
        yield f"its mask is none of {', '.join(types)}"


def misfits(conv: Any) -> Iterator[str]:
    """What of this convolution the op has not, under any mask."""
    if any(size % 2 == 0 for size in conv.kernel_size):
        yield "an even kernel, {}x{}".format(*conv.kernel_size)
        return
    if conv.stride != (1, 1):
        yield f"stride {conv.stride}"
    if conv.padding_mode != "zeros":
        yield f"padding_mode {conv.padding_mode!r}"
    kept = tuple(d * (size // 2) for d, size in zip(conv.dilation, conv.kernel_size, strict=True))
    if conv.padding not in ("same", kept):
        yield f"padding {conv.padding} where {kept} keeps the size"
    if nn.utils.parametrize.is_parametrized(conv):
        yield "its weight is parametrized"


def masked(conv: Any, mask: Tensor, x: Tensor, types: Sequence[str], *, called: bool = False) -> Tensor | None:
    """conv(x) under the mask, by the op, which leaves the weight as it is; None where their own code has to do it.

    ``called``: whether their code calls ``conv``, so that hooks on it see that.
    """
    kind = mask_type(mask)
    if kind is None or kind not in types or x.dim() != 4 or (called and not bare((conv,))):
        return None
    if next(misfits(conv), None) is not None:
        return None
    return masked_conv2d(x, conv.weight, conv.bias, mask_type=kind, dilation=conv.dilation, groups=conv.groups)
