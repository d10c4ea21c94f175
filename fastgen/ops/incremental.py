"""`incremental`: images drawn pixel by pixel from an autoregressive network, each of its layers computed once for each place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._schema import DRAWS
from ._check import check_floating, check_seeds, fail, kind_of, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32

__all__ = ["incremental", "incremental_step"]


def incremental(
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor] = (),
    *,
    channels: int,
    seeds: Tensor | Sequence[int],
    count: int = 1,
    distribution: str = "categorical",
    levels: Tensor | None = None,
    known: Tensor | None = None,
    level_stride: int = 1,
    color_stride: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rounded: int | None = None,
    step: int = 0,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Draw images from a network of which pixel i is a distribution given the pixels before it.

    .. math:: x_i \sim p(x_i \mid l_i), \quad l_i = \mathrm{network}(x_{<i})_i, \qquad \log p(x) = \sum_i \log p(x_i \mid l_i)

    Each l_i is what the whole network would say, but no value of a layer is computed twice: taps that read the rows above once a
    row for all its columns, the rest pixel by pixel. ``fastgen.autoregressive`` makes the program, weights, parameters and
    constants of a network.

    Color c of a pixel is drawn by the inverse of its cumulative distribution from uniform c of the pixel's own, of the Philox
    stream (``seeds[n]``, ``step``), so that an image depends on its seed alone. A mixture draws its component first, then color
    after color.

    Args:
        image: [N, C, H, W]: what is ``known``; elsewhere it is not read. It is taken to the dtype of ``parameters``.
        program: int64, on the device of ``image``.
        weights: packed, in the dtype of ``parameters`` or bfloat16; others are taken to the dtype of ``parameters``.
        parameters: small numbers of the program; float64 says that all is computed in float64, any other dtype in float32.
        constants: [1 or N, 1 or H, 1 or W, K] each: what does not depend on the image.
        channels: O, logits of a pixel, as the program has them.
        seeds: N integers.
        count: levels of a categorical distribution, or components of a mixture.
        distribution: ``"categorical"``; ``"bernoulli"``, whose single logit is that of the second level; ``"logistic_mixture"`` of
            1 color or 3 in [-1, 1], laid out as pixel-cnn-pp has it, drawn together.
        levels: [>= count], the values of the levels, 0, 1, ... where not given.
        known: bool, [N, C, H, W]: colors that stay as given (inpainting); the log-probability is that of the nearest level. Of a
            mixture a pixel is known where all its colors are, otherwise all of it is drawn.
        level_stride: level k of color c has logit k level_stride + c color_stride.
        color_stride: ``count`` where ``level_stride`` is 1 and the distribution categorical, otherwise 1, where not given.
        temperature: divides the logits; 0 takes the likeliest level. Of a mixture it also multiplies the scales.
        top_k: draw among so many of the likeliest levels; categorical alone, as ``top_p``.
        top_p: draw among the fewest of those that hold this probability.
        rounded: to how many levels in [-1, 1] what a mixture draws is rounded; not at all where not given.
        step: of the stream of uniforms, -2^31 <= step < 2^32.
        return_logits: whether to return the logits.

    Returns:
        The images in the dtype of ``image``; their log-probabilities at temperature 1, pixel by pixel, [N, H, W], and None or the
        logits [N, O, H, W], both in the dtype of the arithmetic. No gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or an option does not fit, the program is none, or there are logits that are not finite. That
            last, on a GPU, is no error, since to ask would be to wait: from there on the image and its log-probabilities are NaN.

    Sources: Ramachandran et al., "Fast Generation for Convolutional Autoregressive Models", 2017; van den Oord et al., "Pixel
    Recurrent Neural Networks", ICML 2016.
    """
    op = "incremental"
    if distribution not in DRAWS:
        fail(op, f"distribution must be one of {DRAWS}, got {distribution!r}")
    _check_all(op, image=image, weights=weights, parameters=parameters, levels=levels, constants=constants)
    _check_program(op, image, program)
    seeds = check_seeds(op, seeds, image.device)
    if seeds.shape[0] != image.shape[0] or seeds.device != image.device:
        fail(
            op,
            f"seeds must be one per image on its device, got {shape_of(seeds)} on {seeds.device} for {shape_of(image)}",
        )
    if known is not None:
        known = _known(op, known, image)
    if not -(2**31) <= step < 2**32:
        fail(op, f"step must be in [-2^31, 2^32), got {step}")
    _check_options(op, distribution, count, temperature, top_k, top_p, rounded)
    if color_stride is None:
        color_stride = count if level_stride == 1 and distribution == "categorical" else 1
    draw = [DRAWS.index(distribution), count, level_stride, color_stride, top_k or 0, rounded or 0, step]
    if levels is None:
        size = {"categorical": count, "bernoulli": 2, "logistic_mixture": 0}[distribution]
        levels = torch.arange(size, device=image.device).to(_dtype(parameters))
    function: Any = _sample
    if foreign(image, weights, parameters, levels, *constants):
        function = in_float32(op, _sample)
    options = (seeds, draw, float(temperature), 1.0 if top_p is None else float(top_p), channels, return_logits)
    images, log_prob, logits = function(image, known, program, weights, parameters, list(constants), levels, *options)
    return images.to(image.dtype), log_prob, logits if return_logits else None


