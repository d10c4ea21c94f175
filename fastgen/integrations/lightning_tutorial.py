"""The UvA tutorial of Lightning on autoregressive models: both stacks of Gated PixelCNN, and its sampling."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..ops import gated_activation
from .generic import Conv2d
from .masking import RASTER, STACKS, masked, unmaskable
from .stand_in import StandIn, mixin_of
from .stepping import steps_of

PROJECT = "UvA tutorial"
TYPES = (*RASTER, *STACKS)


class MaskedConvolution(StandIn):
    of, project, does = "MaskedConvolution", PROJECT, "the taps of the mask alone, the weight left as it is"
    takes, has = ("x",), ("mask", "conv")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if is_plain(module.conv):
            yield from unmaskable(module.conv, module.mask, TYPES)
        else:
            yield f"a convolution of class {type(module.conv).__name__}"

    def forward(self: Any, x: Tensor) -> Tensor:
        y = masked(self.conv, self.mask, x, TYPES, called=True) if is_plain(self.conv) else None
        return self.theirs(x) if y is None else y


def is_plain(conv: Any) -> bool:
    return type(conv) is nn.Conv2d or (mixin_of(conv) is Conv2d and conv.parent_class is nn.Conv2d)


class GatedMaskedConv(StandIn):
    of, project, does = (
        "GatedMaskedConv",
        PROJECT,
        "both gates in one pass each, the vertical stack's part in the second",
    )
    takes, has = ("v_stack", "h_stack"), ("conv_vert", "conv_horiz", "conv_vert_to_horiz", "conv_horiz_1x1")

    def forward(self: Any, v_stack: Tensor, h_stack: Tensor) -> tuple[Tensor, Tensor]:
        v = self.conv_vert(v_stack)
        h = gated_activation(self.conv_horiz(h_stack), self.conv_vert_to_horiz(v))
        return gated_activation(v), self.conv_horiz_1x1(h) + h_stack


class PixelCNN(StandIn):
    of, project = "PixelCNN", PROJECT
    does = "sample(): each pixel at the cost of a pixel, drawn by torch.multinomial as before"
    method, takes = "sample", ("img_shape", "img")
    has = ("conv_vstack", "conv_hstack", "conv_layers", "conv_out")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "conv_vstack")

    @torch.no_grad()
    def sample(self: Any, img_shape: Sequence[int], img: Tensor | None = None) -> Tensor:
        """Levels of the pixels that are -1 in ``img``, which is written to, as theirs is. A pixel that is -1 in one image is drawn
        in all, as theirs is."""
        shape = tuple(img_shape)
        if img is not None and tuple(img.shape) != shape:
            return self.theirs(img_shape, img)
        image = torch.full(shape, -1, device=next(self.parameters()).device) if img is None else img
        steps = steps_of(self, image)
        if steps is None:
            return self.theirs(img_shape, img)
        colors, height, width = shape[1:]
        for row in tqdm(range(height), leave=False, disable=None):
            for column in range(width):
                logits = steps(image, row, column).unflatten(1, (-1, colors))
                for color in range(colors):
                    if (image[:, color, row, column] != -1).all().item():
                        continue
                    probs = logits[:, :, color].softmax(-1)
                    image[:, color, row, column] = torch.multinomial(probs, num_samples=1).squeeze(-1)
        return image


STAND_INS = (MaskedConvolution, GatedMaskedConv, PixelCNN)
