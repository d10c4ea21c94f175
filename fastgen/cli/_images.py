"""Images as pictures: pixels of tensors, a grid of them, and PNG files."""

import numpy as np
import torch
from torch import Tensor

from ..data import png

__all__ = ["GAP", "LEGIBLE", "grid", "in_colour", "png", "to_pixels"]

LEGIBLE = 64  # pixels of the shorter side of an image in a grid, at least
GAP = 160  # the grey between the images of a grid, which neither paper nor ink is


def to_pixels(images: Tensor, ink: bool = False) -> np.ndarray:
    """[N, 1 or 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8. Two channels show as red and green.

    Args:
        ink: images of one channel are ink on paper: 1 is black, -1 is white.
    """
    turned = ink and images.shape[1] == 1
    levels = (((-images if turned else images).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return in_colour(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def in_colour(levels: np.ndarray, ink: bool = False) -> np.ndarray:
    """[N, H, W, 1, 2 or 3] uint8 -> [N, H, W, 3]. Two channels show as red and green; one is ink, 255, on paper where ``ink``."""
    channels = levels.shape[3]
    if channels == 1:
        return (255 - levels if ink else levels).repeat(3, axis=3)
    if channels == 2:
        return np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=3)
    if channels != 3:
        raise ValueError(f"images must have 1, 2 or 3 channels to be drawn, got {channels}")
    return levels


def grid(pixels: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] -> one picture [*, *, 3], as square as can be, each pixel of small images many pixels wide."""
    n, height, width, _ = pixels.shape
    scale = -(-LEGIBLE // min(height, width))
    gap = max(1, scale // 4)
    tiles = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    down, right = height * scale + gap, width * scale + gap
    picture = np.full((rows * down + gap, columns * right + gap, 3), GAP, dtype=np.uint8)
    for k in range(n):
        top, left = gap + k // columns * down, gap + k % columns * right
        picture[top : top + height * scale, left : left + width * scale] = tiles[k]
    return picture
