"""A program of the cached sampler as the kernel reads it: rows of fixed width in one table, every operand with strides and bounds.

The program is read and checked by `fastgen/reference/_program.py`, once for a number of images: it lies on the device, and to look at
it is to wait.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastgen._schema import MOMENTS, NODE_ACTIVATIONS
from fastgen.reference._program import PANEL, Buffer, Instruction, Operand, Program, read_program

KINDS = (
    "combine",
    "layer_norm",
    "attention",
    "embedding",
)  # a product and a part of a concatenation are sums of one addend
HEADER = (
    "width", "colors", "turns", "output_channels", "image", "logits",
    *(f"{end}_{m}" for m in MOMENTS for end in ("first", "last")),
)  # fmt: skip
INSTRUCTION = (
    "kind", "step", "height", "width", "output", "channels", "activation", "gate", "gated_by", "bias", "upscale", "phases", "addends",
    "addend_count", "weight", "eps", "heads", "scale", "strict", "keys", "values", "levels",
)  # fmt: skip
PHASE = ("total", "panel", "segments", "segment_count")  # weights begin at 16 times the panel: vectors are aligned
# Row y, column x of image n begin at base + ((y + dy) & mask) * row + n * image + x * column, in the state or the constants.
OPERAND = (
    "base", "mask", "row", "image", "column", "height", "dy", "constant", "scale", "channels", "stride", "length", "offset",
)  # fmt: skip
UNBOUNDED = 2**31 - 1  # rows of a constant that is the same in all


@dataclass(frozen=True)
class Plan:
    """``table`` int64 on the device; what the kernel is compiled for; what the launcher asks of the program."""

    table: Tensor
    program: Program
    head_size: int  # a power of two that no head of an attention exceeds, 16 without one


class Table:
    def __init__(self, program: Program, constants: Sequence[tuple[int, ...]], images: int) -> None:
        self.program, self.constants, self.images = program, constants, images
        self.rows: list[int] = [0] * len(HEADER)
        begins = [0]
        for shape in constants:
            begins.append(begins[-1] + shape[0] * shape[1] * shape[2] * shape[3])
        self.constant_begins = begins

    def add(self, names: tuple[str, ...], values: dict[str, int]) -> int:
        """A row; returns where it begins."""
        assert set(values) <= set(names), values
        self.rows += [values.get(name, 0) for name in names]
        return len(self.rows) - len(names)

    def operand(self, o: Operand, channels: int, **more: int) -> int:
        """An operand of ``channels``."""
        b = self.program.buffers[o.buffer]
        place = self._of_constant(b) if b.constant >= 0 else self._of_state(b)
        base = place.pop("base") + o.start + o.dx * place["column"]
        return self.add(OPERAND, {**place, "base": base, "dy": o.dy, "scale": o.scale, "channels": channels, **more})

    def _of_state(self, b: Buffer) -> dict[str, int]:
        image = b.columns * b.channels
        return {
            "base": b.offset * self.images + b.left * b.channels, "mask": b.rows - 1, "row": self.images * image, "image": image,
            "column": b.channels, "height": b.height,
        }  # fmt: skip

    def _of_constant(self, b: Buffer) -> dict[str, int]:
        images, height, width, channels = self.constants[b.constant]
        row = width * channels
        return {
            "base": self.constant_begins[b.constant], "mask": 0 if height == 1 else -1, "row": row,
            "image": 0 if images == 1 else height * row, "column": 0 if width == 1 else channels,
            "height": UNBOUNDED if height == 1 else height, "constant": 1,
        }  # fmt: skip

    def buffer(self, index: int, start: int = 0, channels: int = 0) -> int:
        return self.operand(Operand(index, start, 0, 0), channels)

    def instructions(self, i: Instruction) -> list[dict[str, int]]:
        """One or, of a concatenation, one a part."""
        out = self.program.buffers[i.output]
        row = {
            "step": out.step, "height": out.height, "width": out.width, "channels": out.channels, "upscale": i.upscale, "bias": i.bias,
            "activation": NODE_ACTIVATIONS.index(i.activation),
        }  # fmt: skip
        if i.kind == "concat":
            rows, start = [], 0
            for part in i.operands:
                addend, output = self.operand(part, part.channels), self.buffer(i.output, start, part.channels)
                found = {"output": output, "phases": self.add(PHASE, {}), "addends": addend, "addend_count": 1}
                rows.append({**row, **found, "channels": part.channels})
                start += part.channels
            return rows
        row["output"] = self.buffer(i.output, 0, out.channels)
        if i.kind == "combine":
            row |= self._phases(i)
        elif i.kind == "product":
            first, second = i.operands
            row |= {"phases": self.add(PHASE, {}), "addends": self.operand(first, out.channels), "addend_count": 1}
            row |= {"gated_by": self.operand(second, out.channels), "gate": NODE_ACTIVATIONS.index(i.gate)}
        else:
            row |= self._other(i)
        return [row]

    def _phases(self, i: Instruction) -> dict[str, int]:
        phases = []
        for phase in i.phases:
            segments, offset = [], 0
            for s in phase.segments:
                segments.append(self.operand(s.source, 0, stride=s.stride, length=s.length, offset=offset))
                offset += s.length
            found = {"total": phase.total, "panel": phase.weights // PANEL, "segment_count": len(segments)}
            phases.append({**found, "segments": segments[0] if segments else 0})
        addends = [self.operand(o, o.channels) for o in i.operands]
        first = [self.add(PHASE, phase) for phase in phases]
        return {"phases": first[0], "addends": addends[0] if addends else 0, "addend_count": len(addends)}

    def _other(self, i: Instruction) -> dict[str, int]:
        operands = [self.operand(o, o.channels) for o in i.operands]
        found = {"kind": KINDS.index(i.kind), "addends": operands[0]}
        if i.kind == "layer_norm":
            return {**found, "weight": i.weight, "eps": i.eps}
        if i.kind == "attention":
            keys, values = (i.operands[k].channels // i.heads for k in (1, 2))
            return {
                **found,
                "heads": i.heads,
                "scale": i.scale,
                "strict": int(i.strict),
                "keys": keys,
                "values": values,
            }
        return {**found, "weight": i.table, "levels": i.levels, "values": i.weight}

    def build(self) -> list[int]:
        p = self.program
        header = {
            "width": p.width, "colors": p.colors, "turns": p.colors if p.per_color else 1, "output_channels": p.output_channels,
            "image": self.buffer(0), "logits": self.buffer(p.output, p.output_start),
        }  # fmt: skip
        for moment in MOMENTS:
            rows = [row for i in p.instructions[moment] for row in self.instructions(i)]
            begins = [self.add(INSTRUCTION, row) for row in rows]
            first = begins[0] if begins else 0
            header |= {f"first_{moment}": first, f"last_{moment}": first + len(begins) * len(INSTRUCTION)}
        self.rows[: len(HEADER)] = [header[name] for name in HEADER]
        return self.rows


_plans: dict[int, tuple[Any, dict[Any, Plan]]] = {}  # id of a program -> (a reference to it, its plans)


def plan_of(
    op: str, program: Tensor, weights: Tensor, parameters: Tensor, constants: Sequence[Tensor], images: int
) -> Plan:
    """Of a program, kept for as long as that lives and is not written to."""
    shapes = tuple(tuple(constant.shape) for constant in constants)
    contiguous = tuple(constant.is_contiguous() for constant in constants)
    key = (program._version, weights.numel(), parameters.numel(), shapes, contiguous, images)
    entry = _plans.get(id(program))
    if entry is None or entry[0]() is not program:
        address = id(program)
        entry = _plans[address] = (weakref.ref(program, lambda _: _plans.pop(address, None)), {})
    if key not in entry[1]:
        decoded = read_program(op, program.cpu(), weights.numel(), parameters.numel(), constants, images)
        rows = Table(decoded, shapes, images).build()
        entry[1][key] = Plan(torch.tensor(rows, dtype=torch.int64, device=program.device), decoded, _head_size(decoded))
    return entry[1][key]


def _head_size(program: Program) -> int:
    sizes = [16]
    for i in program.instructions["row"] + program.instructions["pixel"] + program.instructions["after"]:
        if i.kind == "attention":
            sizes += [o.channels // i.heads for o in i.operands]
    return triton.next_power_of_2(max(sizes))
