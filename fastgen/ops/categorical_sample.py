"""`categorical_sample`: a level for each position, by a seed a sample."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._check import check_draw, check_floating, check_seeds, fail, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import watched


def categorical_sample(
    logits: Tensor,
    *,
    seeds: Tensor | Sequence[int],
    element: int = 0,
    step: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A level k of :math:`\mathrm{softmax}(logits / temperature)` at each position, by the inverse of the cumulative distribution:
    the first k with

    .. math:: \textstyle\sum_{j \le k} p_j > u

    where u is uniform number ``element`` + position of the stream (``seeds[n]``, ``step``) of Philox4x32-10, positions counted in
    the order of the dimensions after K. So a draw depends on the logits, the seed and its place alone: not on the batch, the
    layout or the number of threads. Devices agree but where u falls within rounding (1e-6) of a step of the sum.

    Args:
        logits: [N, K, *], any strides; float64, float32, bfloat16 or float16 (others: float32 copies). -inf is a level that is
            never drawn.
        seeds: N integers (list or int64 tensor on the device of ``logits``), any 64-bit values.
        element: the place of the first position in the stream: y * W + x for a pixel drawn alone.
        step: -2^31 <= step < 2^32, the number of the stream.
        temperature: divides the logits; 0 takes the largest, of equal ones the first.
        top_k: draw among the K' largest levels alone, of equal ones the first.
        top_p: of those draw among the fewest most probable ones that hold this much of the probability, in (0, 1].
        return_log_prob: also return the logarithm of the drawn level's probability under the logits as they are, at temperature 1
            and with nothing cut.

    Returns:
        int64 [N, *] contiguous; with ``return_log_prob`` a pair, the second float32, or float64 for float64 ``logits``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or a number does not fit, ``logits`` require a gradient, which a draw has not, or the largest
            logit of a position is not finite. On a GPU, where asking would wait for the device, and under the compiler and the
            transforms of `torch.func`, the level there is -1 and its log-probability NaN.

    Sources: Salmon et al., SC 2011; Holtzman et al., "The curious case of neural text degeneration", ICLR 2020 (``top_p``).
    """
    op = "categorical_sample"
    check_floating(op, "logits", logits)
    if logits.dim() < 2 or logits.shape[1] < 1:
        fail(op, f"logits must be [N, K, *] with K >= 1, got {shape_of(logits)}")
    refuse_gradient(op, "logits", logits)
    seeds = check_seeds(op, seeds, logits.device)
    check_draw(op, seeds, logits, element, step, temperature)
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        fail(op, f"top_k must be an integer of at least 1, or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        fail(op, f"top_p must be in (0, 1], or None, got {top_p!r}")
    function = in_float32(op, _draw) if foreign(logits) else _draw
    cut = (top_k or 0, 1.0 if top_p is None else float(top_p))
    drawn, log_probs = function(logits, seeds, element, step, float(temperature), *cut, return_log_prob)
    if logits.device.type == "cpu" and not watched() and bool((drawn < 0).any()):
        place = (drawn < 0).nonzero()[0].tolist()
        largest = logits[place[0], :, *place[1:]].amax().item()
        what = "a NaN" if math.isnan(largest) else f"{largest} as the largest"
        fail(op, f"the largest logit of a position must be finite, got {what} at [N, *] = {place}")
    return (drawn, log_probs) if return_log_prob else drawn


_draw: Any = torch.ops.fastgen.categorical_sample.default
