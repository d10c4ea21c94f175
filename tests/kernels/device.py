"""The device under test of the Triton kernels: Triton's interpreter on the CPU, or a GPU. Cases are made on the CPU and moved."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgen import _dispatch

from ..ops.numerics import guarded

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

# Largest error, relative to the largest value: a few roundings of the arithmetic, then one of the output.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def moved(value: Any, device: str) -> Any:
    """Tensors in ``value`` with all the memory around them, strides and offset on ``device``."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    storage = value.untyped_storage()  # through zeros: `guarded_outputs` has another idea of empty
    copy = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=device)
    copy.copy_(torch.zeros(0, dtype=torch.uint8, device=value.device).set_(storage))
    whole = torch.zeros(0, dtype=value.dtype, device=device)
    return whole.set_(copy.untyped_storage(), value.storage_offset(), value.shape, value.stride())


class Kernels:
    """``kernels.group_norm_fwd(*arguments)``: the Triton kernel of a raw op on the device under test; CPU tensors in and out."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return self.on_device(_dispatch.Triton.kernel(op))

    @staticmethod
    def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of CPU tensors, computed on the device under test."""
        return lambda *args: moved(function(*moved(args, DEVICE)), "cpu")


def guard(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating tensors in the middle of NaN, where their elements lie apart: what reads past the ends reads NaN."""

    def inside(t: Tensor) -> Tensor:
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))
        return guarded(t, before=2048) if t.is_floating_point() and not overlaps else t

    return tree_map_only(Tensor, inside, arguments)


def poison(dtype: torch.dtype) -> float | int:
    """What memory that nobody has written holds: NaN, or the least of integers."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Memory allocated inside lies between NaNs, is full of them, and the NaNs around it must survive."""
    allocated, plain = [], (torch.empty, torch.empty_strided)

    def empty_strided(size, stride, *, dtype=None, device=None):
        extent = sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if math.prod(size) else 0
        dtype = dtype or torch.get_default_dtype()
        buffer = torch.full((extent + 256,), poison(dtype), dtype=dtype, device=device)
        allocated.append((buffer, extent))
        return torch.as_strided(buffer, size, stride, 128)

    def empty(size, *, dtype=None, device=None):
        like = plain[0](size, dtype=dtype, device="meta")
        return empty_strided(like.shape, like.stride(), dtype=dtype, device=device)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_strided", empty_strided),
        mock.patch.object(
            torch, "empty_like", lambda t: empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        ),
    ):
        yield
    assert allocated
    for buffer, extent in allocated:
        around = torch.cat([buffer[:128], buffer[128 + extent :]])
        untouched = around.isnan() if around.is_floating_point() else around == poison(around.dtype)
        assert untouched.all(), "a store went past the ends"


def close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, least: float = 1e-2, cut: int | None = None
) -> None:
    """Within the tolerance of ``dtype``, or of its own; integers are equal. The rest as in :class:`tests.ops.families.Call`."""
    assert actual.shape == expected.shape
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    info = torch.finfo(actual.dtype)
    underflow = info.smallest_normal * info.eps / 2  # half of the least number
    for part in (slice(None),) if cut is None else (slice(None, cut), slice(cut, None)):
        at = part if cut is None else (slice(None), part)
        if expected[at].numel() == 0:
            continue
        error = (actual[at].double() - expected[at]).abs().max()
        largest = expected[at].abs().max().clamp_min(least)
        assert error <= TOLERANCE[dtype or actual.dtype] * largest + underflow, f"{error / largest:.2e}"
