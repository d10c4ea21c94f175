"""`sample`: images of an autoregressive model, by the cached engine where it can be planned, else exactly all the same."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import _dispatch
from ..ops._check import check_seeds
from ..ops import incremental, incremental_step
from .capture import NotPlannable
from .distribution import Distribution, distribution_of
from .jacobi import jacobi
from .naive import naive
from .plan import Plan, plan
from .progress import rows_bar

METHODS = ("auto", "cached", "jacobi", "naive")
LONG = 3 * 10**10  # multiply-adds: some two seconds of two cores, from which on the rows are counted on a bar


def sample(
    model: nn.Module,
    shape: Sequence[int],
    *,
    condition: Any = None,
    seeds: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prefix: Tensor | None = None,
    image: Tensor | None = None,
    known: Tensor | None = None,
    distribution: str | None = None,
    values: Sequence[float] | Tensor | None = None,
    levels: int | None = None,
    method: str = "auto",
    weights_dtype: torch.dtype | None = None,
    return_log_prob: bool = False,
    progress: bool = True,
) -> Any:
    """Images of an autoregressive model, pixel after pixel in raster order, at the cost of one pass over the image.

    An image depends on its seed alone: not on the batch, the number of threads or the method. Every method draws the same pixels
    where its logits are the same.

    Args:
        model: ``model(x)`` or ``model(x, condition)`` returns logits of each pixel that depend on the pixels before it alone; of
            :mod:`fastgen.models`, of a project that PEERS know, or a user's own. In which mode it is does not matter: it samples in
            evaluation mode.
        shape: (N, C, H, W) of the images, or (N, C, T) of sequences.
        condition: what the model takes beside the images.
        seeds: one integer a sample; drawn from torch's default generator where None.
        temperature: divides the logits; 0 takes the most probable level. Of a mixture it also multiplies the scales.
        top_k, top_p: cut the levels as :func:`fastgen.ops.categorical_sample` does; not of a mixture.
        prefix: [N or 1, C, h, W] with h <= H: the first rows, which are kept.
        image, known: [N or 1, C, H, W], and of which pixels it is kept: a bool tensor of that shape, or [.., 1, ..].
        distribution, values, levels: what the logits are, where the model does not say: ``"categorical"`` with the value that the
            model takes for each level, ``"bernoulli"`` of two ``values`` (0 and 1), ``"logistic_mixture"`` rounded to ``levels``.
        method: ``"cached"``; ``"jacobi"``, passes of the full network until nothing changes; ``"naive"``, one pass a pixel;
            ``"auto"``, cached where the model can be planned and else Jacobi, which it says.
        weights_dtype: ``torch.bfloat16`` reads half as much at each pixel, of a float32 model, with rounded weights.
        return_log_prob: also return the log-probability of each pixel, under the logits as they are.
        progress: a bar on what takes more than some two seconds, where somebody can see it.

    Returns:
        [N, C, H, W] in the model's dtype, or with ``return_log_prob`` a pair with [N, H, W].

    Raises:
        NotPlannable: ``method="cached"``, and the model cannot be planned; the message names the layer.
        ValueError: an argument does not fit, or the logits are not finite.

    Sources: van den Oord et al., "Pixel recurrent neural networks", ICML 2016; Ramachandran et al., "Fast generation for convolutional
    autoregressive models", 2017; Song et al., "Accelerating feedforward computation via parallel nonlinear equation solving", ICML 2021.
    """
    full = _shape(shape)
    if method not in METHODS:
        raise ValueError(f"sample: method must be one of {METHODS}, got {method!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"sample: model must be a torch.nn.Module, got {type(model).__name__}")
    made = None
    if method in ("auto", "cached"):
        try:
            made = plan(model, full, condition=condition, weights_dtype=weights_dtype)
        except NotPlannable as error:
            if method == "cached":
                raise
            _dispatch.warn_once(f"sample: {error}; Jacobi decoding takes the place of the cached engine")
    network = FullNetwork(model, full, condition)
    found = distribution_of(model, network, made, kind=distribution, values=values, levels=levels)
    given, mask = _given(full, network, prefix, image, known)
    draws = Draws(found, _seeds(seeds, full[0], network.device), temperature, top_k, top_p)
    if made is not None:
        images = _cached(made, draws, given, mask, progress)
    elif method == "naive":
        images = naive(network, draws, given, mask, progress)
    else:
        images = jacobi(network, draws, given, mask, progress)
    images = images.to(network.dtype)
    result = images if len(shape) == 4 else images[:, :, 0]
    if not return_log_prob:
        return result
    logits = network(images) if made is None else made.logits(images)
    log_prob = found.log_prob(logits, images.to(logits.dtype))
    return result, log_prob if len(shape) == 4 else log_prob[:, 0]
