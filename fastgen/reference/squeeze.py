"""What `squeeze` means, in plain torch: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", 2017, section 3.6."""

import torch
from torch import Tensor

from .._schema import SQUEEZE_ORDERS
from ._check import check_main, require
from ._layout import copy_like, dense_strides, is_channels_last

CHECKERBOARD = [0, 3, 1, 2]  # of the places of a block, row by row, those that lead: first one diagonal, then the other


def squeeze(input: Tensor, factor: int, order: int, inverse: bool) -> Tensor:
    """[N, C, H, W] as [N, C f^2, H / f, W / f], or the way back."""
    n, c, h, w = input.shape
    f = factor
    if inverse:
        c = c // f**2
        if SQUEEZE_ORDERS[order] == "channel_major":
            blocks = input.reshape(n, c, f, f, h, w)
        else:
            places = input.reshape(n, f**2, c, h, w)
            if SQUEEZE_ORDERS[order] == "checkerboard":
                places = places[:, [CHECKERBOARD.index(i) for i in range(4)]]
            blocks = places.reshape(n, f, f, c, h, w).permute(0, 3, 1, 2, 4, 5)
        return copy_like(blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, c, h * f, w * f), input)
    blocks = input.reshape(n, c, h // f, f, w // f, f).permute(0, 1, 3, 5, 2, 4)  # [N, C, f, f, H / f, W / f]
    if SQUEEZE_ORDERS[order] == "channel_major":
        output = blocks.reshape(n, c * f**2, h // f, w // f)
    else:
        places = blocks.permute(0, 2, 3, 1, 4, 5).reshape(n, f**2, c, h // f, w // f)
        if SQUEEZE_ORDERS[order] == "checkerboard":
            places = places[:, CHECKERBOARD]
        output = places.reshape(n, c * f**2, h // f, w // f)
    return copy_like(output, input)


def squeeze_check(input: Tensor, factor: int, order: int, inverse: bool) -> None:
    check_main("squeeze", "input", input)
    require("squeeze", input.dim() == 4, f"input must be [N, C, H, W], got shape {tuple(input.shape)}")
    require("squeeze", factor >= 1, f"factor must be positive, got {factor}")
    known = 0 <= order < len(SQUEEZE_ORDERS)
    require("squeeze", known, f"order must be an index of SQUEEZE_ORDERS, got {order}")
    require("squeeze", SQUEEZE_ORDERS[order] != "checkerboard" or factor == 2, "the checkerboard has factor 2")
    _, c, h, w = input.shape
    if inverse:
        require("squeeze", c % factor**2 == 0, f"factor squared must divide the channels, got {factor} and {c}")
    else:
        fits = h % factor == 0 and w % factor == 0
        require("squeeze", fits, f"factor must divide height and width, got {factor} and shape {tuple(input.shape)}")


def squeeze_fake(input: Tensor, factor: int, order: int, inverse: bool) -> Tensor:
    n, c, h, w = input.shape
    squared = factor**2
    shape = (n, c // squared, h * factor, w * factor) if inverse else (n, c * squared, h // factor, w // factor)
    return torch.empty_strided(
        shape, dense_strides(shape, is_channels_last(input)), dtype=input.dtype, device=input.device
    )
