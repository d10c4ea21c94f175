"""What `incremental_sample` and `incremental_step` mean, in plain torch: a program followed pixel by pixel, each value once.

Buffers lie in the state as the kernels have them, [rows, N, columns, C]: a state begun by one can be gone on with by the other.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._schema import DRAW_COLUMNS, DRAWS
from . import _sampling
from ._check import require
from ._machine import Machine
from ._program import MOST, Program, read_program


class Draw(NamedTuple):
    """DRAW_COLUMNS, and what is not an integer."""

    kind: int
    size: int  # `count`, which a tuple has already
    level_stride: int
    color_stride: int
    top_k: int
    levels: int
    step: int
    temperature: float
    top_p: float


def incremental_sample(
    image: Tensor,
    known: Tensor | None,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    levels: Tensor,
    seeds: Tensor,
    draw: Sequence[int],
    temperature: float,
    top_p: float,
    channels: int,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Images, log-probabilities [N, H, W], logits [N, O, H, W] or empty)."""
    op, images = "incremental_sample", image.shape[0]
    plan = read_program(op, program, weights.numel(), parameters.numel(), constants, images)
    d = Draw._make((*draw, temperature, top_p))
    out, log_prob = torch.empty_like(image), image.new_zeros(images, plan.height, plan.width)
    logits = image.new_empty(images if return_logits else 0, plan.output_channels, plan.height, plan.width)
    machine = Machine(plan, parameters.new_zeros(images * plan.state), weights, parameters, constants, images)
    given = torch.zeros_like(image, dtype=torch.bool) if known is None else known
    turns = [(c, c + 1) for c in range(plan.colors)] if plan.per_color else [(0, plan.colors)]
    for y, x in product(range(plan.height if images else 0), range(plan.width)):
        if x == 0:
            machine.run("row", y, None)
        machine.run("pixel", y, x)
        for first, last in turns:
            if plan.per_color:
                machine.run("after", y, x)
            values = machine.logits(y, x)
            if return_logits:
                turn = _turn_of(plan, d, first, last)
                logits[:, turn, y, x] = values[:, turn]
            pixel, found = _draw(
                plan, d, values, image[:, :, y, x], given[:, :, y, x], levels, seeds, y * plan.width + x, first, last
            )
            for n in found.isnan().nonzero().flatten().tolist():
                where = f"image {n} at row {y}, column {x}"
                require(op, False, f"the logits of {where} are not finite, so no pixel can be drawn of them")
            out[:, first:last, y, x] = pixel
            log_prob[:, y, x] += found
            machine.write(y, x, pixel, first)
        machine.run("after", y, x)
    return out, log_prob, logits


def incremental_step(
    state: Tensor,
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    row: int,
    column: int,
    color: int,
    channels: int,
) -> Tensor:
    """Logits [N, O]."""
    images = image.shape[0]
    plan = read_program("incremental_step", program, weights.numel(), parameters.numel(), constants, images)
    machine = Machine(plan, state, weights, parameters, constants, images)
    before = row * plan.width + column - (color == 0)
    if before >= 0:
        y, x = divmod(before, plan.width)
        machine.write(y, x, image[:, : color or plan.colors, y, x])
        machine.run("after", y, x)
    if column == color == 0:
        machine.run("row", row, None)
    if color == 0:
        machine.run("pixel", row, column)
        if plan.per_color:
            machine.run("after", row, column)
    return machine.logits(row, column).clone()


