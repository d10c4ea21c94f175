"""Fewer nodes that compute the same: what people write in five operations is one node of the kernel's.

Each pass takes a network and returns one of the same values; :func:`simplify` repeats them until none changes anything.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ._cropping import cropped
from ._graph import Read, is_copy, is_plain, ordered, output_read, reads, rewired, same, through, users
from .network import Concat, Constant, Convolution, Input, Network, Node, Operand, Product, Sum, value_of

Change = Callable[[Node, list[Node], list[int]], Node]


def simplify(network: Network) -> Network:
    """The same network in few nodes, as large as what is read of them."""
    while True:
        before = network
        for one in PASSES:
            network = one(network)
        if network == before:
            return cropped(network)


def _each(change: Change) -> Callable[[Network], Network]:
    """A pass that changes node after node; ``change`` may add nodes to the list and read those before."""

    def run(network: Network) -> Network:
        nodes, counts = list(network.nodes), users(network)
        for i in range(len(nodes)):
            nodes[i] = change(nodes[i], nodes, counts)
            counts += [1] * (len(nodes) - len(counts))
        return ordered(nodes, network.output)

    run.__name__, run.__doc__ = change.__name__, change.__doc__
    return run


def copies(network: Network) -> Network:
    """Reads through copies and parts of concatenations, where what lies beyond them is 0 as well."""
    nodes = list(network.nodes)

    def source(read: Read) -> Operand:
        operand = read.operand
        while True:
            inner = _copied(nodes[operand.node], operand)
            if inner is None:
                return operand
            first, last, here = nodes[operand.node], nodes[inner.node], read
            if operand != read.operand:
                dy, dx = operand.dy - read.operand.dy, operand.dx - read.operand.dx
                here = Read(operand, _shift(read.rows, dy), _shift(read.columns, dx))
            alike = (inner.dy, inner.dx, first.height, first.width) == (0, 0, last.height, last.width)
            if not alike and not here.inside(first):
                return operand
            operand = through(replace(operand, start=0), inner)

    for i, node in enumerate(nodes):
        found = {read.operand: source(read) for read in reads(node)}
        if isinstance(node, Convolution):
            new = found[node.operand]
            taps = tuple(replace(tap, dy=tap.dy + new.dy, dx=tap.dx + new.dx) for tap in node.taps)
            nodes[i] = replace(node, operand=replace(new, dy=0, dx=0), taps=taps)
        else:
            nodes[i] = rewired(node, found.__getitem__)
    output = source(output_read(network))
    plain = (output.dy, output.dx) == (0, 0) and _alike(nodes[output.node], nodes[0])
    return ordered(nodes, output if plain else network.output)


def _shift(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


def _copied(node: Node, operand: Operand) -> Operand | None:
    """What ``operand`` reads of a node that only passes it on, with all of the channels that it asks for."""
    if is_copy(node):
        return replace(node.terms[0], start=node.terms[0].start + operand.start)  # type: ignore[attr-defined]
    if isinstance(node, Concat) and node.activation == "none":
        begin = 0
        for part, scale in zip(node.parts, node.scales, strict=True):
            if begin <= operand.start and operand.start + operand.channels <= begin + part.channels:
                return replace(part, start=part.start + operand.start - begin) if scale == 1 else None
            begin += part.channels
    return None


@_each
def sums(node: Node, nodes: list[Node], counts: list[int]) -> Node:
    """A sum of sums is one; equal terms are taken together, and what has no weight is left out."""
    if not isinstance(node, Sum):
        return node
    terms: dict[Operand, float] = {}
    offset = node.offset
    for read, scale in zip(reads(node), node.scales, strict=True):
        inner, operand = nodes[read.operand.node], read.operand
        flat = isinstance(inner, Sum) and inner.activation == "none" and (counts[operand.node] == 1 or is_plain(inner))
        if isinstance(inner, Sum) and flat and read.inside(inner):
            offset += scale * inner.offset
            for term, factor in zip(inner.terms, inner.scales, strict=True):
                new = through(operand, term)
                terms[new] = terms.get(new, 0.0) + scale * factor
        else:
            terms[operand] = terms.get(operand, 0.0) + scale
    kept = {term: scale for term, scale in terms.items() if scale} or dict(list(terms.items())[:1])
    return replace(node, terms=tuple(kept), scales=tuple(kept.values()), offset=offset)


@_each
def gates(node: Node, nodes: list[Node], counts: list[int]) -> Node:
    """tanh(a) sigmoid(b) is one product."""
    if not isinstance(node, Product):
        return node
    first, second = reads(node)
    for side, name, read in (("a", "activation", first), ("b", "gate", second)):
        inner = nodes[read.operand.node]
        alone = counts[read.operand.node] == 1 and getattr(node, name) == "none" and read.inside(inner)
        if alone and isinstance(inner, Sum) and _activates(inner) and inner.scales[0] == 1:
            changed: Any = {side: through(read.operand, inner.terms[0]), name: inner.activation}
            node = replace(node, **changed)
    return node


@_each
def concatenations(node: Node, nodes: list[Node], counts: list[int]) -> Node:
    """elu(cat(x, -x)) is one concatenation, and so is cat(elu(x), elu(-x)); concatenations of concatenations are one."""
    if isinstance(node, Sum) and len(node.terms) == 1 and not node.offset:
        (read,) = reads(node)
        inner = nodes[read.operand.node]
        whole = counts[read.operand.node] == 1 and read.operand == Operand(read.operand.node, inner.channels)
        fits = whole and (inner.height, inner.width) == (node.height, node.width)
        if fits and isinstance(inner, Concat) and inner.activation == "none":
            scales = tuple(node.scales[0] * scale for scale in inner.scales)
            return replace(inner, scales=scales, activation=node.activation, layer=node.layer)
        return node
    if not isinstance(node, Concat):
        return node
    parts: list[Operand] = []
    factors: list[float] = []
    for read, scale in zip(reads(node), node.scales, strict=True):
        inner, operand = nodes[read.operand.node], read.operand
        if isinstance(inner, Sum) and is_plain(inner) and read.inside(inner):
            parts.append(through(operand, inner.terms[0]))
            factors.append(scale * inner.scales[0])
        elif isinstance(inner, Concat) and _opens(inner, read, counts):
            parts += [replace(part, dy=part.dy + operand.dy, dx=part.dx + operand.dx) for part in inner.parts]
            factors += [scale * factor for factor in inner.scales]
        else:
            parts.append(operand)
            factors.append(scale)
    node = replace(node, parts=tuple(parts), scales=tuple(factors))
    inner_sums: list[Any] = [nodes[part.node] for part in node.parts]
    activations = {inner.activation for inner in inner_sums if isinstance(inner, Sum)}
    hoisted = node.activation == "none" and set(node.scales) == {1.0} and len(activations) == 1
    inside = all(read.inside(inner) for read, inner in zip(reads(node), inner_sums, strict=True))
    if not hoisted or activations == {"none"} or not all(map(_activates, inner_sums)) or not inside:
        return node
    parts = [through(part, inner.terms[0]) for part, inner in zip(node.parts, inner_sums, strict=True)]
    scales = tuple(inner.scales[0] for inner in inner_sums)
    return replace(node, parts=tuple(parts), scales=scales, activation=activations.pop())


def _opens(inner: Concat, read: Read, counts: list[int]) -> bool:
    whole = (read.operand.start, read.operand.channels) == (0, inner.channels)
    return whole and inner.activation == "none" and counts[read.operand.node] == 1 and read.inside(inner)


def _activates(node: Node) -> bool:
    return isinstance(node, Sum) and len(node.terms) == 1 and not node.offset


@_each
def constants(node: Node, nodes: list[Node], counts: list[int]) -> Node:
    """What is made of constants alone is one; the constants of a sum are one, and a number where they are one throughout."""
    if isinstance(node, Input | Constant) or not node.operands:
        return node
    sources = {operand.node: nodes[operand.node] for operand in node.operands}
    if all(isinstance(source, Constant) for source in sources.values()):
        return _computed(node, nodes)
    if not isinstance(node, Sum):
        return node
    fixed = [
        (term, s) for term, s in zip(node.terms, node.scales, strict=True) if isinstance(nodes[term.node], Constant)
    ]
    free = [(term, s) for term, s in zip(node.terms, node.scales, strict=True) if (term, s) not in fixed]
    if not fixed:
        return node
    made = fixed
    if len(fixed) > 1 or fixed[0][1] != 1:
        part = replace(
            node, terms=tuple(t for t, _ in fixed), scales=tuple(s for _, s in fixed), offset=0.0, activation="none"
        )
        nodes.append(_computed(part, nodes))
        made = [(Operand(len(nodes) - 1, node.channels), 1.0)]
    number = _number(made[0][0], nodes, node)
    if number is not None:
        made = []
    terms, scales = zip(*free, *made, strict=True)
    return replace(node, terms=terms, scales=scales, offset=node.offset + (number or 0.0))


def _computed(node: Node, nodes: list[Node]) -> Constant:
    """A constant of the value of a node, in float64, no larger than it varies."""
    values: dict[int, Tensor] = {}
    rows = 1
    for operand in node.operands:
        source: Any = nodes[operand.node]
        rows = max(rows, len(source.value))
    image = torch.zeros(rows, 1, 1, 1, dtype=torch.float64, device=source.value.device)
    for operand in node.operands:
        source = nodes[operand.node]
        values[operand.node] = source.value.double().expand(rows, source.channels, source.height, source.width)
    value = value_of(node, image, values).expand(rows, node.channels, node.height, node.width)  # type: ignore[arg-type]
    for dim in (0, 2, 3):
        first = value.narrow(dim, 0, 1)
        value = first if bool((value == first).all()) else value
    return Constant(node.channels, node.height, node.width, layer=node.layer, value=value.clone())


def _number(operand: Operand, nodes: list[Node], reader: Node) -> float | None:
    """What a constant is wherever it is read, if that is one number."""
    source: Any = nodes[operand.node]
    value = source.value[:, operand.start : operand.start + operand.channels]
    first = value.flatten()[0]
    rows, columns = range(operand.dy, operand.dy + reader.height), range(operand.dx, operand.dx + reader.width)
    if not Read(operand, rows, columns).inside(source) or not bool((value == first).all()):
        return None
    return float(first)


@_each
def affine(node: Node, nodes: list[Node], counts: list[int]) -> Node:
    """Scales and shifts of a convolution's output, channel by channel, are in its weights and bias; scales of its input too."""
    if isinstance(node, Convolution):
        source = nodes[node.operand.node]
        if isinstance(source, Sum) and is_plain(source):
            (read,) = reads(node)
            term = through(node.operand, source.terms[0])
            if read.inside(source) or (
                source.terms[0].dy == 0 == source.terms[0].dx and _alike(source, nodes[term.node])
            ):
                taps = tuple(replace(tap, dy=tap.dy + term.dy, dx=tap.dx + term.dx) for tap in node.taps)
                weight = node.weight.double() * source.scales[0]
                return replace(node, operand=replace(term, dy=0, dx=0), taps=taps, weight=weight)
        return node
    if isinstance(node, Product) and (node.activation, node.gate) == ("none", "none"):
        for mine, other in ((node.a, node.b), (node.b, node.a)):
            made, factor = nodes[mine.node], _per_channel(other, nodes, node)
            if factor is not None and isinstance(made, Convolution) and _owned(mine, made, node, counts):
                bias = None if made.bias is None else made.bias.double() * factor
                return replace(made, weight=made.weight.double() * factor[:, None, None], bias=bias, layer=node.layer)
    if isinstance(node, Sum):
        for i, (term, scale) in enumerate(zip(node.terms, node.scales, strict=True)):
            made = nodes[term.node]
            known = {j: _per_channel(other, nodes, node) for j, other in enumerate(node.terms)}
            shifts = {j: shift for j, shift in known.items() if shift is not None}
            if not isinstance(made, Convolution) or not _owned(term, made, node, counts):
                continue
            if scale == 1 and not node.offset and not shifts:
                continue
            zero = torch.zeros(made.channels, dtype=torch.float64, device=made.weight.device)
            bias = (zero if made.bias is None else made.bias.double()) * scale + node.offset
            for j, shift in shifts.items():
                bias = bias + node.scales[j] * shift
            nodes.append(replace(made, weight=made.weight.double() * scale, bias=bias))
            kept = [
                (t, s)
                for j, (t, s) in enumerate(zip(node.terms, node.scales, strict=True))
                if j not in shifts and j != i
            ]
            kept.insert(min(i, len(kept)), (Operand(len(nodes) - 1, made.channels), 1.0))
            terms, scales = zip(*kept, strict=True)
            return replace(node, terms=terms, scales=scales, offset=0.0)
    return node


