"""Of a network the program that the sampler follows: what is computed once a row, what at each pixel, what after it, and where.

A sum of convolutions and other terms is one instruction, `combine`. Of one that hangs on pixels to the left, the taps that read
complete rows, and every term that is there already, become an instruction of the row that leaves a partial sum, and the pixel's own
is the rest. Instructions of a moment are put into stages: those of one stage do not read one another.

The records, after RECORD_HEADER of fastgen/_schema.py, where an operand is (buffer, start, dy, dx):
    combine     activation, bias, upscale; for each phase: total, weights, segments, (operand, length, stride)...;
                addends, (operand, scale)...
    product     activation, gate, operand, operand
    concat      activation, parts, (operand, channels, scale)...
    layer_norm  operand, weight, bias, eps
    attention   (operand, channels) of query, key and value, heads, scale, strict
    embedding   operand, channels, table, levels, width
"""

from dataclasses import replace

import torch
from torch import Tensor

from .._schema import NODE_ACTIVATIONS
from ._records import Instruction, Program, encoded, put_into_stages
from ._storage import Storage
from ._taps import Taps
from .causality import Availability, Distance, availability, distances, resolutions, seen_from
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

__all__ = ["Program", "compile_network"]


def _postponed(network: Network) -> list[Availability]:
    """When each node is computed: as soon as it can be, or, where no pixel of its own row reads it, once that row is whole."""
    kinds, pixels = list(availability(network)), resolutions(network)
    needed = {network.output.node}
    for i in reversed(range(1, len(kinds))):
        if kinds[i] not in (Availability.PIXEL, Availability.INPUT):
            continue
        if i in needed:
            needed |= {source for source, distance in distances(network, i, pixels) if distance.dy == 0}
        else:
            kinds[i] = Availability.COMPLETE
    return kinds


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


