"""What `incremental_sample` and `incremental_step` mean, in plain torch: a program followed pixel by pixel, each value computed once.

Buffers lie in the state as the kernels have them, [rows, N, columns, C], so that a state begun by one can be gone on with by the other.
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
from ._program import MOST, PANEL, Instruction, Operand, Program, activated, read_program


class Draw(NamedTuple):
    """DRAW_COLUMNS, and what is not an integer."""

    kind: int
    count: int
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
    d = Draw(*draw, temperature, top_p)
    out, log_prob = torch.empty_like(image), image.new_zeros(images, plan.height, plan.width)
    logits = image.new_empty(images if return_logits else 0, plan.output_channels, plan.height, plan.width)
    machine = _Machine(plan, parameters.new_zeros(images * plan.state), weights, parameters, constants, images)
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
            spoiled = found.isnan().nonzero().flatten().tolist()
            where = f"the logits of image {(spoiled or [0])[0]} at row {y}, column {x} are not finite, so no pixel can be drawn of them"
            require(op, not spoiled, where)
            out[:, first:last, y, x] = pixel
            log_prob[:, y, x] += found
            machine.write(y, x, pixel, first, last)
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
    machine = _Machine(plan, state, weights, parameters, constants, images)
    before = row * plan.width + column - (color == 0)
    if before >= 0:
        y, x = divmod(before, plan.width)
        machine.write(y, x, image[:, :, y, x], 0, color or plan.colors)
        machine.run("after", y, x)
    if column == color == 0:
        machine.run("row", row, None)
    if color == 0:
        machine.run("pixel", row, column)
        if plan.per_color:
            machine.run("after", row, column)
    return machine.logits(row, column).clone()


class _Machine:
    """A program and its buffers."""

    def __init__(
        self,
        program: Program,
        state: Tensor,
        weights: Tensor,
        parameters: Tensor,
        constants: Sequence[Tensor],
        images: int,
    ) -> None:
        self.program, self.weights, self.parameters, self.images = (
            program,
            weights.to(parameters.dtype),
            parameters,
            images,
        )
        self.places: list[Tensor] = []  # [rows, N, columns, C], or a constant [1 or N, 1 or H, 1 or W, C]
        for b in program.buffers:
            if b.constant >= 0:
                self.places.append(constants[b.constant])
            else:
                size = b.rows * images * b.columns * b.channels
                place = state[b.offset * images :][:size]
                self.places.append(place.view(b.rows, images, b.columns, b.channels))

    def write(self, y: int, x: int, values: Tensor, first: int, last: int) -> None:
        image = self.program.buffers[0]
        self.places[0][y % image.rows, :, image.left + x, first:last] = values[:, first:last]

    def logits(self, y: int, x: int) -> Tensor:
        p = self.program
        b = p.buffers[p.output]
        return self.places[p.output][y % b.rows, :, b.left + x, p.output_start : p.output_start + p.output_channels]

    def run(self, moment: str, y: int, x: int | None) -> None:
        """The instructions of a moment at (y, x) of the image, or of the row."""
        for i in self.program.instructions[moment]:  # those of "behind" go with the row's
            b = self.program.buffers[i.output]
            row, off = divmod(y, b.step)
            row -= i.moment == "behind"
            if off or not 0 <= row < b.height or (x is not None and (x % b.step or x // b.step >= b.width)):
                continue
            columns = range(b.width) if x is None else range(x // b.step, x // b.step + 1)
            place = self.places[i.output][row % b.rows, :, b.left :]
            if i.kind == "combine":
                for phase in range(min(i.upscale, len(columns))):
                    part = columns[phase :: i.upscale]
                    place[:, part.start : part.stop : part.step] = self._combine(i, row, part)
            else:
                place[:, columns.start : columns.stop] = self._other(i, row, columns)

    def _read(self, o: Operand, y: int, columns: range) -> Tensor:
        """[N, columns, channels] of an operand."""
        b, place = self.program.buffers[o.buffer], self.places[o.buffer]
        if b.constant >= 0:
            row = place[:, 0 if b.height == 1 else y]
            chosen = row if b.width == 1 else row[:, columns.start : columns.stop : columns.step]
            return chosen[..., o.start : o.start + o.channels]
        if not 0 <= y + o.dy < b.height:
            return place.new_zeros(self.images, len(columns), o.channels)
        row = place[(y + o.dy) % b.rows, :, b.left + o.dx + columns.start :]
        return row[:, : len(columns) * columns.step : columns.step][:, : len(columns), o.start : o.start + o.channels]

    def _combine(self, i: Instruction, y: int, columns: range) -> Tensor:
        out, u = self.program.buffers[i.output], i.upscale
        phase = i.phases[y % u * u + columns.start % u]
        panels = -(-out.channels // PANEL)
        packed = self.weights[phase.weights :][: panels * phase.total * PANEL].view(panels, phase.total, PANEL)
        weight = packed.transpose(0, 1).reshape(phase.total, panels * PANEL)[:, : out.channels]  # [total, O]
        total = weight.new_zeros(self.images, len(columns), out.channels)
        first = 0
        for s in phase.segments:
            b = self.program.buffers[s.source.buffer]
            row = s.stride * (y // u) + s.source.dy
            if 0 <= row < b.height:
                numbers = self.places[s.source.buffer][row % b.rows].flatten(1)  # [N, columns * C]
                begins = [(b.left + s.stride * (x // u) + s.source.dx) * b.channels + s.source.start for x in columns]
                at = torch.tensor(begins)[:, None] + torch.arange(s.length)
                total = total + numbers[:, at] @ weight[first : first + s.length]
            first += s.length
        if i.bias >= 0:
            total = total + self.parameters[i.bias : i.bias + out.channels]
        for o in i.operands:
            total = total + self._scaled(o, y, columns)
        return activated(i.activation, total)

    def _scaled(self, o: Operand, y: int, columns: range) -> Tensor:
        values = self._read(o, y, columns)
        return values if o.scale < 0 else values * self.parameters[o.scale]

    def _other(self, i: Instruction, y: int, columns: range) -> Tensor:
        if i.kind == "attention":
            return self._attention(i, y, columns)
        if i.kind == "concat":
            parts = [self._scaled(o, y, columns).expand(self.images, len(columns), -1) for o in i.operands]
            return activated(i.activation, torch.cat(parts, 2))
        first = self._read(i.operands[0], y, columns)
        if i.kind == "product":
            return activated(i.activation, first) * activated(i.gate, self._read(i.operands[1], y, columns))
        channels = self.program.buffers[i.output].channels
        if i.kind == "layer_norm":
            small = [None if at < 0 else self.parameters[at : at + channels] for at in (i.weight, i.bias)]
            return torch.nn.functional.layer_norm(first, (channels,), *small, eps=float(self.parameters[i.eps]))
        table = self.parameters[i.table :][: i.levels * i.weight].view(i.levels, i.weight)
        return table[first.nan_to_num(0.0).round().long().clamp(0, i.levels - 1)].flatten(2)

    def _attention(self, i: Instruction, y: int, columns: range) -> Tensor:
        width, scale = self.program.buffers[i.output].width, self.parameters[i.scale]
        query, key, value = i.operands
        queries = self._read(query, y, columns).unflatten(2, (i.heads, -1))  # [N, columns, heads, E]
        keys, values = (
            torch.cat([self._read(o, row, range(width)) for row in range(y + 1)], 1).unflatten(2, (i.heads, -1))
            for o in (key, value)
        )
        outputs = []
        for k, x in enumerate(columns):
            count = y * width + x + (not i.strict)
            scores = scale * torch.einsum("nhe,nlhe->nhl", queries[:, k], keys[:, :count])
            outputs.append(torch.einsum("nhl,nlhe->nhe", scores.softmax(-1), values[:, :count]).flatten(1))
        return torch.stack(outputs, 1)


def _turn_of(plan: Program, d: Draw, first: int, last: int) -> list[int]:
    """The logits of colors [first, last): of all, where the colors have no turns."""
    channels = range(plan.output_channels)
    if not plan.per_color:
        return list(channels)
    if d.color_stride <= d.level_stride:
        return [o for o in channels if first <= o % d.level_stride // max(d.color_stride, 1) < last]
    return [o for o in channels if first <= o // d.color_stride < last]


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
        chosen = logits[:, : (3 if plan.colors == 1 else 10) * d.count]
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
            options = logits[:, at : at + (d.count - 1) * d.level_stride + 1 : max(d.level_stride, 1)]
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
    plan = _check(op, image, program, weights, parameters, constants, channels)
    _check_vector(op, "levels", levels, parameters.dtype)
    _check_vector(op, "seeds", seeds, torch.int64)
    require(op, len(seeds) == len(image), f"seeds must be one an image ({len(image)}), got {len(seeds)}")
    if known is not None:
        fits = known.dtype == torch.bool and known.shape == image.shape and known.is_contiguous()
        require(
            op,
            fits,
            f"known must be bool, contiguous and of the shape of image, got {known.dtype}, {tuple(known.shape)}",
        )
    require(op, len(draw) == len(DRAW_COLUMNS), f"draw must hold {len(DRAW_COLUMNS)} numbers, got {len(draw)}")
    require(
        op,
        temperature >= 0 and math.isfinite(temperature),
        f"temperature must be finite and not negative, got {temperature}",
    )
    require(op, 0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")
    d = Draw(*draw, temperature, top_p)
    require(op, 0 <= d.kind < len(DRAWS), f"draw has kind {d.kind}, which must be in [0, {len(DRAWS) - 1}]")
    strides = 0 <= d.level_stride < MOST and 0 <= d.color_stride < MOST
    possible = 1 <= d.count < MOST and strides and d.top_k >= 0 and (d.levels == 0 or d.levels >= 2)
    require(op, possible, f"draw has a count, a stride, top_k or levels that cannot be: {tuple(draw)}")
    if plan is None:
        return
    colors, kind = plan.colors, DRAWS[d.kind]
    if kind == "logistic_mixture":
        fits = colors in (1, 3) and not plan.per_color
        require(op, fits, f"a mixture of logistics draws 1 color or 3 together, the image has {colors}")
    channels = {
        "categorical": (d.count - 1) * d.level_stride + (colors - 1) * d.color_stride + 1,
        "bernoulli": (colors - 1) * d.color_stride + 1,
        "logistic_mixture": (3 if colors == 1 else 10) * d.count,
    }[kind]
    require(
        op,
        channels <= plan.output_channels,
        f"draw reads {channels} logits where the program has {plan.output_channels}",
    )
    needed = {"categorical": d.count, "bernoulli": 2, "logistic_mixture": 0}[kind]
    require(op, len(levels) >= needed, f"levels must hold {needed} values, got {len(levels)}")


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
    plan = _check(op, image, program, weights, parameters, constants, channels)
    _check_vector(op, "state", state, parameters.dtype)
    if plan is None:
        return
    require(
        op,
        len(state) == len(image) * plan.state,
        f"state must hold {len(image) * plan.state} numbers, got {len(state)}",
    )
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
    for name, t in (("parameters", parameters), ("weights", weights)):
        require(op, t.dim() == 1 and t.is_contiguous(), f"{name} must be a contiguous vector, got {tuple(t.shape)}")
    for name, t in (("image", image), *(("constants", c) for c in constants)):
        fits = t.dtype == dtype and t.dim() == 4 and t.is_contiguous()
        require(op, fits, f"{name} must be contiguous, 4-dimensional and {dtype}, got {t.dtype}, {tuple(t.shape)}")
    for t in (program, weights, parameters, *constants):
        require(
            op, t.device == image.device, f"all tensors must be on the device of image, {image.device}, got {t.device}"
        )
    if isinstance(program, FakeTensor):
        return None
    plan = read_program(op, program, weights.numel(), parameters.numel(), constants, image.shape[0])
    require(
        op, channels == plan.output_channels, f"channels must be the program's {plan.output_channels}, got {channels}"
    )
    wanted = (plan.colors, plan.height, plan.width)
    require(
        op, image.shape[1:] == wanted, f"image must be [N, {wanted}], as the program has it, got {tuple(image.shape)}"
    )
    return plan


def _check_vector(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    fits = t.dtype == dtype and t.dim() == 1 and t.is_contiguous()
    require(op, fits, f"{name} must be a contiguous {dtype} vector, got {t.dtype}, {tuple(t.shape)}")


def incremental_sample_fake(image: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (n, _, h, w), (channels, return_logits) = image.shape, rest[-2:]
    return (
        image.new_empty(image.shape),
        image.new_empty(n, h, w),
        image.new_empty(n if return_logits else 0, channels, h, w),
    )


def incremental_step_fake(state: Tensor, image: Tensor, *rest: Any) -> Tensor:
    return image.new_empty(image.shape[0], rest[-1])
