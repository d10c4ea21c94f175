"""Runs a program of the cached sampler in plain torch: its buffers, and one instruction at a time, of a row of places or of one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._program import PANEL, Instruction, Operand, Program, activated


class Machine:
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

    def write(self, y: int, x: int, values: Tensor, first: int = 0) -> None:
        """Colors [N, K] of a pixel from ``first`` on."""
        image = self.program.buffers[0]
        self.places[0][y % image.rows, :, image.left + x, first : first + values.shape[1]] = values

    def logits(self, y: int, x: int) -> Tensor:
        p = self.program
        b = p.buffers[p.output]
        return self.places[p.output][y % b.rows, :, b.left + x, p.output_start : p.output_start + p.output_channels]

    def run(self, moment: str, y: int, x: int | None) -> None:
        """The instructions of a moment at (y, x) of the image, or of the row."""
        for i in self.program.instructions[moment]:
            b = self.program.buffers[i.output]
            row, off = divmod(y, b.step)
            row -= i.moment == "behind"  # such instructions go with the row's
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
            weight, bias = (None if at < 0 else self.parameters[at : at + channels] for at in (i.weight, i.bias))
            return torch.nn.functional.layer_norm(first, (channels,), weight, bias, float(self.parameters[i.eps]))
        table = self.parameters[i.table :][: i.levels * i.weight].view(i.levels, i.weight)
        return table[first.nan_to_num(0.0).round().clamp(0, i.levels - 1).long()].flatten(2)

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
