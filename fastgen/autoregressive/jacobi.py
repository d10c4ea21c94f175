"""Sampling by passes of the full network over all pixels at once: exact, for any model that depends on earlier pixels alone.

Song et al., "Accelerating feedforward computation via parallel nonlinear equation solving", ICML 2021, section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .naive import Draw, Logits


def jacobi(
    network: Logits,
    draw: Draw,
    seeds: Tensor,
    image: Tensor,
    known: Tensor,
    *,
    in_turn: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`naive` draws, and the passes that each sample took.

    Every pass draws every pixel anew, with the uniforms of its place, from logits of the image so far. A pixel is final once all
    before it are, so each pass makes one more final, and at most H W passes are needed (H W C where colors are ``in_turn``); most
    images take far fewer. A sample is done when a pass changes nothing, or its last pixel only.

    Args:
        network, draw, seeds, image, known: as :func:`naive` takes them.
        in_turn: whether a color's logits depend on those before it of the same pixel, from the first color to the last.
        progress: is told after each pass how many pixels are final in every sample.

    Returns:
        (image [N, C, H, W], passes [N] of int64).
    """
    count, channels, height, width = image.shape
    units = channels if in_turn else 1
    image, known = image.clone(), known.expand_as(image)
    passes = torch.zeros(count, dtype=torch.int64, device=image.device)
    final = torch.zeros_like(passes)  # pixels, or colors of pixels, from the first on
    number = torch.arange(height * width * units, device=image.device)
    samples = _unfinished(final, known, units)
    while len(samples):
        old = image[samples]
        drawn = draw(network(old, samples), seeds[samples], 0).to(image)
        free = ~known[samples] & _raster(number[None] >= final[samples, None], old, units)
        new = torch.where(free, drawn, old)
        changed = _in_order(new != old, units)
        # all before the first change are as they were drawn of one another, and the first change is drawn of those
        first = torch.where(changed, number, len(number)).amin(1)
        image[samples] = new
        passes[samples] += 1
        final[samples] = (first + 1).clamp(max=len(number))
        samples = samples[_unfinished(final[samples], known[samples], units)]
        if progress is not None:
            progress(int(final.min()) // units)
    return image, passes


def _in_order(mask: Tensor, units: int) -> Tensor:
    """[N, C, H, W] -> [N, H W units] in the order of drawing, of any color of a pixel where they are drawn at once."""
    rows = mask.flatten(2).mT  # [N, H W, C]
    return rows.flatten(1) if units > 1 else rows.any(2)


def _raster(mask: Tensor, image: Tensor, units: int) -> Tensor:
    """[N, H W units] -> [N, C, H, W], the other way round."""
    return mask.unflatten(1, (-1, units)).mT.expand(-1, image.shape[1], -1).reshape(image.shape)


def _unfinished(final: Tensor, known: Tensor, units: int) -> Tensor:
    """The numbers of the samples that have something to draw behind what is final."""
    open_ = _in_order(~known, units)
    behind = torch.arange(open_.shape[1], device=final.device)[None] >= final[:, None]
    return (open_ & behind).any(1).nonzero()[:, 0]
