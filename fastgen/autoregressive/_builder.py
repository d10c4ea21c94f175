"""Nodes made of values: what every rule of lowering is written with."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ._values import Axes, Channel, NotPlannable, Value, axis, channels_of, size_of
from .network import Concat, Constant, Convolution, Input, Node, Operand, Sum, Tap


class Builder:
    """The nodes so far. ``layer`` is the name of the module that is running."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.nodes: list[Node] = [Input(channels, height, width)]
        self.layer = ""

    def add(self, kind: type[Node], channels: int, height: int, width: int, **fields: Any) -> int:
        self.nodes.append(kind(channels, height, width, layer=self.layer, **fields))
        return len(self.nodes) - 1

    def value(self, node: int, axes: Axes) -> Value:
        """All of a node."""
        made = self.nodes[node]
        channels = map(Channel, repeat(node), range(made.channels))
        return Value(tuple(channels), made.height, made.width, axes)

    def image(self, node: int, like: Value) -> Value:
        """All of a node as an image [N, C, H, W], or [N, C, T] where ``like`` is one."""
        made = self.nodes[node]
        rows, columns = axis("H", made.height), axis("W", made.width)
        spatial = (rows, columns) if len(like.axes) == 4 else (rows + columns,)
        return self.value(node, (like.axes[0], axis("C", made.channels), *spatial))

    def node(self, kind: type[Node], like: Value, **fields: Any) -> Value:
        """A node as large as ``like``, of the same dimensions."""
        made = self.add(kind, len(like.channels), like.height, like.width, **fields)
        return self.value(made, like.axes)

    def operand(self, value: Value) -> Operand:
        """The channels of a value, put together where they lie apart."""
        runs = self.runs(value)
        if len(runs) == 1:
            return runs[0]
        dy, dx, height, width = 0, 0, value.height, value.width
        frames = {(run.dy, run.dx, self.nodes[run.node].height, self.nodes[run.node].width) for run in runs}
        if len(frames) == 1:  # all of one shift, as after a padding: it is read with that shift
            ((dy, dx, height, width),) = frames
            runs = tuple(replace(run, dy=0, dx=0) for run in runs)
        made = self.add(Concat, len(value.channels), height, width, parts=runs, scales=(1.0,) * len(runs))
        return Operand(made, len(value.channels), dy=dy, dx=dx)

    @staticmethod
    def runs(value: Value) -> tuple[Operand, ...]:
        runs: list[Operand] = []
        start, count = value.channels[0], 0
        for channel in (*value.channels, None):
            if channel != (start.node, start.channel + count, start.dy, start.dx):
                runs.append(Operand(start.node, count, *start[1:]))
                start, count = channel or start, 0
            count += 1
        return tuple(runs)

    def settled(self, value: Value, rows: range, columns: range) -> Value:
        """A value that is 0 outside of itself for whoever reads those ``rows`` and ``columns`` of it.

        What was cropped away lies in its node still, and is no zero: then the value becomes a node of its own.
        """
        for node, dy, dx in {(channel.node, channel.dy, channel.dx) for channel in value.channels}:
            source = self.nodes[node]
            for read, size, offset, extent in (
                (rows, value.height, dy, source.height), (columns, value.width, dx, source.width),
            ):  # fmt: skip
                before = range(max(read.start + offset, 0), min(offset, extent))
                after = range(max(size + offset, 0), min(read.stop + offset, extent))
                if before or after:
                    return self.sum(value, [(value, 1.0)])
        return value

    def sum(
        self, like: Value, terms: Sequence[tuple[Value, float]], offset: float = 0.0, activation: str = "none"
    ) -> Value:
        operands = tuple(self.operand(term) for term, _ in terms)
        scales = tuple(float(scale) for _, scale in terms)
        return self.node(Sum, like, terms=operands, scales=scales, offset=float(offset), activation=activation)

    def constant(self, tensor: Tensor, like: Value) -> Value:
        """What does not depend on the image, broadcast to the dimensions of a value."""
        axes = like.axes
        if tensor.dim() > len(axes):
            raise NotPlannable(f"a constant {list(tensor.shape)} makes a tensor {list(like.shape)} larger")
        tensor = tensor.reshape((1,) * (len(axes) - tensor.dim()) + tuple(tensor.shape))
        split: list[int] = []
        kinds: list[str] = []
        for size, dimension in zip(tensor.shape, axes, strict=True):
            if size not in (1, size_of(dimension)):
                raise NotPlannable(f"a constant of {size} meets a dimension of {size_of(dimension)}")
            split += [1 if size == 1 else s for _, s in dimension]
            kinds += [kind for kind, _ in dimension]
        atoms = tensor.reshape(split or (1,))
        for kind in "NHW":  # batch first, then rows and columns last
            if kind not in kinds:
                atoms, kinds = atoms.reshape(1, *split), [kind, *kinds]
                split = [1, *split]
        order = [
            kinds.index("N"),
            *(i for i, kind in enumerate(kinds) if kind == "C"),
            kinds.index("H"),
            kinds.index("W"),
        ]
        atoms = atoms.permute(order)
        sizes = [s for dimension in axes for kind, s in dimension if kind == "C"]
        wide = atoms.expand(atoms.shape[0], *sizes, *atoms.shape[-2:])
        full = wide.reshape(atoms.shape[0], channels_of(tuple(a for d in axes for a in d)), *atoms.shape[-2:])
        if len(full) > 1 and bool((full == full[:1]).all()):
            full = full[:1]
        made = self.add(Constant, full.shape[1], like.height, like.width, value=full.detach().clone())
        return self.value(made, axes)

    def convolution(
        self,
        value: Value,
        weights: dict[Tap, Tensor],
        bias: Tensor | None,
        size: tuple[int, int],
        stride: int,
        upscale: int,
    ) -> int:
        """The node of weights [O, I] a tap; what reads zeros alone is left out."""
        height, width = size
        channels = next(iter(weights.values())).shape[0]
        taps = [tap for tap, weight in weights.items() if bool((weight != 0).any())]
        rows, columns = [], []
        for tap in taps:
            (py, px), (dy, dx) = tap.phase, (tap.dy, tap.dx)
            rows += [dy, dy + stride * (-(-(height - py) // upscale) - 1)]
            columns += [dx, dx + stride * (-(-(width - px) // upscale) - 1)]
        if taps:
            ys, xs = (range(min(0, *read), max(read) + 1) for read in (rows, columns))
            value = self.settled(value, ys, xs)
        operand = self.operand(value)
        moved = tuple(replace(tap, dy=tap.dy + operand.dy, dx=tap.dx + operand.dx) for tap in taps)
        weight = (
            torch.stack([weights[tap] for tap in taps], 1) if taps else next(iter(weights.values()))[:, None][:, :0]
        )
        return self.add(
            Convolution, channels, height, width, operand=replace(operand, dy=0, dx=0), taps=moved,
            weight=weight.detach().clone(), bias=None if bias is None else bias.detach().clone(), stride=stride, upscale=upscale,
        )  # fmt: skip

    def pad(self, value: Value, dim: int, before: int, after: int) -> Value:
        """Zeros (or, where negative, cuts) at the two ends of a dimension."""
        if before < 0 or after < 0:
            value = value.narrow(dim, slice(max(-before, 0), value.shape[dim] - max(-after, 0)))
        before, after = max(before, 0), max(after, 0)
        if before == after == 0:
            return value
        size = value.shape[dim] + before + after
        kinds = kinds_of(value, dim)
        axes = list(value.axes)
        if kinds == ["H"]:
            axes[dim] = axis("H", size)
            value = self.settled(value, range(-before, value.height + after), range(value.width)).moved(-before, 0)
            return replace(value, height=size, axes=tuple(axes))
        if kinds == ["W"]:
            axes[dim] = axis("W", size)
            value = self.settled(value, range(value.height), range(-before, value.width + after)).moved(0, -before)
            return replace(value, width=size, axes=tuple(axes))
        raise NotPlannable("a padding of a dimension that is neither channels, rows nor columns")


def kinds_of(value: Value, dim: int) -> list[str]:
    """What a dimension is made of; one of size 1 is what its place in [N, C, H, W] or [N, C, T] says."""
    names = {4: "NCHW", 3: "NCW"}.get(len(value.axes), "")
    return [kind for kind, _ in value.axes[dim]] or [*names[dim : dim + 1]]


def block_diagonal(matrix: Tensor, times: int) -> Tensor:
    return torch.kron(torch.eye(times, dtype=matrix.dtype, device=matrix.device), matrix) if times > 1 else matrix
