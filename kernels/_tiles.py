"""Tiles of tensors [N, H, rows, columns] for kernels that own some of a head: loads, stores and products.

Every tensor is read through its four strides, so nothing is copied; a dimension is padded to a power of two in registers alone, by
masks. Factors are multiplied in the type they are stored in (DOT), sums and exponentials are in ACC.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastgen.kernels._operands import accumulator

INFINITY = tl.constexpr(float("inf"))


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else tuple(t.stride())


def padded(dimension: int) -> int:
    """What a matrix product takes: a power of two of at least 16."""
    return max(triton.next_power_of_2(dimension), 16)


def factor_type(t: Tensor) -> tl.dtype:
    """The type of the factors of a product: that of storage, but where a kernel is interpreted, which is wrong in bfloat16."""
    if not isinstance(product, JITFunction):
        return accumulator(t)
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(t.dtype, accumulator(t))


@triton.jit
def head_of(t, strides, n, h):
    """Where head h of sample n begins."""
    return t + n * strides[0] + h * strides[1]


@triton.jit
def load_tile(t, strides, i, j, rows, columns):
    """[i, j] of one head, zero outside of rows and columns."""
    at = i[:, None].to(tl.int64) * strides[2] + j[None, :].to(tl.int64) * strides[3]
    return tl.load(t + at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def store_tile(t, strides, i, j, rows, columns, value):
    at = i[:, None].to(tl.int64) * strides[2] + j[None, :].to(tl.int64) * strides[3]
    tl.store(t + at, value.to(t.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def product(a, b, DOT: tl.constexpr, ACC: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee", out_dtype=ACC)
