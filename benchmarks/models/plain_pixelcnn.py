"""The layers of `fastgen.models`' autoregressive models in plain torch, as ports of the papers have them: masks multiplied in,
padding, two activations and a product. They take the place of fastgen's own ops for as long as the baseline runs."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models import _shifted_conv2d, gated_pixel_cnn, pixel_cnn_plus_plus, pixel_snail, wavenet
from fastgen.nn import masked_conv2d as nn_masked_conv2d
from fastgen.ops import masked_conv2d_mask


def gated_activation(x: Tensor, condition: Tensor | None = None, *, activation: str = "tanh") -> Tensor:
    a, b = (x if condition is None else x + condition).chunk(2, dim=1)
    return (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], dim=1))


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask_type: str, dilation: Any = 1, groups: int = 1,
    color_channels: int = 1,
) -> Tensor:  # fmt: skip
    """Kernels that end in the row of their output by padding, others by their mask."""
    rows, columns = weight.shape[2:]
    dy, dx = (dilation, dilation) if isinstance(dilation, int) else dilation
    if mask_type in ("down", "down_right"):
        wide = dx * (columns - 1)
        right = wide // 2 if mask_type == "down" else 0
        return F.conv2d(F.pad(x, (wide - right, right, dy * (rows - 1), 0)), weight, bias, 1, 0, dilation, groups)
    mask = _mask(mask_type, weight.shape, groups, color_channels)
    padding = (dy * (rows // 2), dx * (columns // 2))
    return F.conv2d(x, weight * mask, bias, 1, padding, dilation, groups)


@functools.cache  # the ports keep theirs as buffers
def _mask(mask_type: str, shape: torch.Size, groups: int, color_channels: int) -> Tensor:
    return masked_conv2d_mask(mask_type, shape, groups=groups, color_channels=color_channels)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Within, the models call torch and nothing of fastgen's."""
    with contextlib.ExitStack() as stack:
        for function, users in (
            (gated_activation, (gated_pixel_cnn, pixel_cnn_plus_plus, pixel_snail, wavenet)),
            (concat_elu, (pixel_cnn_plus_plus,)),
            (masked_conv2d, (_shifted_conv2d, nn_masked_conv2d)),
        ):
            for module in users:
                stack.enter_context(mock.patch.object(module, function.__name__, function))
        yield