def _alike(a: Node, b: Node) -> bool:
    return (a.height, a.width) == (b.height, b.width)


def _owned(operand: Operand, made: Node, reader: Node, counts: list[int]) -> bool:
    """The reader alone reads a node, and all of it."""
    return operand == Operand(operand.node, made.channels) and counts[operand.node] == 1 and _alike(made, reader)


def _per_channel(operand: Operand, nodes: list[Node], reader: Node) -> Tensor | None:
    """The numbers [C] of a constant that is the same at every position and for every image."""
    source = nodes[operand.node]
    if not isinstance(source, Constant) or (operand.dy, operand.dx) != (0, 0) or not _alike(source, reader):
        return None
    value = source.value[:, operand.start : operand.start + operand.channels]
    return value.flatten().double() if value.shape == (1, operand.channels, 1, 1) else None


def shared(network: Network) -> Network:
    """Nodes that are equal are one."""
    nodes: list[Node] = []
    place: list[int] = []
    seen: dict[Any, list[int]] = {}
    for node in network.nodes:
        node = rewired(node, lambda operand: replace(operand, node=place[operand.node]))
        plain = tuple(getattr(node, field.name) for field in fields(node) if field.compare)
        alike = seen.setdefault((type(node), plain), [])
        for j in alike:
            if all(same(getattr(node, f.name), getattr(nodes[j], f.name)) for f in fields(node) if f.name != "layer"):
                place.append(j)
                break
        else:
            alike.append(len(nodes))
            place.append(len(nodes))
            nodes.append(node)
    return ordered(nodes, replace(network.output, node=place[network.output.node]))


PASSES: tuple[Callable[[Network], Network], ...] = (copies, constants, sums, gates, concatenations, affine, shared)
