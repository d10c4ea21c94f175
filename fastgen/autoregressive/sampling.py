"""`sample`: images of an autoregressive model, by the cached engine where it can be planned, else exactly all the same."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import _dispatch
from ..ops._check import check_seeds
from .capture import NotPlannable
from .distribution import Distribution, distribution_of
from .full_network import FullNetwork
from .jacobi import jacobi
from .naive import naive
from .plan import Plan, plan

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
    return_passes: bool = False,
    progress: bool = True,
) -> Any:
    """Images of an autoregressive model, pixel after pixel in raster order, at the cost of one pass over the image.

    An image depends on its seed alone: not on the batch, the number of threads or the method. Every method draws the same pixels
    where its logits are the same.

    Args:
        model: ``model(x)`` or ``model(x, condition)`` returns logits of each pixel that depend on the pixels before it alone; of
            :mod:`fastgen.models`, of a port of them, or a user's own. In which mode it is does not matter: it samples in
            evaluation mode.
        shape: (N, C, H, W) of the images, or (N, C, T) of sequences.
        condition: what the model takes beside the images.
        seeds: one integer a sample; drawn from torch's default generator where None.
        temperature: divides the logits; 0 takes the most probable level. Of a mixture it also multiplies the scales.
        top_k, top_p: cut the levels as :func:`fastgen.ops.categorical_sample` does; not of a mixture.
        prefix: [N or 1, C, h, W] with h <= H: the first rows, which are kept; of sequences [N or 1, C, t].
        image, known: [N or 1, C, H, W], and of which pixels it is kept: a bool tensor of that shape, or [.., 1, ..]; of sequences
            [N or 1, C, T]. A mixture's colors are known together.
        distribution, values, levels: what the logits are, where the model does not say: ``"categorical"`` with the value that the
            model takes for each level, ``"bernoulli"`` of two ``values`` (0 and 1), ``"logistic_mixture"`` rounded to ``levels``.
        method: ``"cached"``; ``"jacobi"``, passes of the full network until nothing changes; ``"naive"``, one pass a pixel;
            ``"auto"``, cached where the model can be planned and else Jacobi, which it says.
        weights_dtype: ``torch.bfloat16`` reads half as much at each pixel, of a float32 model, with rounded weights.
        return_log_prob: also return the log-probability of each pixel, under the logits as they are.
        return_passes: also return how many passes of the full network each image took, [N] of int64: 0 of the cached engine.
        progress: a bar on what takes more than some two seconds, where somebody can see it.

    Returns:
        [N, C, H, W] in the model's dtype; a tuple of that, [N, H, W] with ``return_log_prob`` and [N] with ``return_passes``.

    Raises:
        NotPlannable: ``method="cached"``, and the model cannot be planned; the message names the layer.
        ValueError: an argument does not fit, or the logits are not finite.

    Sources: van den Oord et al., "Pixel recurrent neural networks", ICML 2016; Ramachandran et al., "Fast generation for
    convolutional autoregressive models", 2017; Song et al., "Accelerating feedforward computation via parallel nonlinear equation
    solving", ICML 2021.
    """
    full = _checked(model, shape, method)
    if weights_dtype is not None and method in ("jacobi", "naive"):
        raise ValueError(f"sample: weights_dtype is for the cached engine, got {weights_dtype} with method={method!r}")
    cut = checked_cut(temperature, top_k, top_p)
    network = FullNetwork(model, shape, condition)
    given, mask = _given(full, len(shape) == 3, prefix, image, known)
    given, mask = given.to(network.device, network.dtype), mask.to(network.device)
    chosen = _seeds(seeds, full[0], network.device)
    made = None
    if method in ("auto", "cached"):
        try:
            made = plan(model, shape, condition=condition, weights_dtype=weights_dtype)
        except NotPlannable as error:
            if method == "cached":
                raise
            _dispatch.warn_once(f"sample: {error}; Jacobi decoding takes the place of the cached engine")
    outputs = made.layout if made is not None else network.layout(full)
    found = distribution_of(model, *outputs, full[1], kind=distribution, values=values, levels=levels).to(
        network.device
    )
    if found.kind == "logistic_mixture":
        _check_mixture(mask, top_k, top_p)
    log_prob, passes = None, torch.zeros(full[0], dtype=torch.int64)
    if made is not None:
        drawn, log_prob = _cached(made, found, chosen, given, mask, cut, progress)
    else:
        draw = partial(found.draw, **cut)
        turns = None if full[1] == 1 or found.kind == "logistic_mixture" else range(full[1])
        with _bar(full, progress) as done:
            if method == "naive":
                drawn = naive(network, draw, chosen, given, mask, colors=turns, progress=done)
                passes += full[2] * full[3] * (1 if turns is None else full[1])
            else:
                drawn, passes = jacobi(network, draw, chosen, given, mask, in_turn=turns is not None, progress=done)
            if return_log_prob:
                log_prob = found.log_prob(network(drawn), drawn)
    images = drawn.to(network.dtype)
    if len(shape) == 3:
        images, log_prob = images[:, :, 0], None if log_prob is None else log_prob[:, 0]
    results = (images, *([log_prob] if return_log_prob else []), *([passes] if return_passes else []))
    return results if len(results) > 1 else images


def _cached(
    made: Plan,
    found: Distribution,
    seeds: Tensor,
    image: Tensor,
    known: Tensor,
    cut: dict[str, Any],
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """(Images, log-probabilities) by the engine: in one call, or pixel by pixel where that takes long enough to be watched."""
    p, dtype = made.program, made.program.parameters.dtype
    image, known = image.to(dtype).contiguous(), known.expand_as(image).contiguous()
    if not (progress and sys.stderr.isatty() and made.work * len(image) > LONG):
        draw, values = found.row(p.output_channels, cut["top_k"]), found.values.to(dtype)
        top_p = 1.0 if cut["top_p"] is None else cut["top_p"]
        call = torch.ops.fastgen.incremental_sample.default
        try:
            drawn, log_prob, _ = call(
                image, known, *p.tensors(), values, seeds, draw, cut["temperature"], top_p, p.output_channels, False
            )
        except RuntimeError as error:
            if "not finite" in str(error):
                raise ValueError(str(error).replace("incremental_sample", "sample")) from None
            raise
        return drawn, log_prob
    image, log_prob = image.clone(), image.new_zeros(len(image), *image.shape[2:])
    turns = [(c, c + 1) for c in range(image.shape[1])] if p.per_color else [(0, image.shape[1])]
    steps, width = made.steps(len(image)), image.shape[3]
    with _bar((*made.shape,), progress) as done:
        for place in range(image.shape[2] * width):
            y, x = divmod(place, width)
            here = (slice(None), slice(None), slice(y, y + 1), slice(x, x + 1))
            for first, last in turns:
                logits = steps(image, y, x, first)[:, :, None, None]
                drawn = found.draw(logits, seeds, place, colors=(first, last), **cut).to(dtype)
                turn = (here[0], slice(first, last), *here[2:])
                image[turn] = torch.where(known[turn], image[turn], drawn)
            log_prob[:, y, x] = found.log_prob(logits, image[here])[:, 0, 0]
            done(place + 1)
    return image, log_prob


class _bar:
    """Told how many pixels are done; shows it where that is wanted, takes some time, and somebody can see it."""

    def __init__(self, shape: Sequence[int], shown: bool) -> None:
        total = int(shape[-1]) * int(shape[-2])
        self.bar = tqdm(total=total, disable=None if shown else True, unit="pixel", leave=False, delay=2)

    def __enter__(self) -> Callable[[int], None]:
        return lambda done: self.bar.update(done - self.bar.n) and None

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _checked(model: Any, shape: Sequence[int], method: str) -> tuple[int, int, int, int]:
    """``shape`` as (N, C, H, W)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"sample: model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"sample: method must be one of {METHODS}, got {method!r}")
    if len(shape) not in (3, 4) or int(shape[0]) < 0 or any(int(size) < 1 for size in shape[1:]):
        raise ValueError(f"sample: shape must be (N, C, H, W) or (N, C, T), the sizes positive, got {tuple(shape)}")
    count, colors, *size = map(int, shape)
    return count, colors, *([1, *size] if len(size) == 1 else size)  # type: ignore[return-value]


