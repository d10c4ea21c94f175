"""Of a network the program that the sampler follows: what is computed once a row, what at each pixel, what after it, and where.

A sum of convolutions and other terms is one instruction, `combine`. Of one that hangs on pixels to the left, the taps that read complete
rows, and every term that is there already, become an instruction of the row that leaves a partial sum, and the pixel's own is the rest.
Instructions of a moment are put into stages: those of one stage do not read one another.

The records, after RECORD_HEADER of fastgen/_schema.py, where an operand is (buffer, start, dy, dx):
    combine     activation, bias, upscale; for each phase: total, weights, segments, (operand, length, stride)...; addends, (operand, scale)...
    product     activation, gate, operand, operand
    concat      activation, parts, (operand, channels, scale)...
    layer_norm  operand, weight, bias, eps
    attention   (operand, channels) of query, key and value, heads, scale, strict
    embedding   operand, channels, table, levels, width
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._schema import BUFFER_COLUMNS, INSTRUCTIONS, MOMENTS, NODE_ACTIVATIONS, PROGRAM_HEADER, RECORD_HEADER
from .causality import Availability, availability
from .network import (
    Attention,
    Concat,
    Constant,
    Convolution,
    Embedding,
    Input,
    LayerNorm,
    Network,
    Node,
    Operand,
    Product,
    Sum,
)

PANEL = 16  # outputs whose weights lie side by side
ALIGNED = 16  # numbers: where weights begin, 64 bytes of float32


@dataclass(frozen=True)
class Program:
    """What `torch.ops.fastgen.incremental_sample` and `incremental_step` take of a network.

    Attributes:
        program: int64, see above.
        weights: packed, in the dtype of ``parameters`` or bfloat16.
        parameters: biases and other small numbers, float32 or float64.
        constants: [1 or N, 1 or H, 1 or W, C] each, in that dtype.
        state: numbers of state that an image takes.
        output_channels: logits of a pixel.
        per_color: whether the colors of a pixel are drawn in turn.
    """

    program: Tensor
    weights: Tensor
    parameters: Tensor
    constants: tuple[Tensor, ...]
    state: int
    output_channels: int
    per_color: bool

    def new_state(self, images: int) -> Tensor:
        """The state before the first pixel of so many images."""
        return self.parameters.new_zeros(images * self.state)


def compile_network(
    network: Network,
    *,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    per_color: bool = False,
) -> Program:
    """The program of a causal network.

    Args:
        network: as :func:`fastgen.autoregressive.capture` returns it.
        dtype: of the arithmetic, float32 or float64.
        weights_dtype: of the packed weights, ``dtype`` or with float32 bfloat16, which halves what a pixel reads.
        per_color: whether the network may read the colors of a pixel that were drawn before.

    Raises:
        NotPlannable: it reads pixels that are not drawn yet.
    """
    return _Compiler(network, dtype, weights_dtype or dtype, per_color).compile()


@dataclass
class _Buffer:
    """A buffer in the making; readers widen it."""

    node: Node
    constant: int = -1
    step: int = 1
    rows: int = 1
    left: int = 0
    right: int = 0

    def read(self, dy: int, first: int, last: int) -> None:
        """Columns [first, last] are read, and the row ``dy`` from the newest."""
        self.rows = max(self.rows, 1 - dy)
        self.left, self.right = max(self.left, -first), max(self.right, last - self.node.width + 1)


@dataclass
class _Instruction:
    kind: str
    moment: str
    output: int
    payload: list[int] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    stage: int = 0


class _Compiler:
    def __init__(self, network: Network, dtype: torch.dtype, weights_dtype: torch.dtype, per_color: bool) -> None:
        self.network = network
        self.nodes = list(network.nodes)
        self.ready = list(availability(network, per_color=per_color))
        self.dtype, self.weights_dtype, self.per_color = dtype, weights_dtype, per_color
        self.buffers: list[_Buffer] = []
        self.of_node: dict[int, int] = {}  # node -> its buffer
        self.instructions: list[_Instruction] = []
        self.weights: list[Tensor] = []
        self.weight_count = 0
        self.parameters: list[Tensor] = []
        self.parameter_count = 0
        self.constants: list[Tensor] = []
        self.uses = self._count_uses()

    def compile(self) -> Program:
        output = self._whole(self.network.output)
        kept = self._reachable(output.node)
        for index, node in enumerate(self.nodes):
            if isinstance(node, Input) or index in kept:
                self._emit(index, node)
        buffer = self.buffers[self.of_node[output.node]]
        assert buffer.constant < 0
        self._order()
        offsets, state = self._offsets()
        shape = self.nodes[0]
        header = {
            "height": shape.height, "width": shape.width, "colors": shape.channels, "buffers": len(self.buffers),
            "instructions": len(self.instructions), "state": state, "output": self.of_node[output.node],
            "output_start": output.start, "output_channels": output.channels, "per_color": int(self.per_color),
        }  # fmt: skip
        numbers = [header[name] for name in PROGRAM_HEADER]
        for buffer, offset in zip(self.buffers, offsets, strict=True):
            row = {
                "constant": buffer.constant, "channels": buffer.node.channels, "height": buffer.node.height, "width": buffer.node.width,
                "rows": buffer.rows, "left": buffer.left, "right": buffer.right, "offset": offset, "step": buffer.step,
            }  # fmt: skip
            numbers += [row[name] for name in BUFFER_COLUMNS]
        for i in self.instructions:
            length = len(RECORD_HEADER) + len(i.payload)
            numbers += [length, INSTRUCTIONS.index(i.kind), MOMENTS.index(i.moment), i.stage, i.output, *i.payload]
        return Program(
            torch.tensor(numbers, dtype=torch.int64),
            _joined(self.weights, self.weights_dtype),
            _joined(self.parameters, self.dtype),
            tuple(self.constants),
            state,
            output.channels,
            self.per_color,
        )

    # ---- what is computed, and what is computed within something else ---------------------------------------------------------

    def _count_uses(self) -> list[int]:
        uses = [0] * len(self.nodes)
        for node in self.nodes:
            for operand in node.operands:
                uses[operand.node] += 1
        uses[self.network.output.node] += 1
        return uses

    def _whole(self, output: Operand) -> Operand:
        """The output as the kernel can read it: of a node that the sampler writes, where it lies."""
        node = self.nodes[output.node]
        if output.dy == output.dx == 0 and not isinstance(node, (Constant, Input)):
            return output
        return self._materialised(output, self.nodes[0])

    def _materialised(self, operand: Operand, like: Node) -> Operand:
        """What ``operand`` reads as a node of its own, in the size of ``like``."""
        self.nodes.append(Sum(operand.channels, like.height, like.width, terms=(operand,), scales=(1.0,)))
        ready = self.ready[operand.node]
        if ready in (Availability.INPUT, Availability.PIXEL):
            before = Availability.ROW if operand.dy < 0 else Availability.PIXEL if operand.dx < 0 else ready
            ready = before
        self.ready.append(ready)
        self.uses[operand.node] += 1
        self.uses.append(1)
        return Operand(len(self.nodes) - 1, operand.channels)

    def _reachable(self, output: int) -> set[int]:
        """Nodes that become instructions: those that the output reads, but for convolutions that are computed within a sum."""
        found: set[int] = set()
        pending = [output]
        while pending:
            index = pending.pop()
            if index in found:
                continue
            found.add(index)
            node = self.nodes[index]
            if isinstance(node, Sum):
                inner, rest = self._parts(node)
                pending += [conv.operand.node for conv, _ in inner] + [term.node for term, _ in rest]
            else:
                pending += [operand.node for operand in node.operands]
        return found

    def _parts(self, node: Sum) -> tuple[list[tuple[Convolution, float]], list[tuple[Operand, float]]]:
        """(Convolutions that nobody else reads, each with its scale; the other terms) of a sum."""
        inner: list[tuple[Convolution, float]] = []
        rest = []
        for term, scale in zip(node.terms, node.scales, strict=True):
            source = self.nodes[term.node]
            alone = (
                isinstance(source, Convolution)
                and self.uses[term.node] == 1
                and term == Operand(term.node, source.channels)
            )
            fits = alone and (source.height, source.width) == (node.height, node.width)
            if fits and all(source.upscale == other.upscale for other, _ in inner):
                inner.append((source, scale))
            else:
                rest.append((term, scale))
        return inner, rest

    # ---- instructions ------------------------------------------------------------------------------------------------------

    def _emit(self, index: int, node: Node) -> None:
        if isinstance(node, Input):
            self.of_node[index] = self._buffer(node)
        elif isinstance(node, Constant):
            value = node.value.to(self.dtype).movedim(1, -1).contiguous()  # [1 or N, 1 or H, 1 or W, C]
            self.of_node[index] = self._buffer(
                replace(node, height=value.shape[1], width=value.shape[2]), len(self.constants)
            )
            self.constants.append(value)
        elif isinstance(node, Convolution):
            self._combine(index, node, [(node, 1.0)], [], None, "none")
        elif isinstance(node, Sum):
            inner, rest = self._parts(node)
            offset = torch.full((node.channels,), node.offset, dtype=torch.float64) if node.offset else None
            self._combine(index, node, inner, rest, offset, node.activation)
        else:
            self._emit_other(index, node)

    def _emit_other(self, index: int, node: Node) -> None:
        steps = [
            self.buffers[self.of_node[operand.node]].step for operand in node.operands if not self._is_constant(operand)
        ]
        instruction = self._instruction(
            _KINDS[type(node)], self._moment(index), self._buffer(node, step=max(steps, default=1))
        )
        self.of_node[index] = instruction.output
        payload = instruction.payload

        def operand(o: Operand) -> list[int]:
            return self._operand(o, instruction)

        if isinstance(node, Product):
            payload += [*map(NODE_ACTIVATIONS.index, (node.activation, node.gate)), *operand(node.a), *operand(node.b)]
        elif isinstance(node, Concat):
            payload += [NODE_ACTIVATIONS.index(node.activation), len(node.parts)]
            for part, scale in zip(node.parts, node.scales, strict=True):
                payload += [*operand(part), part.channels, self._scale(scale)]
        elif isinstance(node, LayerNorm):
            small = [-1 if p is None else self._parameter(p) for p in (node.weight, node.bias)]
            payload += [*operand(node.operand), *small, self._parameter(torch.tensor([node.eps], dtype=torch.float64))]
        elif isinstance(node, Attention):
            for o in node.operands:
                payload += [*operand(o), o.channels]
            for o in (node.key, node.value):
                self.buffers[self.of_node[o.node]].rows = self.nodes[o.node].height
            payload += [node.heads, self._parameter(torch.tensor([node.scale], dtype=torch.float64)), int(node.strict)]
        else:
            assert isinstance(node, Embedding), type(node)
            levels, width = node.table.shape
            payload += [*operand(node.operand), node.operand.channels, self._parameter(node.table), levels, width]

    def _combine(
        self,
        index: int,
        node: Node,
        inner: list[tuple[Convolution, float]],
        rest: list[tuple[Operand, float]],
        bias: Tensor | None,
        activation: str,
    ) -> None:
        """A sum as one instruction, or as one of the row and one of the pixel."""
        inner = [(self._readable(conv), scale) for conv, scale in inner]
        moment = self._moment(index)
        step = self._step(inner, rest)
        for conv, scale in inner:
            if conv.bias is not None:
                bias = scale * conv.bias.double() + (0 if bias is None else bias)
        early = _Taps() if moment == "row" else self._taps(inner, early=True)
        addends = list(rest)
        if early:
            there = [(o, s) for o, s in rest if self.ready[o.node] in (Availability.ROW, Availability.CONSTANT)]
            partial = self._instruction("combine", "row", self._buffer(replace_size(node), step=step))
            self._fill(partial, early, there, bias, "none", inner)
            addends = [(o, s) for o, s in rest if (o, s) not in there]
            bias = None
        instruction = self._instruction("combine", moment, self._buffer(replace_size(node), step=step))
        self.of_node[index] = instruction.output
        taps = self._taps(inner, early=None if moment == "row" else False)
        self._fill(instruction, taps, addends, bias, activation, inner, partial.output if early else None)

    def _fill(
        self,
        instruction: _Instruction,
        taps: "_Taps",
        addends: list[tuple[Operand, float]],
        bias: Tensor | None,
        activation: str,
        inner: list[tuple[Convolution, float]],
        partial: int | None = None,
    ) -> None:
        upscale = inner[0][0].upscale if inner else 1
        payload = instruction.payload
        payload += [NODE_ACTIVATIONS.index(activation), -1 if bias is None else self._parameter(bias), upscale]
        out = self.buffers[instruction.output].node
        for phase in range(upscale**2):
            runs = taps.of_phase(divmod(phase, upscale))
            total = sum(run.weight.shape[1] for run in runs)
            packed = torch.cat([run.weight for run in runs], 1) if runs else torch.zeros(out.channels, 0)
            payload += [total, self._pack(packed), len(runs)]
            for run in runs:
                source = self.buffers[self.of_node[run.node]]
                last = run.stride * ((out.width - 1) // upscale) + run.dx + run.columns - 1
                source.read(run.dy, run.dx, last)
                instruction.reads.add(self.of_node[run.node])
                payload += [self.of_node[run.node], run.start, run.dy, run.dx, run.weight.shape[1], run.stride]
        payload.append(len(addends) + (partial is not None))
        if partial is not None:
            instruction.reads.add(partial)
            payload += [partial, 0, 0, 0, -1]
        for o, scale in addends:
            payload += [*self._operand(o, instruction), self._scale(scale)]

    def _readable(self, conv: Convolution) -> Convolution:
        """``conv`` with an operand that lies where it is read: a shift joins the taps, unless zeros beyond an edge would tell."""
        o = conv.operand
        source = self.nodes[o.node]
        if o.dy == o.dx == 0 and not isinstance(source, Constant):
            return conv
        last = (conv.width - 1) // conv.upscale * conv.stride
        inside = all(
            (o.dx >= 0 or last + tap.dx < source.width) and (o.dx <= 0 or tap.dx >= 0) and (o.dy <= 0 or tap.dy >= 0)
            for tap in conv.taps
        )
        if inside and not isinstance(source, Constant):
            taps = tuple(replace(tap, dy=tap.dy + o.dy, dx=tap.dx + o.dx) for tap in conv.taps)
            return replace(conv, operand=replace(o, dy=0, dx=0), taps=taps)
        whole = self._materialised(o, source)
        self._emit(whole.node, self.nodes[whole.node])
        return replace(conv, operand=whole)

    def _taps(self, inner: list[tuple[Convolution, float]], early: bool | None) -> "_Taps":
        """The taps of all convolutions that read what is there when the row begins (early), the others, or (None) all."""
        found = _Taps()
        for conv, scale in inner:
            o = conv.operand
            source = self.nodes[o.node]
            ready = self.ready[o.node]
            whole = o.start == 0 and o.channels == source.channels
            chosen = [
                (tap, scale * conv.weight[:, t])
                for t, tap in enumerate(conv.taps)
                # Rows above are complete; so is, for lower rows of a phase, the row of the smaller image.
                if early in (None, ready in (Availability.ROW, Availability.CONSTANT) or tap.dy < 0 or tap.phase[0] > 0)
            ]
            found.add(o, conv.stride, chosen, whole)
        return found

    # ---- small things -------------------------------------------------------------------------------------------------------

    def _is_constant(self, operand: Operand) -> bool:
        return isinstance(self.nodes[operand.node], Constant)

    def _moment(self, index: int) -> str:
        return {Availability.ROW: "row", Availability.PIXEL: "pixel", Availability.INPUT: "after"}[self.ready[index]]

    def _step(self, inner: list[tuple[Convolution, float]], rest: list[tuple[Operand, float]]) -> int:
        for conv, _ in inner:
            return self.buffers[self.of_node[conv.operand.node]].step * conv.stride // conv.upscale
        return max((self.buffers[self.of_node[o.node]].step for o, _ in rest if not self._is_constant(o)), default=1)

    def _buffer(self, node: Node, constant: int = -1, step: int = 1) -> int:
        self.buffers.append(_Buffer(node, constant, step))
        return len(self.buffers) - 1

    def _instruction(self, kind: str, moment: str, output: int) -> _Instruction:
        self.instructions.append(_Instruction(kind, moment, output))
        return self.instructions[-1]

    def _operand(self, o: Operand, instruction: _Instruction) -> list[int]:
        if self._is_constant(o) and (o.dy or o.dx):
            o = self._shifted_constant(o)
        buffer = self.of_node[o.node]
        if not self._is_constant(o):
            self.buffers[buffer].read(o.dy, o.dx, self.buffers[instruction.output].node.width - 1 + o.dx)
        instruction.reads.add(buffer)
        return [buffer, o.start, o.dy, o.dx]

    def _shifted_constant(self, o: Operand) -> Operand:
        """A constant as it is read, as a constant of its own."""
        source = self.nodes[o.node]
        assert isinstance(source, Constant)
        value = source.value.expand(-1, -1, source.height, source.width)
        values: list[Any] = [None] * len(self.nodes)
        values[o.node] = value
        self.nodes.append(Constant(o.channels, source.height, source.width, o.of(values)))
        self.ready.append(Availability.CONSTANT)
        self.uses.append(1)
        self._emit(len(self.nodes) - 1, self.nodes[-1])
        return Operand(len(self.nodes) - 1, o.channels)

    def _scale(self, scale: float) -> int:
        return -1 if scale == 1.0 else self._parameter(torch.tensor([scale], dtype=torch.float64))

    def _parameter(self, values: Tensor) -> int:
        self.parameters.append(values.detach().flatten())
        self.parameter_count += values.numel()
        return self.parameter_count - values.numel()

    def _pack(self, weight: Tensor) -> int:
        """[O, K] as [panels, K, 16]; returns where it begins."""
        outputs, total = weight.shape
        panels = -(-outputs // PANEL)
        packed = weight.new_zeros(panels * PANEL, total)
        packed[:outputs] = weight
        packed = packed.view(panels, PANEL, total).transpose(1, 2).reshape(-1)
        spare = -packed.numel() % ALIGNED
        self.weights += [packed, packed.new_zeros(spare)]
        begin = self.weight_count
        self.weight_count += packed.numel() + spare
        return begin

    def _order(self) -> None:
        """Stages: an instruction comes after those of its moment that write what it reads."""
        written = {i.output: i for i in self.instructions}
        for i in self.instructions:  # in an order of computation already
            before = [
                written[b] for b in i.reads if b in written and written[b].moment == i.moment and written[b] is not i
            ]
            i.stage = max((other.stage + 1 for other in before), default=0)

    def _offsets(self) -> tuple[list[int], int]:
        """Where each buffer begins in the state of an image, and the size of it."""
        offsets, state = [], 0
        for buffer in self.buffers:
            buffer.rows = 1 << (buffer.rows - 1).bit_length()
            offsets.append(state)
            if buffer.constant < 0:
                size = buffer.rows * (buffer.left + buffer.node.width + buffer.right) * buffer.node.channels
                state += -(-size // ALIGNED) * ALIGNED
        return offsets, state


_KINDS: dict[type, str] = {
    Product: "product",
    Concat: "concat",
    LayerNorm: "layer_norm",
    Attention: "attention",
    Embedding: "embedding",
}


@dataclass(frozen=True)
class _Run:
    """Taps side by side: [O, columns * I] numbers of weights that read from (dy, dx) on."""

    node: int
    start: int
    dy: int
    dx: int
    columns: int
    stride: int
    weight: Tensor


class _Taps:
    """The taps of an instruction, joined to runs where they lie side by side."""

    def __init__(self) -> None:
        self.runs: dict[tuple[int, int], list[_Run]] = {}

    def __bool__(self) -> bool:
        return bool(self.runs)

    def of_phase(self, phase: tuple[int, int]) -> list[_Run]:
        return self.runs.get(phase, [])

    def add(self, o: Operand, stride: int, chosen: Iterable[tuple[Any, Tensor]], whole: bool) -> None:
        for tap, weight in sorted(chosen, key=lambda pair: (pair[0].phase, pair[0].dy, pair[0].dx)):
            runs = self.runs.setdefault(tap.phase, [])
            last = runs[-1] if runs else None
            beside = (
                last is not None
                and whole
                and last.node == o.node
                and (last.dy, last.dx + last.columns) == (tap.dy, tap.dx)
            )
            if beside and last.stride == stride and last.start == o.start:
                runs[-1] = replace(last, columns=last.columns + 1, weight=torch.cat([last.weight, weight], 1))
            else:
                runs.append(_Run(o.node, o.start, tap.dy, tap.dx, 1, stride, weight))


def replace_size(node: Node) -> Node:
    """The size of a node, which is all that a buffer needs."""
    return Node(node.channels, node.height, node.width)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)


__all__ = ["Callable", "Program", "compile_network"]