def incremental_step(
    state: Tensor,
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor] = (),
    *,
    channels: int,
    row: int,
    column: int,
    color: int = 0,
) -> Tensor:
    """The logits of one pixel, for those who draw it themselves; :func:`incremental` says what the arguments are.

    Pixels are asked for in raster order, color after color where the network reads the colors of a pixel, and ``image`` holds by
    then what was drawn before. ``state``, zeros before the first, is written to.

    Args:
        state: the dtype of ``parameters``, float32 or float64; N times the numbers that the program keeps of an image.
        image: [N, C, H, W].
        row, column, color: the place.

    Returns:
        [N, channels] in the dtype of ``parameters``. No gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or the place does not fit, or the program is none.
    """
    op = "incremental_step"
    _check_all(op, image=image, weights=weights, parameters=parameters, state=state, constants=constants)
    _check_program(op, image, program)
    if parameters.dtype not in (torch.float32, torch.float64) or state.dtype != parameters.dtype:
        found = f"{state.dtype} and {parameters.dtype}"
        raise TypeError(f"{op}: state and parameters must be float32 or float64, both the same, got {found}")
    if not state.is_contiguous():
        fail(op, "state must be contiguous: it is written to")
    image, weights, parameters, constants = _in_dtype(image, weights, parameters, constants)
    place = (row, column, color, channels)
    return _raw("incremental_step", state, image, program.contiguous(), weights, parameters, constants, *place)


def _sample(
    image: Tensor,
    known: Tensor | None,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: list[Tensor],
    levels: Tensor,
    *options: Any,
) -> Any:
    """The raw op of tensors as it wants them."""
    image, weights, parameters, constants = _in_dtype(image, weights, parameters, constants)
    levels = levels.to(parameters.dtype).contiguous()
    return _raw(
        "incremental_sample", image, known, program.contiguous(), weights, parameters, constants, levels, *options
    )


def _raw(name: str, *args: Any) -> Any:
    """A raw op, whose complaints of its arguments are those of the public one."""
    function = getattr(torch.ops.fastgen, name).default
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not message.startswith(f"{name}: "):
            raise
        raise ValueError(message.replace("incremental_sample", "incremental", 1)) from None


def _dtype(parameters: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    return torch.float64 if parameters.dtype == torch.float64 else torch.float32


def _in_dtype(
    image: Tensor, weights: Tensor, parameters: Tensor, constants: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Contiguous, in the dtype of the arithmetic; weights of bfloat16 beside float32 stay."""
    dtype = _dtype(parameters)
    stored = weights.dtype if dtype == torch.float32 and weights.dtype == torch.bfloat16 else dtype
    return (
        image.to(dtype).contiguous(),
        weights.to(stored).contiguous(),
        parameters.to(dtype).contiguous(),
        [constant.to(dtype).contiguous() for constant in constants],
    )


def _check_all(op: str, *, image: Tensor, constants: Sequence[Tensor], **tensors: Tensor | None) -> None:
    """``image`` is [N, C, H, W]; all are floating tensors on its device, and constants to autograd."""
    check_floating(op, "image", image)
    if image.dim() != 4:
        fail(op, f"image must be [N, C, H, W], got {shape_of(image)}")
    if not isinstance(constants, Sequence):
        raise TypeError(f"{op}: constants must be a sequence of tensors, got {kind_of(constants)}")
    named = {"image": image, **tensors, **{f"constants[{k}]": constant for k, constant in enumerate(constants)}}
    for name, tensor in named.items():
        if tensor is None:
            continue
        check_floating(op, name, tensor)
        dims = 4 if name.startswith(("image", "constants")) else 1
        if tensor.dim() != dims:
            fail(op, f"{name} must have {dims} dimension{'s' if dims > 1 else ''}, got {shape_of(tensor)}")
        if tensor.device != image.device:
            fail(op, f"{name} must be on the device of image ({image.device}), got {tensor.device}")
        refuse_gradient(op, name, tensor)


def _check_program(op: str, image: Tensor, program: Tensor) -> None:
    if not isinstance(program, Tensor) or program.dtype != torch.int64:
        raise TypeError(f"{op}: program must be an int64 tensor, got {kind_of(program)}")
    if program.dim() != 1 or program.device != image.device:
        fail(op, f"program must be a vector on {image.device}, got {shape_of(program)} on {program.device}")


def _known(op: str, known: Tensor, image: Tensor) -> Tensor:
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        raise TypeError(f"{op}: known must be a bool tensor, got {kind_of(known)}")
    if known.shape != image.shape or known.device != image.device:
        wanted = f"{tuple(image.shape)}, and on {image.device}"
        fail(op, f"known must have the shape of image, {wanted}, got {shape_of(known)} on {known.device}")
    return known.contiguous()


def _check_options(
    op: str,
    distribution: str,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rounded: int | None,
) -> None:
    if count < 1:
        fail(op, f"count must be at least 1, got {count}")
    if not 0 <= temperature < float("inf"):
        fail(op, f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        fail(op, f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        fail(op, f"top_p must be in (0, 1], got {top_p}")
    if rounded is not None and rounded < 2:
        fail(op, f"rounded must be at least 2 levels, got {rounded}")
    for name, value, wanted in (
        ("top_k", top_k, "categorical"),
        ("top_p", top_p, "categorical"),
        ("rounded", rounded, "logistic_mixture"),
    ):
        if value is not None and distribution != wanted:
            fail(op, f"{name} is for a {wanted} distribution, got {name}={value} with {distribution!r}")
