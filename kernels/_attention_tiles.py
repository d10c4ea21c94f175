"""What the kernels of `attention` share: the operands of a call, how large the tiles are, and a tile of scores."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels._operands import Operands, accumulator
from fastgen.kernels._tiles import INFINITY, factor_type, load_tile, padded, product, strides_of

# Rows, keys and warps of a tile for head dimensions up to each: within 255 registers a thread without spills, by the compile gate,
# also where every element is loaded by itself. Chosen by count, not yet by measurement.
HALF_TILES = {64: (64, 64, 8), 128: (64, 64, 8), 256: (32, 32, 8), 512: (32, 32, 8)}
SINGLE_TILES = {64: (16, 32, 4), 128: (32, 32, 8), 256: (16, 32, 8), 512: (16, 16, 8)}
DOUBLE_TILES = {64: (16, 16, 4), 128: (16, 16, 8), 256: (16, 16, 8), 512: (16, 16, 16)}
# The same of the kernel that keeps two gradients of its keys.
HALF_KEY_TILES = {64: (32, 64, 4), 128: (32, 64, 8), 256: (16, 16, 4), 512: (16, 16, 8)}
SINGLE_KEY_TILES = {64: (16, 16, 8)}  # larger ones spill: `reasons` says so
DOUBLE_KEY_TILES = {64: (16, 16, 4), 128: (16, 16, 8)}
DELTA_TILE = (8, 4)  # rows and warps of the kernel that reads gradient and output alone
SHORT_KEYS = 128  # at most so many keys are one tile: one pass without rescaling


@dataclass(frozen=True)
class Plan:
    """The operands of one call and the constants of its kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sizes: tuple[int, ...]  # heads, query heads for a head of keys, rows, keys, depth, width
    options: dict[str, Any]

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """Of query, key, value and mask."""
        return [strides_of(t) for t in (self.query, self.key, self.value, self.mask)]

    def tile_of_keys(self) -> dict[str, Any]:
        """The options of a kernel whose programs own keys."""
        return self.options | tile_of(self.query.dtype, max(self.sizes[4:]), of_keys=True)


def make_plan(
    op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Plan, Operands]:
    """The plan of a call, once its arguments have been held against each other."""
    operands = Operands(op, query)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or t.dtype != query.dtype:
            operands.fail(f"{name} must be [N, H, L, E] and have the dtype of query, got {tuple(t.shape)} of {t.dtype}")
    n, heads, rows, depth = query.shape
    kv_heads, keys = key.shape[1:3]
    operands.check("key", key, (n, kv_heads, keys, depth))
    operands.check("value", value, (n, kv_heads, keys, value.shape[3]))
    if heads % kv_heads if kv_heads else heads:
        operands.fail(f"the heads of key must divide those of query, got {kv_heads} and {heads}")
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    if attn_mask is not None:
        operands.check("attn_mask", attn_mask, (n, heads, rows, keys))
        if not boolean and not attn_mask.is_floating_point():
            operands.fail(f"attn_mask must be boolean or floating-point, got {attn_mask.dtype}")
    options = {
        "SCALE": float(scale), "CAUSAL": is_causal, "BOOLEAN": boolean,
        "BLOCK_E": padded(depth), "BLOCK_V": padded(value.shape[3]), "DOT": factor_type(query), "ACC": accumulator(query),
        "num_stages": 2, "enable_fp_fusion": True, **tile_of(query.dtype, max(depth, value.shape[3]))
    }  # fmt: skip
    sizes = (heads, heads // max(kv_heads, 1), rows, keys, depth, value.shape[3])
    mask = attn_mask.view(torch.uint8) if boolean and attn_mask is not None else attn_mask
    return Plan(query, key, value, mask, sizes, options), operands


def tiles_of(dtype: torch.dtype, of_keys: bool) -> dict[int, tuple[int, int, int]]:
    """The table of a dtype; ``of_keys``: of the kernel whose programs own keys."""
    half, single, double = (
        (HALF_KEY_TILES, SINGLE_KEY_TILES, DOUBLE_KEY_TILES) if of_keys else (HALF_TILES, SINGLE_TILES, DOUBLE_TILES)
    )
    return {torch.float64: double, torch.float32: single}.get(dtype, half)


def tile_of(dtype: torch.dtype, dimension: int, of_keys: bool = False) -> dict[str, int]:
    tiles = tiles_of(dtype, of_keys)
    rows, keys, warps = tiles[min(most for most in tiles if most >= dimension)]
    return {"BLOCK_L": rows, "BLOCK_S": keys, "num_warps": warps}


@triton.jit
def scores_of(
    q, k, mask, mask_strides, i, j, rows, keys,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scale q k^T + mask of rows i and keys j, -inf where a row may not look at a key. ``mask`` is that of the head, or None."""
    s = product(q, tl.trans(k), DOT, ACC) * tl.full([1, 1], SCALE, ACC)
    seen = (j < keys)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if mask is not None:
        given = load_tile(mask, mask_strides, i, j, rows, keys)
        if BOOLEAN:
            seen = seen & (given != 0)
        else:
            s += given.to(ACC)
    return tl.where(seen, s, -INFINITY)