def checked_cut(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """How a level is drawn, as :func:`fastgen.ops.categorical_sample` takes it."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"sample: temperature must be finite and not negative, got {temperature}")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"sample: top_k must be an integer of at least 1, or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must be in (0, 1], or None, got {top_p!r}")
    return {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}


def _check_mixture(known: Tensor, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for what cannot be said of a mixture, whose colors are drawn together and have no levels to cut."""
    if top_k is not None or top_p is not None:
        raise ValueError(f"sample: top_k and top_p are not for mixtures, got top_k={top_k} and top_p={top_p}")
    if not known.eq(known[:, :1]).all():
        raise ValueError("sample: known must be the same for all colors of a pixel, which a mixture draws together")


def _given(
    shape: tuple[int, int, int, int],
    sequence: bool,
    prefix: Tensor | None,
    image: Tensor | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """An image [N, C, H, W], and of what it is given; a ``sequence`` is one of height 1 and given without it."""
    count, colors, height, width = shape
    filled, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    if (image is None) != (known is None):
        raise ValueError("sample: image and known must be given together")
    if prefix is not None and image is not None:
        raise ValueError("sample: give prefix, or image and known, not both")
    if prefix is not None:
        most, form = (width, "t") if sequence else (height, f"h, {width}")
        sizes = tuple(prefix.shape)
        fits = len(sizes) == (3 if sequence else 4) and sizes[0] in (1, count) and sizes[1] == colors
        if not fits or not (sequence or sizes[3] == width):
            raise ValueError(f"sample: prefix must be [{count} or 1, {colors}, {form}], got shape {sizes}")
        if sizes[2] > most:
            raise ValueError(
                f"sample: prefix has {sizes[2]} {'samples, the sequence' if sequence else 'rows, the image'} {most}"
            )
        filled, mask = filled.to(prefix), mask.to(prefix.device)
        here = (..., 0, slice(sizes[2])) if sequence else (..., slice(sizes[2]), slice(None))
        filled[here], mask[here] = prefix, True
    if image is not None and known is not None:
        if known.dtype != torch.bool:
            raise TypeError(f"sample: known must be a bool tensor, got {known.dtype}")
        wanted = (count, colors, width) if sequence else shape
        try:
            filled, mask = image.expand(wanted).reshape(shape), known.expand(wanted).reshape(shape)
        except RuntimeError:
            message = f"image {tuple(image.shape)} and known {tuple(known.shape)} must broadcast to {wanted}"
            raise ValueError(f"sample: {message}") from None
    return filled, mask


def _seeds(seeds: Tensor | Sequence[int] | None, count: int, device: torch.device) -> Tensor:
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (count,), device="cpu").to(device)
    found = check_seeds("sample", seeds, device).to(device)
    if len(found) != count:
        raise ValueError(f"sample: seeds must be one an image ({count}), got {len(found)}")
    return found
