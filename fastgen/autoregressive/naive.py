"""Sampling by a pass of the full network for every pixel: what the cached engine is measured against, and right for any model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# network(image [n, C, H, W], samples [n]) -> logits [n, O, H, W] of those samples of a batch.
Logits = Callable[[Tensor, Tensor], Tensor]
# draw(logits [n, O, h, w], seeds [n], place, colors=(first, last)) -> [n, last - first, h, w]: pixels from number ``place`` on in
# raster order, or of one pixel some colors, by uniforms that depend on seed, place and color alone.
Draw = Callable[..., Tensor]


def naive(
    network: Logits,
    draw: Draw,
    seeds: Tensor,
    image: Tensor,
    known: Tensor,
    *,
    colors: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The pixels of ``image`` [N, C, H, W] that are not ``known``, one after the other in raster order.

    Args:
        network, draw: logits of images, and pixels of logits.
        seeds: [N].
        image: with what is known, and anything elsewhere, which the first pixels are not to depend on.
        known: bool, [N or 1, C or 1, H, W].
        colors: the order of a pixel's colors, where each depends on those before it: a pass for every one of them.
        progress: is told after each pixel how many are done.
    """
    image, known = image.clone(), known.expand_as(image)
    samples = torch.arange(len(image), device=image.device)
    height, width = image.shape[2:]
    turns = [(0, image.shape[1])] if colors is None else [(c, c + 1) for c in colors]
    for place in range(height * width):
        y, x = divmod(place, width)
        for first, last in turns:
            here = (slice(None), slice(first, last), slice(y, y + 1), slice(x, x + 1))
            if not bool(known[here].all()):
                logits = network(image, samples)[:, :, y : y + 1, x : x + 1]
                drawn = draw(logits, seeds, place, colors=(first, last)).to(image)
                image[here] = torch.where(known[here], image[here], drawn)
        if progress is not None:
            progress(place + 1)
    return image