def _turn_of(plan: Program, d: Draw, first: int, last: int) -> list[int]:
    """The logits of colors [first, last), the last's too what is no color's: of all, where the colors have no turns."""
    channels = range(plan.output_channels)
    if not plan.per_color:
        return list(channels)
    levels, colors = max(d.level_stride, 1), max(d.color_stride, 1)
    owners = [o % levels // colors if d.color_stride <= d.level_stride else o // colors for o in channels]
    return [o for o, color in zip(channels, owners, strict=True) if first <= min(color, plan.colors - 1) < last]


def _draw(
    plan: Program,
    d: Draw,
    logits: Tensor,
    given: Tensor,
    known: Tensor,
    levels: Tensor,
    seeds: Tensor,
    place: int,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor]:
    """The colors [N, last - first] of a pixel and their log-probability [N], NaN where the logits are not finite."""
    if DRAWS[d.kind] == "logistic_mixture":
        chosen = logits[:, : (3 if plan.colors == 1 else 10) * d.size]
        u = _sampling.uniforms(seeds, place * (plan.colors + 1), d.step, plan.colors + 1)
        drawn = _sampling.draw_logistic_mixture(chosen, plan.colors, d.levels, d.temperature, u)
        drawn = torch.where(known.all(1, keepdim=True), given, drawn)
        found = _sampling.log_prob_logistic_mixture(chosen, drawn, d.levels or 256)
        return drawn, torch.where(chosen.isfinite().all(1), found, torch.nan)
    values, total = [], logits.new_zeros(len(logits))
    for c in range(first, last):
        at = c * d.color_stride
        if DRAWS[d.kind] == "bernoulli":
            options = torch.stack([torch.zeros_like(logits[:, at]), logits[:, at]], 1)
        else:
            options = logits[:, at + d.level_stride * torch.arange(d.size, device=logits.device)]
        u = _sampling.uniforms(seeds, place * plan.colors + c, d.step, 1)[:, 0]
        level, found = _sampling.draw_categorical(options, d.temperature, d.top_k, d.top_p, u)
        nearest = (levels[: options.shape[1]] - given[:, c, None]).abs().argmin(1)
        level = torch.where(known[:, c], nearest, level.clamp_min(0))
        total = total + torch.where(known[:, c], _sampling.log_prob_categorical(options, level), found)
        values.append(torch.where(known[:, c], given[:, c], levels[level]))
    return torch.stack(values, 1), total


def incremental_sample_check(
    image: Tensor,
    known: Tensor | None,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    levels: Tensor,
    seeds: Tensor,
    draw: Sequence[int],
    temperature: float,
    top_p: float,
    channels: int,
    return_logits: bool,
) -> None:
    op = "incremental_sample"
    _check_vector(op, "levels", levels, parameters.dtype, image.device)
    _check_vector(op, "seeds", seeds, torch.int64, image.device)
    plan = _check(op, image, program, weights, parameters, constants, channels)
    images = image.shape[0]
    require(op, seeds.shape[0] == images, f"seeds must be one an image ({images}), got {seeds.shape[0]}")
    if known is not None:
        fits = known.dtype == torch.bool and known.shape == image.shape and known.is_contiguous()
        found = f"{known.dtype}, {tuple(known.shape)}, on {known.device}"
        fits = fits and known.device == image.device
        require(op, fits, f"known must be bool, contiguous, of the shape and on the device of image, got {found}")
    require(op, len(draw) == len(DRAW_COLUMNS), f"draw must hold {len(DRAW_COLUMNS)} numbers, got {len(draw)}")
    require(
        op,
        temperature >= 0 and math.isfinite(temperature),
        f"temperature must be finite and not negative, got {temperature}",
    )
    require(op, 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")
    d = Draw._make((*draw, temperature, top_p))
    require(op, 0 <= d.kind < len(DRAWS), f"draw has kind {d.kind}, which must be in [0, {len(DRAWS) - 1}]")
    strides = 0 <= d.level_stride < MOST and 0 <= d.color_stride < MOST
    possible = 1 <= d.size < MOST and strides and d.top_k >= 0 and (d.levels == 0 or d.levels >= 2)
    require(op, possible, f"draw has a count, a stride, top_k or levels that cannot be: {tuple(draw)}")
    kind = DRAWS[d.kind]
    needed = {"categorical": d.size, "bernoulli": 2, "logistic_mixture": 0}[kind]
    require(op, levels.shape[0] >= needed, f"levels must hold {needed} values, got {levels.shape[0]}")
    if plan is None:
        return
    colors = plan.colors
    if kind == "logistic_mixture":
        fits = colors in (1, 3) and not plan.per_color
        require(op, fits, f"a mixture of logistics draws 1 color or 3 together, the image has {colors}")
    channels = {
        "categorical": (d.size - 1) * d.level_stride + (colors - 1) * d.color_stride + 1,
        "bernoulli": (colors - 1) * d.color_stride + 1,
        "logistic_mixture": (3 if colors == 1 else 10) * d.size,
    }[kind]
    require(
        op,
        channels <= plan.output_channels,
        f"draw reads {channels} logits where the program has {plan.output_channels}",
    )


def incremental_step_check(
    state: Tensor,
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    row: int,
    column: int,
    color: int,
    channels: int,
) -> None:
    op = "incremental_step"
    _check_vector(op, "state", state, parameters.dtype, image.device)
    plan = _check(op, image, program, weights, parameters, constants, channels)
    if plan is None:
        return
    wanted = image.shape[0] * plan.state
    require(op, state.shape[0] == wanted, f"state must hold {wanted} numbers, got {state.shape[0]}")
    inside = 0 <= row < plan.height and 0 <= column < plan.width and 0 <= color < (plan.colors if plan.per_color else 1)
    require(op, inside, f"row, column and color must lie in the image, got {row}, {column}, {color}")


def _check(
    op: str,
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    channels: int,
) -> Program | None:
    """The program; None where its numbers are not there to be read, in a trace."""
    dtype = parameters.dtype
    require(op, dtype in (torch.float32, torch.float64), f"parameters must be float32 or float64, got {dtype}")
    stored = weights.dtype == dtype or (dtype == torch.float32 and weights.dtype == torch.bfloat16)
    require(op, stored, f"weights must be of the dtype of parameters, or bfloat16 beside float32, got {weights.dtype}")
    _check_vector(op, "parameters", parameters, dtype, image.device)
    _check_vector(op, "weights", weights, weights.dtype, image.device)
    _check_vector(op, "program", program, torch.int64, image.device)
    for name, t in (("image", image), *(("constants", c) for c in constants)):
        fits = t.dtype == dtype and t.dim() == 4 and t.is_contiguous() and t.device == image.device
        wanted = f"contiguous, 4-dimensional, {dtype} and on {image.device}"
        require(op, fits, f"{name} must be {wanted}, got {t.dtype}, {tuple(t.shape)} on {t.device}")
    if isinstance(program, FakeTensor) or program.is_meta:
        return None
    plan = read_program(op, program, weights.numel(), parameters.numel(), constants, image.shape[0])
    require(
        op, channels == plan.output_channels, f"channels must be the program's {plan.output_channels}, got {channels}"
    )
    sizes = (plan.colors, plan.height, plan.width)
    fits = image.shape[1:] == sizes
    require(op, fits, f"image must be [N, *{sizes}], as the program has it, got {tuple(image.shape)}")
    return plan


def _check_vector(op: str, name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    fits = t.dtype == dtype and t.dim() == 1 and t.is_contiguous() and t.device == device
    found = f"{t.dtype}, {tuple(t.shape)} on {t.device}"
    require(op, fits, f"{name} must be a contiguous {dtype} vector on {device}, got {found}")


def incremental_sample_fake(image: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (n, _, h, w), (channels, return_logits) = image.shape, rest[-2:]
    return (
        image.new_empty(image.shape),
        image.new_empty(n, h, w),
        image.new_empty(n if return_logits else 0, channels, h, w),
    )


def incremental_step_fake(state: Tensor, image: Tensor, *rest: Any) -> Tensor:
    return image.new_empty(image.shape[0], rest[-1])
