"""`sampler_step_out` for loops that have checked their operands: without the dispatcher where nothing can tell the difference.

The dispatcher boxes seventeen arguments, which takes as long as several calls of torch; the step of a small sample takes 3 us.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._schema import COLUMNS
from ._watchers import modes_active, profiler_active, transforms_active

_op: Any = torch.ops.fastgen.sampler_step_out.default
# Their codes in csrc/cpu/sampler_step.cpp, the dtype of the table, and its bytes an element.
_DTYPES = {
    torch.float64: (0, torch.float64, 8),
    torch.float32: (1, torch.float32, 4),
    torch.bfloat16: (2, torch.float32, 4),
    torch.float16: (3, torch.float32, 4),
}
_COLUMNS = len(COLUMNS)
_PACK = [struct.Struct(f"={10 + n}q").pack for n in range(16)]  # by the length of the history


def _load() -> Callable[[bytes], None] | None:
    """The kernel; None where no library is loaded, or one that has been built before there was such a call."""
    function: Any = getattr(_library.CPU_LIBRARY, "fastgen_sampler_step", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return function


_kernel = _load()


def sampler_step_out(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    history: Sequence[Tensor],
    noise: Tensor | None,
    out: Tensor,
    prediction: Tensor | None,
    corrected: Tensor | None,
    *,
    uncond: Tensor | None = None,
    seeds: Any = None,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
) -> None:
    """The raw op, for operands of the shape and device of ``sample``, and outputs that are fresh, and like ``sample``."""
    if (
        uncond is None
        and seeds is None
        and variance is None
        and threshold is None
        and _plain(sample, model_output, history, noise)
        and _row_is_there(table, step, sample.dtype, len(history) if corrected is None else 2 * len(history))
    ):
        code, _, size = _DTYPES[sample.dtype]
        _kernel(  # type: ignore[misc]
            _PACK[len(history)](
                code,
                sample.numel(),
                table.data_ptr() + step * table.stride(0) * size,
                sample.data_ptr(),
                model_output.data_ptr(),
                0 if noise is None else noise.data_ptr(),
                out.data_ptr(),
                0 if prediction is None else prediction.data_ptr(),
                0 if corrected is None else corrected.data_ptr(),
                len(history),
                *[tensor.data_ptr() for tensor in history],
            )
        )
        return
    _op(
        sample, model_output, table, step, uncond, history, noise, seeds, variance, None, None, None, threshold,
        out, prediction, corrected,
    )  # fmt: skip


def _plain(sample: Tensor, model_output: Tensor, history: Sequence[Tensor], noise: Tensor | None) -> bool:
    """Whether the dispatcher would go straight to the kernel, and that would read the operands where they lie."""
    if _kernel is None or modes_active() or profiler_active() or transforms_active() or not sample.is_cpu:
        return False
    dtype = sample.dtype
    if dtype not in _DTYPES or len(history) >= len(_PACK):
        return False
    for tensor in (sample, model_output, *history) if noise is None else (sample, model_output, noise, *history):
        if type(tensor) is not Tensor or tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.is_neg():
            return False
    return True


def _row_is_there(table: Tensor, step: int, dtype: torch.dtype, history_columns: int) -> bool:
    rows, columns = table.shape
    return (
        0 <= step < rows
        and columns >= _COLUMNS + history_columns
        and table.dtype is _DTYPES[dtype][1]
        and table.stride(1) == 1
    )
