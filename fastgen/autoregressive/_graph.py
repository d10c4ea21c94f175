"""Who reads what of whom in a network: the grounds on which it may be rewritten."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from .network import Convolution, Network, Node, Operand, Sum


class Read(NamedTuple):
    """The rows and columns of its source that are read through an operand, those beyond it too."""

    operand: Operand
    rows: range
    columns: range

    def inside(self, source: Node) -> bool:
        """Nothing beyond the source is read, where it is 0 whatever made it."""
        rows, columns = self.rows, self.columns
        return rows.start >= 0 <= columns.start and rows.stop <= source.height and columns.stop <= source.width


def reads(node: Node) -> Iterator[Read]:
    if isinstance(node, Convolution):
        rows = spanned([tap.dy for tap in node.taps], [tap.phase[0] for tap in node.taps], node.height, node)
        columns = spanned([tap.dx for tap in node.taps], [tap.phase[1] for tap in node.taps], node.width, node)
        yield Read(node.operand, rows, columns)
        return
    for operand in node.operands:
        yield Read(operand, range(operand.dy, operand.dy + node.height), range(operand.dx, operand.dx + node.width))


def spanned(offsets: Sequence[int], phases: Sequence[int], size: int, node: Convolution) -> range:
    """What taps at ``offsets`` read of their source along one direction."""
    last = [
        offset + node.stride * (-(-(size - phase) // node.upscale) - 1)
        for offset, phase in zip(offsets, phases, strict=True)
    ]
    return range(min(offsets, default=0), max(last, default=-1) + 1)


def output_read(network: Network) -> Read:
    image, operand = network.nodes[0], network.output
    rows = range(operand.dy, operand.dy + image.height)
    return Read(operand, rows, range(operand.dx, operand.dx + image.width))


def users(network: Network) -> list[int]:
    """How many operands read each node."""
    counts = [0] * len(network.nodes)
    for node in network.nodes:
        for operand in node.operands:
            counts[operand.node] += 1
    counts[network.output.node] += 1
    return counts


def rewired(node: Node, change: Callable[[Operand], Operand]) -> Node:
    """A node with every operand changed; itself where none is."""
    changed: dict[str, Any] = {}
    for field in fields(node):
        value = getattr(node, field.name)
        new: Any
        if isinstance(value, Operand):
            new = change(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Operand):
            new = tuple(map(change, value))
        else:
            continue
        if new != value:
            changed[field.name] = new
    return replace(node, **changed) if changed else node


def through(operand: Operand, inner: Operand) -> Operand:
    """What ``operand`` reads of a node that is ``inner`` itself, read of ``inner``'s node."""
    return Operand(
        inner.node, operand.channels, inner.start + operand.start, inner.dy + operand.dy, inner.dx + operand.dx
    )


def is_plain(node: Node) -> bool:
    """A sum of one term that is only scaled."""
    return isinstance(node, Sum) and len(node.terms) == 1 and not node.offset and node.activation == "none"


def is_copy(node: Node) -> bool:
    return is_plain(node) and node.scales[0] == 1  # type: ignore[attr-defined]


def ordered(nodes: Sequence[Node], output: Operand) -> Network:
    """A network of the nodes that the output needs, each after those it reads."""
    place: dict[int, int] = {0: 0}
    order = [0]
    stack = [(output.node, False)]
    while stack:
        i, done = stack.pop()
        if i in place:
            continue
        if done:
            place[i] = len(order)
            order.append(i)
            continue
        stack.append((i, True))
        stack += [(operand.node, False) for operand in reversed(nodes[i].operands)]

    def moved(operand: Operand) -> Operand:
        return replace(operand, node=place[operand.node]) if place[operand.node] != operand.node else operand

    return Network(tuple(rewired(nodes[i], moved) for i in order), moved(output))


def same(a: object, b: object) -> bool:
    """Equal fields, tensors by their numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and a.equal(b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
