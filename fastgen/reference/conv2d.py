"""What `conv2d` means, in plain torch: a convolution with an affine map and an activation before it, sums and a scale after it.

And what its packed weights are: Winograd's minimal filtering, Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2015, F(4x4, 3x3) with the points 0, 1, -1, 2, -2, infinity and F(2x2, 3x3) with 0, 1, -1, infinity.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import ACTIVATIONS
from ._check import check_activation, check_floats, check_main, require
from ._layout import copy_like, dense_strides, is_channels_last, opmath_dtype

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
OUTPUTS = {len(b) ** 2: outputs for outputs, (b, _, _) in TRANSFORMS.items()}  # points -> outputs a side


def conv2d_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    y = prologue(input.to(opmath_dtype(input.dtype)), input_scale, input_shift, activation)
    wide = weight.to(y.dtype)
    y = F.conv2d(y, wide, None, list(stride), list(padding), list(dilation), groups)
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


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


def conv2d_pack(weight: Tensor, outputs: int) -> Tensor:
    """G w G^T of every kernel, in fp32, as [points, panels, C, PANEL] with zeros beyond the last output channel."""
    g = torch.tensor(TRANSFORMS[outputs][1], dtype=torch.float64, device=weight.device)
    points = torch.einsum("iy,kcyx,jx->ijkc", g, weight.double(), g).flatten(0, 1)  # [points, K, C]
    points = F.pad(points, (0, 0, 0, -weight.shape[0] % PANEL))
    return points.unflatten(1, (-1, PANEL)).transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)


def conv2d_packed(
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
) -> Tensor:
    """A^T (sum_c (B^T d B) * packed) A of every tile d of side x side inputs that is m x m outputs; in fp32, fp64 for fp64."""
    y = prologue(input.to(opmath_dtype(input.dtype)), input_scale, input_shift, activation)
    m = OUTPUTS[packed.shape[0]]
    b, a = (torch.tensor(TRANSFORMS[m][i], dtype=y.dtype, device=y.device) for i in (0, 2))
    height, width = y.shape[2:]
    halo, side = (len(b) - m) // 2, len(b)
    padded = F.pad(y, (halo, halo + -width % m, halo, halo + -height % m))
    tiles = padded.unfold(2, side, m).unfold(3, side, m)  # [N, C, tiles of y, tiles of x, side, side]
    values = torch.einsum("iy,nctsyx,jx->ijntsc", b, tiles, b).flatten(0, 1).flatten(1, 3)  # [points, tiles, C]
    weights = packed.to(y.dtype).transpose(2, 3).flatten(1, 2)[:, :out_channels]  # [points, K, C]
    products = (values @ weights.transpose(1, 2)).reshape(side, side, *tiles.shape[:1], *tiles.shape[2:4], out_channels)
    y = torch.einsum("yi,ijntsk,xj->nktysx", a, products, a).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    return in_layout(epilogue(y, bias, embedding, residual, output_scale), input)


def in_layout(y: Tensor, input: Tensor) -> Tensor:
    """A copy of ``y`` in the dtype and the layout of ``input``, which may have other channels."""
    like = torch.empty_strided(y.shape, output_strides(y.shape, input), device="meta")
    return copy_like(y, like, input.dtype)


def output_strides(shape: Sequence[int], input: Tensor) -> list[int]:
    """Of an output of ``shape``: channels-last if ``input`` is, else contiguous."""
    return dense_strides(shape, is_channels_last(input))


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv2d_fwd_check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> None:
    _check_image("conv2d_fwd", input)
    n, c = input.shape[:2]
    k = weight.shape[0] if weight.dim() == 4 else 0
    require("conv2d_fwd", groups >= 1 and c % groups == 0 and k % groups == 0, f"groups must divide channels: {groups}")
    require("conv2d_fwd", weight.dim() == 4, f"weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    check_floats("conv2d_fwd", input, (k, c // groups, *weight.shape[2:]), weight=weight)
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        require("conv2d_fwd", len(pair) == 2 and min(pair) >= least, f"{name} must be two integers of at least {least}")
    require("conv2d_fwd", min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")
    _check_operands("conv2d_fwd", input, k, bias, input_scale, input_shift, activation, embedding)
    height, width = (
        output_size(*of) for of in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    require("conv2d_fwd", min(height, width) >= 1, "the kernel is larger than the padded image")
    check_floats("conv2d_fwd", input, (n, k, height, width), residual=residual)


def conv2d_pack_check(weight: Tensor, outputs: int) -> None:
    check_main("conv2d_pack", "weight", weight)
    require("conv2d_pack", outputs in TRANSFORMS, f"outputs must be 1, 2 or 4, got {outputs}")
    kernel = len(TRANSFORMS[outputs][1][0])
    fits = weight.dim() == 4 and weight.shape[2] == weight.shape[3] == kernel
    require("conv2d_pack", fits, f"weight must be [K, C, {kernel}, {kernel}] for outputs={outputs}")
    require("conv2d_pack", min(weight.shape) >= 1, f"weight must not be empty, got shape {tuple(weight.shape)}")


def conv2d_packed_check(
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
) -> None:
    _check_image("conv2d_packed", input)
    require("conv2d_packed", input.dtype != torch.float64, "input must be float32, bfloat16 or float16")
    fits = packed.dtype == torch.float32 and packed.dim() == 4 and packed.is_contiguous()
    fits = fits and any(packed.shape[0] == points for points in OUTPUTS)
    require("conv2d_packed", fits, "packed must be what conv2d_pack returns")
    panels = -(-out_channels // PANEL)
    fits = out_channels >= 1 and tuple(packed.shape[1:]) == (panels, input.shape[1], PANEL)
    require("conv2d_packed", fits, f"packed must be for {input.shape[1]} channels and out_channels={out_channels}")
    check_floats("conv2d_packed", input, tuple(packed.shape), packed=packed)
    _check_operands("conv2d_packed", input, out_channels, bias, input_scale, input_shift, activation, embedding)
    check_floats("conv2d_packed", input, (input.shape[0], out_channels, *input.shape[2:]), residual=residual)
    fits = residual is None or residual.dtype == input.dtype
    require("conv2d_packed", fits, "residual must have the dtype of input")


def _check_image(op: str, input: Tensor) -> None:
    check_main(op, "input", input)
    require(op, input.dim() == 4, f"input must be [N, C, H, W], got shape {tuple(input.shape)}")


def _check_operands(
    op: str,
    input: Tensor,
    outputs: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
) -> None:
    n, c = input.shape[:2]
    check_floats(op, input, (n, c), input_scale=input_scale, input_shift=input_shift)
    check_floats(op, input, (outputs,), bias=bias)
    check_floats(op, input, (n, outputs), embedding=embedding)
    check_activation(op, activation)


def conv2d_fwd_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    activation: int,
    embedding: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
) -> Tensor:
    size = [output_size(*of) for of in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)]
    return _empty(input, weight.shape[0], size)


def conv2d_pack_fake(weight: Tensor, outputs: int) -> Tensor:
    points = len(TRANSFORMS[outputs][0]) ** 2
    return weight.new_empty((points, -(-weight.shape[0] // PANEL), weight.shape[1], PANEL), dtype=torch.float32)


def conv2d_packed_fake(
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
) -> Tensor:
    return _empty(input, out_channels, input.shape[2:])


def _empty(input: Tensor, outputs: int, size: Sequence[int]) -> Tensor:
    shape = (input.shape[0], outputs, *size)
    return torch.empty_strided(shape, output_strides(shape, input), dtype=input.dtype, device=input.device)
