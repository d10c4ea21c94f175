"""What `conv2d` and `upsample_conv2d` share, in plain torch: an affine map and an activation before the convolution, sums and a
scale after it; and convolution by tiles with packed weights.

Winograd's minimal filtering: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, F(4x4, 3x3) with the
points 0, 1, -1, 2, -2, infinity and F(2x2, 3x3) with 0, 1, -1, infinity. `csrc/cpu/_convolution.h` says how upsampling goes in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import ACTIVATIONS
from ._check import check_activation, check_floats, check_main, check_skip, require
from ._layout import copy_like, dense_strides, is_channels_last, opmath_dtype, together

PANEL = 16  # output channels side by side in packed weights

# Outputs a side -> (input, weight and output transforms B^T, G, A^T); of a 1x1 kernel they do nothing.
TRANSFORMS: dict[int, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {
    1: ([[1]], [[1]], [[1]]),
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
         [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}  # fmt: skip
# The kernels that the phases of the output see on the small image, of the taps of one dimension: [phase, 3, 3].
PHASES = [[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]]


def tile_outputs(scale: int) -> tuple[int, ...]:
    """Outputs a side of the tiles that there are."""
    return (1, 2, 4) if scale == 1 else (2, 4)


def blocks(outputs: int, scale: int) -> list[tuple[int, int, int, int]]:
    """(point of y, point of x, phase of y, phase of x) of each product of a tile, in order."""
    side, phases = len(TRANSFORMS[outputs][0]), range(scale)
    of_phase = [range(p, side - scale + 1 + p) for p in phases]  # the other points of its kernel are zero
    return [
        (i, j, p, q)
        for i in range(side) for j in range(side) for p in phases for q in phases
        if i in of_phase[p] and j in of_phase[q]
    ]  # fmt: skip


def prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: int) -> Tensor:
    """act(x * scale + shift), in the dtype of ``x``."""
    if scale is not None:
        x = x * scale.to(x.dtype)[..., None, None]
    if shift is not None:
        x = x + shift.to(x.dtype)[..., None, None]
    return F.silu(x) if ACTIVATIONS[activation] == "silu" else x


def epilogue(y: Tensor, bias: Tensor | None, embedding: Tensor | None, residual: Tensor | None, scale: float) -> Tensor:
    """(y + bias + embedding + residual) * scale, in the dtype of ``y``."""
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    if embedding is not None:
        y = y + embedding.to(y.dtype)[..., None, None]
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y if scale == 1.0 else y * scale


def pack(weight: Tensor, outputs: int, scale: int) -> Tensor:
    """G w G^T of every kernel and phase, in fp32, as [blocks, panels, C, PANEL] with zeros beyond the last output channel."""
    g = torch.tensor(TRANSFORMS[outputs][1], dtype=torch.float64, device=weight.device)
    g = g[None] if scale == 1 else g @ torch.tensor(PHASES, dtype=g.dtype, device=g.device)  # [phase, point, tap]
    points = torch.einsum("piy,kcyx,qjx->ijpqkc", g, weight.double(), g)
    points = torch.stack([points[block] for block in blocks(outputs, scale)])  # [blocks, K, C]
    points = F.pad(points, (0, 0, 0, -weight.shape[0] % PANEL))
    return points.unflatten(1, (-1, PANEL)).transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)


def packed(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    skip: Tensor | None,
    scale: int,
) -> Tensor:
    """A^T (sum_c (B^T d B) * packed) A of every tile d of side x side inputs that is m x m outputs of each phase; in fp32, fp64
    for fp64."""
    y = prologue(together(input, skip).to(opmath_dtype(input.dtype)), input_scale, input_shift, activation)
    m = outputs_of(packed, scale)
    b, a = (torch.tensor(TRANSFORMS[m][i], dtype=y.dtype, device=y.device) for i in (0, 2))
    height, width = y.shape[2:]
    halo, side = (len(b) - m) // 2, len(b)
    padded = F.pad(y, (halo, halo + -width % m, halo, halo + -height % m))
    tiles = padded.unfold(2, side, m).unfold(3, side, m)  # [N, C, tiles of y, tiles of x, side, side]
    values = torch.einsum("iy,nctsyx,jx->ijntsc", b, tiles, b)
    weights = packed.to(y.dtype).transpose(2, 3).flatten(1, 2)[:, :out_channels]  # [blocks, K, C]
    products = y.new_zeros((side, side, scale, scale, *values.shape[2:5], out_channels))
    for block, weight in zip(blocks(m, scale), weights, strict=True):
        products[block] = values[block[:2]] @ weight.t()
    y = torch.einsum("yi,ijpqntsk,xj->nktypsxq", a, products, a).flatten(5, 7).flatten(2, 4)
    y = y[:, :, : scale * height, : scale * width]
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


def outputs_of(packed: Tensor, scale: int) -> int:
    """The outputs a side of the tiles that these weights are for; 0 if of none."""
    return next((m for m in tile_outputs(scale) if len(blocks(m, scale)) == packed.shape[0]), 0)


def in_layout(y: Tensor, input: Tensor) -> Tensor:
    """A copy of ``y`` in the dtype and the layout of ``input``, which may have other channels."""
    like = torch.empty_strided(y.shape, output_strides(y.shape, input), device="meta")
    return copy_like(y, like, input.dtype)


def output_strides(shape: Sequence[int], input: Tensor) -> list[int]:
    """Of an output of ``shape``: channels-last if ``input`` is, else contiguous."""
    return dense_strides(shape, is_channels_last(input))


def empty(input: Tensor, outputs: int, size: Sequence[int]) -> Tensor:
    """An output [N, outputs, *size]."""
    shape = (input.shape[0], outputs, *size)
    return torch.empty_strided(shape, output_strides(shape, input), dtype=input.dtype, device=input.device)


def empty_packed(weight: Tensor, outputs: int, scale: int) -> Tensor:
    shape = (len(blocks(outputs, scale)), -(-weight.shape[0] // PANEL), weight.shape[1], PANEL)
    return weight.new_empty(shape, dtype=torch.float32)


def check_pack(op: str, weight: Tensor, outputs: int, scale: int) -> None:
    check_main(op, "weight", weight)
    *most, last = map(str, tile_outputs(scale))
    fits = outputs in tile_outputs(scale)
    require(op, fits, f"outputs must be {', '.join(most)} or {last}, got {outputs}")
    kernel = len(TRANSFORMS[outputs][1][0])
    fits = weight.dim() == 4 and weight.shape[2] == weight.shape[3] == kernel
    require(op, fits, f"weight must be [K, C, {kernel}, {kernel}] for outputs={outputs}")
    require(op, min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")


def check_packed(
    op: str,
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: int,
) -> None:
    check_image(op, input)
    require(op, input.dtype != torch.float64, "input must be float32, bfloat16 or float16")
    fits = packed.dtype == torch.float32 and packed.dim() == 4 and packed.is_contiguous()
    require(op, fits and outputs_of(packed, scale) > 0, "packed must be what the packing op returns")
    panels, c = -(-out_channels // PANEL), check_skip(op, input, skip)
    fits = out_channels >= 1 and tuple(packed.shape[1:]) == (panels, c, PANEL)
    require(op, fits, f"packed must be for {c} channels and out_channels={out_channels}")
    check_floats(op, input, tuple(packed.shape), packed=packed)
    size = tuple(scale * length for length in input.shape[2:])
    check_operands(op, input, c, out_channels, size, bias, input_scale, input_shift, activation, embedding, residual)
    fits = residual is None or residual.dtype == input.dtype
    require(op, fits, "residual must have the dtype of input")


def check_image(op: str, input: Tensor) -> None:
    check_main(op, "input", input)
    require(op, input.dim() == 4, f"input must be [N, C, H, W], got shape {tuple(input.shape)}")


def check_operands(
    op: str,
    input: Tensor,
    c: int,
    outputs: int,
    size: tuple[int, ...],
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
) -> None:
    """All that goes in and comes out beside the convolution of ``c`` channels to ``outputs`` of ``size``."""
    n = input.shape[0]
    check_floats(op, input, (n, c), input_scale=input_scale, input_shift=input_shift)
    check_floats(op, input, (outputs,), bias=bias)
    check_floats(op, input, (n, outputs), embedding=embedding)
    check_activation(op, activation)
    check_floats(op, input, (n, outputs, *size), residual=residual)
