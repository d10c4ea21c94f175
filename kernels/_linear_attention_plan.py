"""What the kernels of `linear_attention` share: the operands of a call, how large the tiles are, and the softmax of queries."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._operands import Operands, accumulator
from fastgen.kernels._tiles import INFINITY, factor_type, padded
from fastgen.reference._layout import opmath_dtype

MOST_CHANNELS = 64  # of a head: a context of 64 x 64 beside tiles of keys and values
CHUNK = 1024  # positions that a program goes through: 64 programs for 4 heads of 128 x 128


@dataclass(frozen=True)
class Plan:
    """The operands of one call and the constants of its kernels."""

    key: Tensor
    value: Tensor
    memory_key: Tensor | None  # [H, D, M]
    memory_value: Tensor | None
    chunk: int
    scale: float
    opmath: torch.dtype
    tile: dict[str, Any]  # of kernels that read positions
    options: dict[str, Any]

    @property
    def blocks(self) -> dict[str, Any]:
        """The constants of a kernel that reads contexts alone."""
        return {name: self.tile[name] for name in ("BLOCK_D", "BLOCK_E", "ACC")}


def make_plan(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    scale: float,
) -> tuple[Plan, Operands]:
    """The plan of a call, once its arguments have been held against each other."""
    operands = Operands(op, query)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or t.dtype != query.dtype:
            operands.fail(f"{name} must be [N, H, D, L] and have the dtype of query, got {tuple(t.shape)} of {t.dtype}")
    (n, heads, depth, _), positions, width = query.shape, key.shape[3], value.shape[2]
    operands.check("key", key, (n, heads, depth, positions))
    if value.shape[3] != positions:
        operands.fail(f"value must have the positions of key, {positions}, got {tuple(value.shape)}")
    operands.check("value", value, (n, heads, width, positions))
    if (memory_key is None) != (memory_value is None):
        operands.fail("memory_key and memory_value must be given together")
    if memory_key is not None and memory_value is not None:
        if memory_key.dim() != 3:
            operands.fail(f"memory_key must be [H, D, M], got {tuple(memory_key.shape)}")
        operands.check("memory_key", memory_key, (heads, depth, memory_key.shape[2]))
        if memory_value.shape[-1:] != memory_key.shape[-1:]:
            operands.fail(
                f"memory_value must have as many as memory_key, {memory_key.shape[2]}, got {tuple(memory_value.shape)}"
            )
        operands.check("memory_value", memory_value, (heads, width, memory_key.shape[2]))
        for name, t in (("memory_key", memory_key), ("memory_value", memory_value)):
            if t.dtype != query.dtype:
                operands.fail(f"{name} must have the dtype of query, got {t.dtype}")
    block_d, block_e = padded(depth), padded(width)
    tile = {
        "BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_L": 32 if max(block_d, block_e) <= 32 else 16, "DOT": factor_type(query),
        "ACC": accumulator(query),
    }  # fmt: skip
    options = {"num_warps": 4 if max(block_d, block_e) <= 32 else 8, "num_stages": 2, "enable_fp_fusion": True}
    opmath = opmath_dtype(query.dtype)
    return Plan(key, value, memory_key, memory_value, CHUNK, float(scale), opmath, tile, options), operands


@triton.jit
def softmax_of_features(q, d, depth):
    """Of a tile [BLOCK_D, BLOCK_L] over its rows d < depth; 0 in the others."""
    q = tl.where((d < depth)[:, None], q, -INFINITY)
    s = tl.exp(q - tl.max(q, axis=0)[None, :])
    return s / tl.sum(s, axis=0)[None, :]
