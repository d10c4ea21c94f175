"""What `conv2d` and `upsample_conv2d` share where they go by matrix tiles of bfloat16, in plain torch.

Pixels are rounded to bfloat16 once the affine map and the activation are applied, weights as they are packed, sums are fp32.
`csrc/cpu/_convolution_direct.h` says how.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_floats, check_main, check_skip, require
from ._convolution import PANEL, check_image, check_operands, epilogue, in_layout, prologue
from ._layout import opmath_dtype, together

BLOCK = 32  # channels of a tile
# The taps that a phase of the outputs sees of an image upsampled by two: [phase, 2, 3].
SUMS = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]


def taps(kernel: int, scale: int) -> int:
    """Of each phase."""
    return 4 if scale == 2 else kernel**2


def packed_shape(weight: Sequence[int], scale: int) -> tuple[int, ...]:
    """Of a weight of that shape."""
    k, c, kernel = weight[:3]
    return scale**2, -(-k // PANEL), -(-c // BLOCK), taps(kernel, scale), BLOCK // 2, 2 * PANEL


def pack(weight: Tensor, scale: int) -> Tensor:
    """The kernels of every phase in bfloat16: pairs of channels side by side, zeros beyond the last channel and output."""
    kernels = weight.double()[None]
    if scale == 2:
        sums = torch.tensor(SUMS, dtype=torch.float64, device=weight.device)
        kernels = torch.einsum("piy,kcyx,qjx->pqkcij", sums, weight.double(), sums).flatten(0, 1)
    phases, k, c = kernels.shape[:3]
    kernels = F.pad(kernels.flatten(3), (0, 0, 0, -c % BLOCK, 0, -k % PANEL))
    tiles = kernels.reshape(phases, -(-k // PANEL), PANEL, -(-c // BLOCK), BLOCK // 2, 2, -1).permute(
        0, 1, 3, 6, 4, 2, 5
    )
    return tiles.flatten(5).to(torch.bfloat16, memory_format=torch.contiguous_format)


def unpack(packed: Tensor, k: int, c: int) -> Tensor:
    """[phases, k, c, side, side] of weights so packed."""
    phases, panels, blocks, count = packed.shape[:4]
    kernels = packed.unflatten(5, (PANEL, 2)).permute(
        0, 1, 5, 2, 4, 6, 3
    )  # [phases, panels, outputs, blocks, pairs, 2, taps]
    side = round(count**0.5)
    return kernels.reshape(phases, panels * PANEL, blocks * BLOCK, side, side)[:, :k, :c]


def direct(
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
    """In the dtype of the input, which pixels are rounded to; fp32 arithmetic, fp64 for fp64."""
    y = prologue(together(input, skip).to(opmath_dtype(input.dtype)), input_scale, input_shift, activation)
    y = y.to(input.dtype).to(y.dtype)
    kernels = unpack(packed, out_channels, y.shape[1]).to(y.dtype)
    if scale == 1:
        y = F.conv2d(y, kernels[0], padding=kernels.shape[-1] // 2)
    else:
        height, width = y.shape[2:]
        padded = F.pad(y, (1, 1, 1, 1))
        phases = [
            F.conv2d(padded[:, :, p : p + height + 1, q : q + width + 1], kernels[2 * p + q])
            for p in (0, 1)
            for q in (0, 1)
        ]
        y = F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


def check_pack(op: str, weight: Tensor, scale: int) -> None:
    check_main(op, "weight", weight)
    kernel = tuple(weight.shape[2:])
    fits = weight.dim() == 4 and (kernel == (3, 3) or (scale == 1 and kernel == (1, 1)))
    require(op, fits, f"weight must be [K, C, 3, 3]{' or [K, C, 1, 1]' if scale == 1 else ''}")
    require(op, min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")


def check_direct(
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
    require(op, input.dtype == torch.bfloat16, "input must be bfloat16")
    fits = packed.dtype == torch.bfloat16 and packed.dim() == 6 and packed.is_contiguous()
    counts = (4,) if scale == 2 else (1, 9)
    fits = (
        fits and packed.shape[3] in counts and (packed.shape[0], *packed.shape[4:]) == (scale**2, BLOCK // 2, 2 * PANEL)
    )
    require(op, fits, "packed must be what the packing op returns")
    c = check_skip(op, input, skip)
    fits = out_channels >= 1 and tuple(packed.shape[1:3]) == (-(-out_channels // PANEL), -(-c // BLOCK))
    require(op, fits, f"packed must be for {c} channels and out_channels={out_channels}")
    check_floats(op, input, tuple(packed.shape), packed=packed)
    size = (scale * input.shape[2], scale * input.shape[3])
    check_operands(op, input, c, out_channels, size, bias, input_scale, input_shift, activation, embedding, residual)
    require(op, residual is None or residual.dtype == input.dtype, "residual must have the dtype of input")


def empty_packed(weight: Tensor, scale: int) -> Tensor:
    return weight.new_empty(packed_shape(weight.shape, scale), dtype=torch.bfloat16)
