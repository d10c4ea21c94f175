"""How a call of `affine_coupling` is cut up for a GPU: its sizes, strides and tiles, and its tensors as the kernels want them."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastgen._schema import COUPLING_MASKS
from fastgen.kernels._operands import Operands, accumulator
from fastgen.reference._layout import dense_strides, is_channels_last, opmath_dtype
from fastgen.reference.affine_coupling import empty_beside

TILE = 1024  # eight elements of each operand a thread over 128 threads


class Call:
    """The sizes, strides, tiles and operands of a call."""

    def __init__(
        self, op: str, input: Tensor, raw: Tensor | None, shift: Tensor | None, indices: Tensor | None, mask: int
    ) -> None:
        self.operands = operands = Operands(op, input)
        if input.dim() < 2:
            operands.fail(f"input must be [N, C, *], got {tuple(input.shape)}")
        operands.code("mask", mask, COUPLING_MASKS)
        name, self.channels, self.positions = COUPLING_MASKS[mask], input.shape[1], math.prod(input.shape[2:])
        if (indices is not None) != (name == "indices"):
            operands.fail(f"indices go with the mask 'indices', got {name!r}")
        self.board = {"checkerboard": 1, "checkerboard_inverse": 2}.get(name, 0)
        if self.board and input.dim() != 4:
            operands.fail(f"input must be [N, C, H, W] for a checkerboard, got {tuple(input.shape)}")
        half = self.channels // 2
        self.first = half if name == "second_half" else 0
        self.transformed = {"first_half": half, "second_half": self.channels - half}.get(name, self.channels)
        self.indices = None
        if indices is not None:
            if indices.dtype != torch.int64 or indices.dim() != 1 or not 1 <= indices.shape[0] <= self.channels:
                operands.fail(
                    f"indices must be int64 [C'] with C' up to {self.channels}, got {indices.dtype}, {tuple(indices.shape)}"
                )
            self.transformed = indices.shape[0]
            self.indices = operands.sized("indices", indices, self.transformed)
        if self.transformed < 1:
            operands.fail(f"the mask must transform a channel, got input of shape {tuple(input.shape)}")
        self.input, self.shape = input, (input.shape[0], self.transformed, *input.shape[2:])
        self.x = operands.like("input", input)
        packed = (input.shape[0], 2 * self.transformed, *input.shape[2:])
        self.raw = None if raw is None else self.beside("raw_scale", raw, self.shape if shift is not None else packed)
        self.shift = None if shift is None else self.beside("shift", shift, self.shape)
        self.vectors = self.positions == 1
        rows = self.vectors or is_channels_last(input)
        along = min(triton.next_power_of_2(max(self.channels if rows else self.positions, 1)), TILE)
        self.block_p, self.block_c = (
            (TILE // along, along) if rows else (along, TILE // along if self.channels > 1 else 1)
        )
        self.n, self.p = (1, input.shape[0]) if self.vectors else (input.shape[0], self.positions)
        self.rows = rows
        self.tiles_c = triton.cdiv(self.channels, self.block_c)
        self.tiles_p = triton.cdiv(self.p, self.block_p)
        self.tiles = self.tiles_c * self.tiles_p

    def beside(self, name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``t`` dense, channels-last where the input is."""
        if t.dtype != self.input.dtype:
            self.operands.fail(f"{name} must be {self.input.dtype}, got {t.dtype}")
        self.operands.check(name, t, shape)
        strides = dense_strides(shape, is_channels_last(self.input))
        return t if list(t.stride()) == strides else empty_beside(self.input, t).copy_(t)

    def strides(self, channels: int) -> tuple[int, int, int]:
        """Of a sample, a channel and a position in a dense tensor of so many channels; samples of vectors are positions."""
        if self.vectors:
            return 0, 1, channels
        return channels * self.positions, 1 if self.rows else self.positions, channels if self.rows else 1

    def parts(self, a_position: bool, like: Tensor) -> Tensor:
        shape = (self.n, self.tiles_c, self.p) if a_position else (self.n, self.tiles)
        return torch.empty(shape, dtype=opmath_dtype(like.dtype), device=like.device)

    def programs(self) -> int:
        return self.n * self.tiles

    def sizes(self) -> tuple[int, ...]:
        width = self.input.shape[3] if self.board else 1
        return self.channels, self.transformed, self.p, self.first, width, self.tiles_c, self.tiles

    def blocks(self) -> dict[str, Any]:
        return {
            "BLOCK_P": self.block_p, "BLOCK_C": self.block_c, "BLOCK_J": min(triton.next_power_of_2(self.transformed), 64),
            "BOARD": self.board, "ACC": accumulator(self.input), "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
