"""What a tensor that depends on the image holds: which channels of which nodes, and which of its dimensions are which.

Permuting, viewing, slicing and concatenating move labels and channels about and compute nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class NotPlannable(ValueError):
    """The network, or a layer of it, is none that can be computed pixel by pixel."""


# A dimension is made of atoms, (kind, size) each, and a size of 1 of none: N images, C channels, H rows and W columns of an
# image; Q and K the positions of queries and keys. [N H W, heads E] is ((N, H, W), (C, C)).
Atom = tuple[str, int]
Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def axis(kind: str, size: int) -> Axis:
    return ((kind, size),) if size > 1 else ()


def size_of(dimension: Axis) -> int:
    return math.prod(size for _, size in dimension)


def channels_of(dimension: Axis) -> int:
    return math.prod(size for kind, size in dimension if kind == "C")


def is_channels(dimension: Axis) -> bool:
    return all(kind == "C" for kind, _ in dimension)


def merged(dimension: Axis) -> Axis:
    """Neighbouring channel atoms as one."""
    atoms: list[Atom] = []
    for kind, size in dimension:
        if kind == "C" and atoms and atoms[-1][0] == "C":
            atoms[-1] = ("C", atoms[-1][1] * size)
        else:
            atoms.append((kind, size))
    return tuple(atoms)


def viewed(axes: Axes, shape: Sequence[int]) -> Axes:
    """The dimensions after a view of ``shape``: channels may be split, images, rows and columns may not."""
    atoms = list(merged(tuple(atom for dimension in axes for atom in dimension)))
    result = []
    for size in shape:
        dimension: list[Atom] = []
        while size > 1:
            kind, available = atoms.pop(0)
            taken = math.gcd(available, size) if kind == "C" else available
            if taken == 1 or size % taken or (taken < available and taken < size):
                raise NotPlannable(f"a view as {list(shape)} splits up the image's own dimensions")
            dimension.append((kind, taken))
            size //= taken
            if taken < available:
                atoms.insert(0, (kind, available // taken))
        result.append(tuple(dimension))
    return tuple(result)


class Channel(NamedTuple):
    """value[n, y, x] = node[n, channel, y + dy, x + dx], 0 outside of the node."""

    node: int
    channel: int
    dy: int = 0
    dx: int = 0


@dataclass(frozen=True)
class Value:
    """``channels`` in the order in which the channel atoms of ``axes`` count them, of ``height`` x ``width`` positions."""

    channels: tuple[Channel, ...]
    height: int
    width: int
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(size_of, self.axes))

    def index(self) -> Tensor:
        """The numbers of the channels, one dimension for each of the tensor's."""
        return torch.arange(len(self.channels)).reshape([channels_of(dimension) for dimension in self.axes])

    def gather(self, index: Tensor, axes: Axes) -> "Value":
        channels = tuple(self.channels[i] for i in index.flatten().tolist())
        return replace(self, channels=channels, axes=axes)

    def view(self, shape: Sequence[int]) -> "Value":
        return replace(self, axes=viewed(self.axes, shape))

    def permute(self, order: Sequence[int]) -> "Value":
        return self.gather(self.index().permute(list(order)), tuple(self.axes[d] for d in order))

    def narrow(self, dim: int, chosen: slice) -> "Value":
        """Every ``chosen`` of a dimension, with a step of 1 along the image's own dimensions."""
        size = self.shape[dim]
        start, stop, step = chosen.indices(size)
        count = len(range(start, stop, step))
        if (start, count) == (0, size):
            return self
        if count == 0:
            raise NotPlannable("an empty tensor is made of the image")
        axes, kinds = list(self.axes), [kind for kind, _ in self.axes[dim]]
        if is_channels(self.axes[dim]):
            axes[dim] = axis("C", count)
            every = [slice(None)] * dim
            return self.gather(self.index()[(*every, chosen)], tuple(axes))
        if kinds not in (["H"], ["W"]) or step != 1:
            what = "a part of the batch" if "N" in kinds else "a part of the positions in an order of their own"
            raise NotPlannable(f"takes {what}")
        axes[dim] = axis(kinds[0], count)
        dy, dx = (start, 0) if kinds == ["H"] else (0, start)
        height, width = (count, self.width) if kinds == ["H"] else (self.height, count)
        return replace(self.moved(dy, dx), height=height, width=width, axes=tuple(axes))

    def moved(self, dy: int, dx: int) -> "Value":
        """Reads ``dy`` rows lower and ``dx`` columns further right."""
        channels = tuple(Channel(c.node, c.channel, c.dy + dy, c.dx + dx) for c in self.channels)
        return replace(self, channels=channels)

    def expand(self, shape: Sequence[int]) -> "Value":
        """As torch.Tensor.expand, -1 for a size that is kept; what is repeated becomes channels."""
        missing = len(shape) - len(self.axes)
        axes: list[Axis] = [()] * missing + list(self.axes)
        sizes = [size_of(d) if s == -1 else s for s, d in zip(shape, axes, strict=True)]
        index = replace(self, axes=tuple(axes)).index()
        for d, (size, dimension) in enumerate(zip(sizes, axes, strict=True)):
            if size != size_of(dimension):
                axes[d] = axis("C", size)
                index = index.expand(*(size if i == d else -1 for i in range(len(axes))))
        return self.gather(index, tuple(axes))

    def like(self, axes: Axes) -> "Value":
        """Broadcast to ``axes``, those of another value."""
        value = self
        if len(axes) > len(self.axes) or any(
            not d and is_channels(other) for d, other in zip(self.axes, axes, strict=True)
        ):
            missing = len(axes) - len(self.axes)
            own = [()] * missing + list(self.axes)
            value = self.expand(
                [size_of(b) if not a and is_channels(b) else -1 for a, b in zip(own, axes, strict=True)]
            )
        if tuple(map(merged, value.axes)) != tuple(map(merged, axes)):
            raise NotPlannable(f"tensors {list(self.shape)} and {[size_of(d) for d in axes]} meet across positions")
        return value


def broadcast(a: Axes, b: Axes) -> Axes:
    """The dimensions of what two tensors make together, element by element."""
    length = max(len(a), len(b))
    pairs: Any = zip(((),) * (length - len(a)) + a, ((),) * (length - len(b)) + b, strict=True)
    return tuple(first or second for first, second in pairs)


def joined(values: Sequence[Value], dim: int) -> Value:
    """Concatenated along a dimension of channels."""
    index: list[Tensor] = []
    channels: list[Channel] = []
    offset = 0
    for value in values:
        index.append(value.index() + offset)
        channels += value.channels
        offset += len(value.channels)
    axes = list(values[0].axes)
    for value in values:
        if any(merged(a) != merged(c) for d, (a, c) in enumerate(zip(axes, value.axes, strict=True)) if d != dim):
            raise NotPlannable("tensors are concatenated whose positions lie in different orders")
    axes[dim] = axis("C", sum(value.shape[dim] for value in values))
    whole = replace(values[0], channels=tuple(channels))
    return whole.gather(torch.cat(index, dim), tuple(axes))
