"""The tensors of a call as its kernels want them: of the right shape, on one device, dense; and what no kernel here can take.

Kernels find their way through memory by the sizes of one tensor alone. A raw op can be called with anything, so whatever else
they read is held against that tensor first: noise or seeds too few would be read past their end.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NoReturn, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from fastgen._dispatch import dtype_reasons
from fastgen.reference._layout import dense_strides, is_channels_last

MAX_ELEMENTS = 2**40  # grids are one-dimensional: 2^31 - 1 programs of at least 512 elements

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class Operands:
    """The operands of one call of ``op`` beside its main one, [N, *]."""

    def __init__(self, op: str, main: Tensor) -> None:
        self.op, self.main, self.device = op, main, main.device
        if main.dim() < 1:
            self.fail("the main tensor must be [N, *], got a scalar")

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.op}: {message}")

    def check(self, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
        """``t`` has ``shape`` and lies on the device of the main tensor."""
        if t.shape != shape:
            self.fail(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.device != self.device:
            self.fail(f"{name} must be on {self.device}, got {t.device}")

    def like(self, name: str, t: MaybeTensor, like: Tensor | None = None) -> MaybeTensor:
        """``t`` in the dense memory order of an output like the main tensor, or like ``like``; None stays None."""
        if t is None:
            return None
        like = self.main if like is None else like
        self.check(name, t, like.shape)
        return dense(t, like)

    def sized(self, name: str, t: MaybeTensor, *shape: int) -> MaybeTensor:
        """``t`` contiguous, of this shape; None stays None."""
        if t is None:
            return None
        self.check(name, t, shape)
        return t.contiguous()

    def indices(self, name: str, t: MaybeTensor) -> MaybeTensor:
        """``t``: int64, one per sample (seeds, timesteps)."""
        if t is not None and t.dtype != torch.int64:
            self.fail(f"{name} must be int64, got {t.dtype}")
        return self.sized(name, t, self.main.shape[0])

    def code(self, name: str, value: int, names: Sequence[str | None], least: int = 0) -> None:
        """``value`` is an index into ``names``, or ``least``, which says none."""
        if not least <= value < len(names):
            self.fail(f"{name} must be in [{least}, {len(names)}), got {value}")


def dense(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [the shape of ``like``] itself where it has the dense strides of an output like ``like``, else a copy that has."""
    return laid_out(t, is_channels_last(like))


def laid_out(t: Tensor, channels_last: bool) -> Tensor:
    """``t`` itself where it has the dense strides of a layout, else a copy that has."""
    strides = _strides(t.shape, channels_last)
    if t.stride() == strides or all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def aligned(t: MaybeTensor) -> MaybeTensor:
    """``t``, dense, itself where it begins at a multiple of 16 bytes, else a copy: for kernels that cannot do without vectors."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


@functools.lru_cache(1024)
def _strides(shape: torch.Size, channels_last: bool) -> tuple[int, ...]:
    return tuple(dense_strides(shape, channels_last))


def accumulator(t: Tensor) -> tl.dtype:
    """The type of the arithmetic on ``t``, ACC of a kernel."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def tensor_reasons(tensors: Iterable[Tensor | None]) -> list[str]:
    """Sentences against tensors of other dtypes, or of more elements than a launch covers."""
    given = [t for t in tensors if t is not None]
    return dtype_reasons(given) + [
        f"at most 2^40 elements fit a launch grid, got {t.numel()}" for t in given if t.numel() > MAX_ELEMENTS
    ]