class _Compiler:
    def __init__(self, network: Network, dtype: torch.dtype, weights_dtype: torch.dtype, per_color: bool) -> None:
        self.network = network
        self.nodes = list(network.nodes)
        self.ready = _postponed(network)
        self.dtype, self.weights_dtype, self.per_color = dtype, weights_dtype, per_color
        self.storage = Storage()
        self.buffers = self.storage.buffers
        self.of_node: dict[int, int] = {}  # node -> its buffer
        self.instructions: list[Instruction] = []
        self.constants: list[Tensor] = []
        self.uses = self._count_uses()

    def compile(self) -> Program:
        output = self._whole(self.network.output)
        kept = self._reachable(output.node)
        for index, node in enumerate(self.nodes):
            if isinstance(node, Input) or index in kept:
                self._emit(index, node)
        put_into_stages(self.instructions)
        offsets, state = self.storage.offsets()
        first = self.nodes[0]
        header = {
            "height": first.height, "width": first.width, "colors": first.channels, "buffers": len(self.buffers),
            "instructions": len(self.instructions), "state": state, "output": self.of_node[output.node],
            "output_start": output.start, "output_channels": output.channels, "per_color": int(self.per_color),
        }  # fmt: skip
        return Program(
            encoded(header, self.buffers, offsets, self.instructions),
            self.storage.packed_weights(self.weights_dtype),
            self.storage.joined_parameters(self.dtype),
            tuple(self.constants),
            state,
            output.channels,
            self.per_color,
        )

    # ---- what is computed, and what within something else

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
        distance = Distance(operand.dy, operand.dx)  # the signs are all that counts, whatever the resolution
        self.ready.append(
            max(seen_from(ready, distance) or ready, Availability.ROW)
        )  # a constant's copy is made as rows are
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
            alone = self.uses[term.node] == 1 and term == Operand(term.node, source.channels)
            fits = alone and (source.height, source.width) == (node.height, node.width)
            beside = isinstance(source, Convolution) and all(source.upscale == other.upscale for other, _ in inner)
            if fits and isinstance(source, Convolution) and beside:
                inner.append((source, scale))
            else:
                rest.append((term, scale))
        return inner, rest

    # ---- instructions

    def _emit(self, index: int, node: Node) -> None:
        if isinstance(node, Input):
            self.of_node[index] = self._buffer(node)
        elif isinstance(node, Constant):
            value = node.value.to(self.dtype).movedim(1, -1).contiguous()  # [1 or N, 1 or H, 1 or W, C]
            _, height, width, channels = value.shape
            self.of_node[index] = self.storage.buffer(channels, height, width, constant=len(self.constants))
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
            _KINDS[type(node)], self._moment(index), self._buffer(node, max(steps, default=1))
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
            small = [-1 if p is None else self.storage.parameter(p) for p in (node.weight, node.bias)]
            payload += [
                *operand(node.operand),
                *small,
                self.storage.parameter(torch.tensor([node.eps], dtype=torch.float64)),
            ]
        elif isinstance(node, Attention):
            for o in node.operands:
                payload += [*operand(o), o.channels]
            for o in (node.key, node.value):
                self.buffers[self.of_node[o.node]].rows = self.nodes[o.node].height
            payload += [
                node.heads,
                self.storage.parameter(torch.tensor([node.scale], dtype=torch.float64)),
                int(node.strict),
            ]
        else:
            assert isinstance(node, Embedding), type(node)
            levels, width = node.table.shape
            payload += [
                *operand(node.operand),
                node.operand.channels,
                self.storage.parameter(node.table),
                levels,
                width,
            ]

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
        moment, step = self._moment(index), self._step(inner, rest)
        for conv, scale in inner:
            if conv.bias is not None:
                bias = scale * conv.bias.double() + (0 if bias is None else bias)
        once = moment in ("row", "behind")
        early = Taps() if once else self._taps(inner, early=True)
        addends = list(rest)
        if early:
            there = [(o, s) for o, s in rest if self.ready[o.node] in (Availability.ROW, Availability.CONSTANT)]
            partial = self._instruction("combine", "row", self._buffer(node, step))
            self._fill(partial, early, there, bias, "none", inner)
            addends = [(o, s) for o, s in rest if (o, s) not in there]
            bias = None
        instruction = self._instruction("combine", moment, self._buffer(node, step))
        self.of_node[index] = instruction.output
        taps = self._taps(inner, early=None if once else False)
        self._fill(instruction, taps, addends, bias, activation, inner, partial.output if early else None)

    def _fill(
        self,
        instruction: Instruction,
        taps: Taps,
        addends: list[tuple[Operand, float]],
        bias: Tensor | None,
        activation: str,
        inner: list[tuple[Convolution, float]],
        partial: int | None = None,
    ) -> None:
        upscale = inner[0][0].upscale if inner else 1
        payload = instruction.payload
        payload += [NODE_ACTIVATIONS.index(activation), -1 if bias is None else self.storage.parameter(bias), upscale]
        out = self.buffers[instruction.output]
        for phase in range(upscale**2):
            runs = taps.of_phase(divmod(phase, upscale))
            total = sum(run.weight.shape[1] for run in runs)
            packed = torch.cat([run.weight for run in runs], 1) if runs else torch.zeros(out.channels, 0)
            payload += [total, self.storage.pack(packed), len(runs)]
            for run in runs:
                source = self.buffers[self.of_node[run.node]]
                last = run.stride * ((out.width - 1) // upscale) + run.dx + run.columns - 1
                source.read(run.dy, run.dx, last, instruction.moment == "behind")
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

    def _taps(self, inner: list[tuple[Convolution, float]], early: bool | None) -> Taps:
        """The taps of all convolutions that read what is there when the row begins (early), the others, or (None) all."""
        found = Taps()
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

    # ---- small things

    def _buffer(self, node: Node, step: int = 1) -> int:
        return self.storage.buffer(node.channels, node.height, node.width, step=step)

    def _is_constant(self, operand: Operand) -> bool:
        return isinstance(self.nodes[operand.node], Constant)

    def _moment(self, index: int) -> str:
        return _MOMENTS[self.ready[index]]

    def _step(self, inner: list[tuple[Convolution, float]], rest: list[tuple[Operand, float]]) -> int:
        for conv, _ in inner:
            return self.buffers[self.of_node[conv.operand.node]].step * conv.stride // conv.upscale
        return max((self.buffers[self.of_node[o.node]].step for o, _ in rest if not self._is_constant(o)), default=1)

    def _instruction(self, kind: str, moment: str, output: int) -> Instruction:
        self.instructions.append(Instruction(kind, moment, output))
        return self.instructions[-1]

    def _operand(self, o: Operand, instruction: Instruction) -> list[int]:
        if self._is_constant(o) and (o.dy or o.dx):
            o = self._shifted_constant(o)
        buffer = self.of_node[o.node]
        if not self._is_constant(o):
            last = self.buffers[instruction.output].width - 1 + o.dx
            self.buffers[buffer].read(o.dy, o.dx, last, instruction.moment == "behind")
        instruction.reads.add(buffer)
        return [buffer, o.start, o.dy, o.dx]

    def _shifted_constant(self, o: Operand) -> Operand:
        """A constant as it is read, as a constant of its own."""
        source = self.nodes[o.node]
        assert isinstance(source, Constant)
        value = source.value.expand(-1, -1, source.height, source.width)
        shifted = o.of({o.node: value}, source.height, source.width)
        self.nodes.append(Constant(o.channels, source.height, source.width, value=shifted))
        self.ready.append(Availability.CONSTANT)
        self.uses.append(1)
        self._emit(len(self.nodes) - 1, self.nodes[-1])
        return Operand(len(self.nodes) - 1, o.channels)

    def _scale(self, scale: float) -> int:
        return -1 if scale == 1.0 else self.storage.parameter(torch.tensor([scale], dtype=torch.float64))


_MOMENTS = {
    Availability.ROW: "row",
    Availability.PIXEL: "pixel",
    Availability.INPUT: "after",
    Availability.COMPLETE: "behind",
}
_KINDS: dict[type, str] = {
    Product: "product",
    Concat: "concat",
    LayerNorm: "layer_norm",
    Attention: "attention",
    Embedding: "embedding",
}
