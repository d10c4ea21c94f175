"""Programs of the cached sampler, read and checked as the kernels do: `csrc/cpu/incremental_program.cpp` in Python.

What the records hold is said in `fastgen/autoregressive/program.py`, what the numbers mean in `fastgen/_schema.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._schema import BUFFER_COLUMNS, INSTRUCTIONS, MOMENTS, NODE_ACTIVATIONS, PROGRAM_HEADER
from ._check import require

PANEL = 16
MOST = 2**31


@dataclass(frozen=True)
class Buffer:
    """BUFFER_COLUMNS."""

    constant: int
    channels: int
    height: int
    width: int
    rows: int
    left: int
    right: int
    offset: int
    step: int

    @property
    def columns(self) -> int:
        return self.left + self.width + self.right


@dataclass(frozen=True)
class Operand:
    buffer: int
    start: int
    dy: int
    dx: int
    channels: int = 0  # where the record says, or the channels of the output
    scale: int = -1


@dataclass(frozen=True)
class Segment:
    source: Operand
    length: int
    stride: int


@dataclass(frozen=True)
class Phase:
    total: int
    weights: int
    segments: list[Segment]


@dataclass
class Instruction:
    kind: str
    moment: str
    stage: int
    output: int
    activation: str = "none"
    gate: str = "none"
    bias: int = -1
    upscale: int = 1
    phases: list[Phase] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    weight: int = -1
    eps: int = -1
    heads: int = 1
    scale: int = -1
    strict: bool = False
    table: int = -1
    levels: int = 0


@dataclass(frozen=True)
class Program:
    """PROGRAM_HEADER, the buffers, and the instructions of each moment in the order of their stages."""

    height: int
    width: int
    colors: int
    state: int
    output: int
    output_start: int
    output_channels: int
    per_color: bool
    buffers: list[Buffer]
    instructions: dict[str, list[Instruction]]


class _Reader:
    def __init__(self, op: str, program: Tensor) -> None:
        self.op, self.numbers, self.at = op, program.tolist(), 0

    def __call__(self, what: str, low: int, high: int) -> int:
        require(self.op, self.at < len(self.numbers), "program ends before its last record does")
        value = self.numbers[self.at]
        self.at += 1
        require(self.op, low <= value <= high, f"program has {what} = {value}, which must be in [{low}, {high}]")
        return value


def read_program(
    op: str, program: Tensor, weights: int, parameters: int, constants: Sequence[Tensor], images: int
) -> Program:
    """A program, nothing of which reads or writes outside of its buffers, ``weights`` and ``parameters`` numbers."""
    take = _Reader(op, program)
    height, width, colors = (take(name, 1, MOST) for name in PROGRAM_HEADER[:3])
    count, records = take("buffers", 1, MOST), take("instructions", 0, len(program))
    state = take("state", 0, 2**40 // max(images, 1))
    output, start = take("output", 0, count - 1), take("output_start", 0, MOST)
    channels, per_color = take("output_channels", 1, MOST), take("per_color", 0, 1) == 1
    lows, highs = (-1, 1, 1, 1, 1, 0, 0, 0, 1), (len(constants) - 1, *[MOST] * 6, state, MOST)
    buffers = []
    for _ in range(count):
        buffer = Buffer(*(take(*column) for column in zip(BUFFER_COLUMNS, lows, highs, strict=True)))
        _check_buffer(op, buffer, constants, images, state)
        buffers.append(buffer)
    first = buffers[0]
    found = (first.constant, first.channels, first.height, first.width, first.step)
    require(op, found == (-1, colors, height, width, 1), "program's first buffer must be the image")
    instructions: dict[str, list[Instruction]] = {moment: [] for moment in MOMENTS}
    for _ in range(records):
        begin = take.at
        length = take("length", 5, MOST)
        i = _read_instruction(take, buffers)
        require(op, take.at - begin == length, "program has a record of another length than it says")
        _check_instruction(op, i, buffers, weights, parameters)
        instructions["row" if i.moment == "behind" else i.moment].append(i)
    require(op, take.at == len(take.numbers), "program goes on after its last record")
    logits = buffers[output]
    inside = start + channels <= logits.channels and (logits.height, logits.width) == (height, width)
    require(op, inside and logits.constant < 0, "program's output must lie in a buffer of the size of the image")
    for moment in instructions.values():
        moment.sort(key=lambda i: i.stage)
    return Program(height, width, colors, state, output, start, channels, per_color, buffers, instructions)


def _check_buffer(op: str, b: Buffer, constants: Sequence[Tensor], images: int, state: int) -> None:
    require(op, b.rows & (b.rows - 1) == 0, f"program keeps {b.rows} rows, which must be a power of two")
    if b.constant < 0:
        require(
            op, b.rows * b.columns * b.channels + b.offset <= state, "program has a buffer that lies past the state"
        )
        return
    t = constants[b.constant]
    fits = (
        t.dim() == 4
        and t.is_contiguous()
        and t.shape[0] in (1, images)
        and t.shape[1:] == (b.height, b.width, b.channels)
    )
    wanted = f"[1 or {images}, {b.height}, {b.width}, {b.channels}]"
    require(op, fits, f"constants[{b.constant}] must be contiguous {wanted}, got {tuple(t.shape)}")


def _read_instruction(take: Callable[[str, int, int], int], buffers: list[Buffer]) -> Instruction:
    def operand(channels: int | None = None, scaled: bool = False) -> Operand:
        place = (
            take("buffer", 0, len(buffers) - 1),
            take("start", 0, MOST),
            take("dy", -MOST, MOST),
            take("dx", -MOST, MOST),
        )
        count = take("channels", 1, MOST) if channels is None else channels
        return Operand(*place, count, take("scale", -1, MOST) if scaled else -1)

    def activation() -> str:
        return NODE_ACTIVATIONS[take("activation", 0, len(NODE_ACTIVATIONS) - 1)]

    i = Instruction(
        INSTRUCTIONS[take("kind", 0, len(INSTRUCTIONS) - 1)],
        MOMENTS[take("moment", 0, len(MOMENTS) - 1)],
        take("stage", 0, MOST),
        take("output", 0, len(buffers) - 1),
    )
    channels = buffers[i.output].channels
    if i.kind == "combine":
        i.activation, i.bias, i.upscale = activation(), take("bias", -1, MOST), take("upscale", 1, 64)
        for _ in range(i.upscale**2):
            total, weights = take("total", 0, MOST), take("weights", 0, 2**40)
            segments = [
                Segment(operand(0), take("length", 1, MOST), take("stride", 1, 64))
                for _ in range(take("segments", 0, MOST))
            ]
            i.phases.append(Phase(total, weights, segments))
        i.operands = [operand(channels, scaled=True) for _ in range(take("addends", 0, MOST))]
    elif i.kind == "product":
        i.activation, i.gate = activation(), activation()
        i.operands = [operand(channels), operand(channels)]
    elif i.kind == "concat":
        i.activation = activation()
        i.operands = [operand(scaled=True) for _ in range(take("parts", 1, MOST))]
    elif i.kind == "layer_norm":
        i.operands = [operand(channels)]
        i.weight, i.bias, i.eps = take("weight", -1, MOST), take("bias", -1, MOST), take("eps", 0, MOST)
    elif i.kind == "attention":
        i.operands = [operand() for _ in range(3)]
        i.heads, i.scale, i.strict = take("heads", 1, MOST), take("scale", 0, MOST), take("strict", 0, 1) == 1
    else:
        i.operands = [operand()]
        i.table, i.levels = take("table", 0, MOST), take("levels", 1, MOST)
        i.weight = take("width", 1, MOST)
    return i


def _check_instruction(op: str, i: Instruction, buffers: list[Buffer], weights: int, parameters: int) -> None:
    out = buffers[i.output]
    require(op, out.constant < 0 and i.output != 0, "program writes to a constant, or to the image")

    def small(first: int, count: int) -> None:
        require(op, first == -1 or first + count <= parameters, f"program reads past its {parameters} parameters")

    for o in i.operands:
        _check_operand(op, o, buffers[o.buffer], out)
        small(o.scale, 1)
    if i.kind == "combine":
        small(i.bias, out.channels)
        for phase in i.phases:
            for s in phase.segments:
                source = buffers[s.source.buffer]
                first = source.left + s.source.dx
                last = first + s.stride * ((out.width - 1) // i.upscale)
                inside = (
                    first >= 0
                    and last * source.channels + s.source.start + s.length <= source.columns * source.channels
                )
                require(op, inside and source.constant < 0, "program has a product that reads past a row")
                same = source.step * s.stride == out.step * i.upscale
                require(op, same, "program has a product of another resolution")
            room = phase.weights + -(-out.channels // PANEL) * PANEL * phase.total <= weights
            summed = sum(s.length for s in phase.segments) == phase.total
            require(op, room and summed, f"program reads past its {weights} weights")
    elif i.kind == "concat":
        total = sum(o.channels for o in i.operands)
        require(
            op, total == out.channels, f"program has a concatenation of {total} channels in a buffer of {out.channels}"
        )
    elif i.kind == "layer_norm":
        for first, count in ((i.weight, out.channels), (i.bias, out.channels), (i.eps, 1)):
            small(first, count)
    elif i.kind == "attention":
        small(i.scale, 1)
        query, key, value = i.operands
        even = all(o.channels % i.heads == 0 and o.dy == o.dx == 0 for o in i.operands)
        fits = query.channels == key.channels and value.channels == out.channels
        read = [buffers[o.buffer] for o in (key, value, query)]
        kept = all(b.constant >= 0 or b.rows >= out.height for b in read[:2])
        whole = all(b.constant >= 0 or (b.height >= out.height and b.width >= out.width) for b in read)
        require(op, even and fits and kept and whole, "program has an attention of channels or rows that do not fit")
    elif i.kind == "embedding":
        small(i.table, i.levels * i.weight)
        fits = i.operands[0].channels * i.weight == out.channels
        require(op, fits, "program has an embedding of channels that do not fit its buffer")


def _check_operand(op: str, o: Operand, source: Buffer, out: Buffer) -> None:
    require(op, o.start + o.channels <= source.channels, "program reads channels past a buffer's")
    if source.constant >= 0:
        wide = (source.height == 1 or source.height >= out.height) and (source.width == 1 or source.width >= out.width)
        require(op, o.dy == o.dx == 0 and wide, "program reads past a constant")
    else:
        inside = o.dx + source.left >= 0 and out.width + o.dx <= source.width + source.right
        require(op, inside and source.step == out.step, "program reads columns past a buffer")


def activated(name: str, x: Tensor) -> Tensor:
    """An activation of NODE_ACTIVATIONS."""
    functional: Any = torch.nn.functional
    if name == "none":
        return x
    if name == "leaky_relu":
        return functional.leaky_relu(x, 0.01)
    if name == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return getattr(torch, name)(x) if name in ("tanh", "sigmoid", "exp") else getattr(functional, name)(x)
