"""Nodes as large as what is read of them: people pad by more than they need and cut it off afterwards."""

from dataclasses import replace

from ._graph import Read, output_read, reads, rewired
from .network import Attention, Constant, Convolution, Input, Network, Node, Operand, Tap


def cropped(network: Network) -> Network:
    """Without rows and columns at the edges of nodes that nobody reads."""
    nodes = list(network.nodes)
    boxes: list[tuple[range, range] | None] = [None] * len(nodes)
    origins = [(0, 0)] * len(nodes)
    _need(boxes, nodes, output_read(network))
    for i in reversed(range(len(nodes))):
        node, box = nodes[i], boxes[i]
        whole = box is None or (len(box[0]), len(box[1])) == (node.height, node.width)
        if box is not None and not whole and not isinstance(node, Input | Constant | Attention):
            origins[i] = (box[0].start, box[1].start)
            nodes[i] = node = _cut(node, *box)
        for read in reads(node):
            _need(boxes, nodes, read)

    def moved(operand: Operand) -> Operand:
        y, x = origins[operand.node]
        return replace(operand, dy=operand.dy - y, dx=operand.dx - x)

    for i, node in enumerate(nodes):
        if isinstance(node, Convolution):
            y, x = origins[node.operand.node]
            taps = tuple(replace(tap, dy=tap.dy - y, dx=tap.dx - x) for tap in node.taps)
            nodes[i] = replace(node, taps=taps) if y or x else node
        else:
            nodes[i] = rewired(node, moved)
    return Network(tuple(nodes), moved(network.output))


def _need(boxes: list[tuple[range, range] | None], nodes: list[Node], read: Read) -> None:
    """Makes the box of a node hold what is read of it."""
    source, old = nodes[read.operand.node], boxes[read.operand.node]
    rows = range(max(read.rows.start, 0), min(read.rows.stop, source.height))
    columns = range(max(read.columns.start, 0), min(read.columns.stop, source.width))
    if not rows or not columns:
        return
    if old is not None:
        rows = range(min(rows.start, old[0].start), max(rows.stop, old[0].stop))
        columns = range(min(columns.start, old[1].start), max(columns.stop, old[1].stop))
    boxes[read.operand.node] = (rows, columns)


def _cut(node: Node, rows: range, columns: range) -> Node:
    """Those rows and columns of a node as a node."""
    y, x = rows.start, columns.start
    node = replace(node, height=len(rows), width=len(columns))
    if not isinstance(node, Convolution):
        return rewired(node, lambda operand: replace(operand, dy=operand.dy + y, dx=operand.dx + x))
    u, s = node.upscale, node.stride

    def moved(tap: Tap) -> Tap:
        (py, px), dy, dx = tap.phase, tap.dy, tap.dx  # output u i + p of old is u i + p - y of new
        new = ((py - y) % u, (px - x) % u)
        return Tap(dy + s * ((y + new[0]) // u), dx + s * ((x + new[1]) // u), new)

    return replace(node, taps=tuple(map(moved, node.taps)))
