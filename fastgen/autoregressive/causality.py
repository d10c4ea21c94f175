"""Which node may be computed when, in raster order; and whether a captured network is what its module computes.

Position (Y, X) of a node with ``f`` pixels a position belongs to the pixel (f Y, f X); what it reads of another lies at a
distance of whole pixels from there, which is the same for every position.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._values import NotPlannable
from .capture import Captured, dtype_and_device, evaluating
from .network import Attention, Convolution, Embedding, Input, Network, Node


class Availability(IntEnum):
    """What the value of a node at a pixel's position may depend on; each includes those above it."""

    CONSTANT = 0  # nothing
    ROW = 1  # rows above the pixel's: it can be computed for a whole row, before the row is sampled
    PIXEL = 2  # pixels before the pixel
    INPUT = 3  # the pixel itself: the image, and what is computed of it without a shift
    COMPLETE = 4  # all of the pixel's row: it can be computed once that is sampled, for whoever reads it from below


class Distance(NamedTuple):
    """How many pixels below and to the right of the reader's own position lies what is read."""

    dy: int
    dx: int


def seen_from(kind: Availability, distance: Distance) -> Availability | None:
    """What a node of ``kind`` is for one that reads it at a distance; None where it depends on rows below the reader's."""
    dy, dx = distance
    if kind == Availability.CONSTANT:
        return kind
    if dy < 0:
        return Availability.ROW
    if dy > 0:
        return Availability.COMPLETE if (kind, dy) == (Availability.ROW, 1) else None
    if kind in (Availability.PIXEL, Availability.INPUT) and dx:
        return Availability.PIXEL if dx < 0 else Availability.COMPLETE
    return kind


def resolutions(network: Network) -> list[int]:
    """Pixels a position of every node, in either direction; 0 of constants, which are wherever they are read."""
    found: list[int] = []
    for node in network.nodes:
        of = {found[operand.node] for operand in node.operands} - {0}
        if len(of) > 1:
            raise NotPlannable(f"{_named(node)} reads values of {' and '.join(map(str, sorted(of)))} pixels a position")
        pixels = 1 if isinstance(node, Input) else of.pop() if of else 0
        if isinstance(node, Convolution):
            pixels, rest = divmod(pixels * node.stride, node.upscale)
            if rest:
                raise NotPlannable(f"{_named(node)} makes more than one position of a pixel")
        found.append(pixels)
    return found


def distances(network: Network, i: int, pixels: Sequence[int]) -> Iterator[tuple[int, Distance]]:
    """(source, distance) of all that node ``i`` reads: tap by tap of a convolution, operand by operand of others."""
    node = network.nodes[i]
    for operand in node.operands:
        source = pixels[operand.node]
        if not isinstance(node, Convolution):
            yield operand.node, Distance(source * operand.dy, source * operand.dx)
            continue
        for tap in node.taps:
            phase_y, phase_x = tap.phase
            yield operand.node, Distance(source * tap.dy - pixels[i] * phase_y, source * tap.dx - pixels[i] * phase_x)


def availability(network: Network) -> list[Availability]:
    """Of every node; refuses a network that reads rows below a pixel's, naming the layer."""
    pixels = resolutions(network)
    kinds: list[Availability] = []
    for i, node in enumerate(network.nodes):
        seen = [Availability.INPUT if isinstance(node, Input) else Availability.CONSTANT]
        for k, (source, distance) in enumerate(distances(network, i, pixels)):
            kind = seen_from(kinds[source], distance)
            if kind is None:
                raise NotPlannable(_too_late(node, kinds[source], distance))
            if kind == Availability.INPUT and isinstance(node, Attention) and node.strict and k > 0:
                kind = Availability.PIXEL  # keys and values of the positions before
            seen.append(kind)
        kinds.append(max(seen))
    return kinds


def taps_by_availability(network: Network, i: int, kinds: Sequence[Availability]) -> tuple[list[int], list[int]]:
    """The taps of convolution ``i`` that can be computed for a whole row before it is sampled, and those of the pixel."""
    rows: list[int] = []
    rest: list[int] = []
    for t, (source, distance) in enumerate(distances(network, i, resolutions(network))):
        seen = seen_from(kinds[source], distance)
        assert seen is not None, "availability(network) has refused it"
        (rows if seen <= Availability.ROW else rest).append(t)
    return rows, rest


def _named(node: Node) -> str:
    kind = type(node).__name__
    return f"{node.layer} ({kind})" if node.layer else f"a {kind}"


def _too_late(node: Node, kind: Availability, distance: Distance) -> str:
    dy, dx = distance
    where = f"{dy} rows below" if dy > 0 else f"{dx} columns to the right of"
    what = {
        Availability.ROW: "rows above it",
        Availability.PIXEL: "pixels before it",
        Availability.INPUT: "its own pixel",
        Availability.COMPLETE: "the rest of its row",
    }[kind]
    return f"{_named(node)} reads {where} a pixel's position a value that depends on {what}, so the pixel depends on later ones"


def _culprit(network: Network, kinds: Sequence[Availability]) -> str:
    """Why the logits of a pixel depend on the pixel itself or on more: the layer that brings that about."""
    pixels = resolutions(network)
    i = network.output.node
    path = [network.nodes[i]]
    while True:
        seen = [
            (source, distance, seen_from(kinds[source], distance)) for source, distance in distances(network, i, pixels)
        ]
        source, distance, _ = next(found for found in seen if found[2] == kinds[i])
        if kinds[source] != kinds[i]:
            return _too_late(network.nodes[i], kinds[source], distance)
        if isinstance(network.nodes[source], Input):
            named = next((node for node in reversed(path) if isinstance(node, Convolution)), path[-1])
            return f"{_named(named)} reads the pixel itself, and its logits depend on it"
        i = source
        path.append(network.nodes[i])


def color_order(captured: Captured) -> tuple[int, ...] | None:
    """In which order the colors of a pixel are to be drawn: None where all are at once, as no logit depends on its own pixel.

    Where logits depend on their own pixel's colors, it is found by changing them: a color must not depend on itself or, by way of
    others, on one that depends on it.
    """
    network, colors = captured.network, captured.color_channels
    kinds = availability(network)
    kind = kinds[network.output.node]
    if kind == Availability.COMPLETE:
        raise NotPlannable(_culprit(network, kinds))
    if kind != Availability.INPUT:
        return None
    depends = _color_dependence(captured)
    order: list[int] = []
    while len(order) < colors:
        free = [
            c
            for c in range(colors)
            if c not in order and not any(depends[c][d] for d in range(colors) if d not in order)
        ]
        if not free:
            raise NotPlannable(_culprit(network, kinds))
        order.append(free[0])
    return tuple(order)


def _color_dependence(captured: Captured) -> list[list[bool]]:
    """[c][d]: a logit of color c of a pixel changes with color d of that pixel."""
    network, colors = captured.network, captured.color_channels
    generator = torch.Generator().manual_seed(0)
    device = _device(network)
    image = _image(network, (2, *_size(network)), generator).to(device, torch.float64)
    result = [[False] * colors for _ in range(colors)]
    before = network.evaluate(image)
    height, width = image.shape[2:]
    for d in range(colors):
        for _ in range(3):
            y, x = (int(torch.randint(0, n, (), generator=generator)) for n in (height, width))
            other = image.clone()
            other[:, d, y, x] = other[:, d, y, x] == 0
            change = (network.evaluate(other) - before)[:, :, y, x] != 0  # [N, channels]
            changed = change.unflatten(1, (-1, colors) if captured.levels_first else (colors, -1))
            by_color = changed.any(0).any(0 if captured.levels_first else 1)
            for c in range(colors):
                result[c][d] |= bool(by_color[c])
    return result


def _size(network: Network) -> tuple[int, int, int]:
    image = network.nodes[0]
    return image.channels, image.height, image.width


def _device(network: Network) -> Any:
    weights = (getattr(node, name, None) for node in network.nodes for name in ("weight", "value", "table"))
    return next((weight.device for weight in weights if weight is not None), torch.device("cpu"))


def _image(network: Network, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random whole numbers that every model takes: levels of the table where there is one, else 0 and 1."""
    levels = min((len(node.table) for node in network.nodes if isinstance(node, Embedding)), default=2)
    return torch.randint(0, levels, tuple(shape), generator=generator)


def check(
    captured: Captured,
    model: nn.Module,
    shape: Sequence[int],
    *,
    condition: Any = None,
    pixels: int = 3,
    tolerance: float | None = None,
) -> None:
    """Refuses a network that is not what ``model`` computes, and a model whose logits depend on later pixels, by trying.

    ``tolerance`` is relative to the largest logit: 1e-11 in float64, otherwise 1e-5.
    """
    network, order = captured.network, color_order(captured)
    options = dtype_and_device(model)
    bound = (1e-11 if options.get("dtype") == torch.float64 else 1e-5) if tolerance is None else tolerance
    generator = torch.Generator().manual_seed(0)
    image = _image(network, shape, generator).to(**(options or {"dtype": torch.get_default_dtype()}))
    with evaluating(model), torch.no_grad():
        logits = _logits(model, image, condition)
        expected = network.evaluate(image if captured.rank == 4 else image[:, :, None]).reshape(logits.shape)
        largest = float(logits.abs().max())
        error = float((logits - expected).abs().max())
        if not error <= bound * largest:
            raise NotPlannable(
                f"the captured network differs from the model by {error:.3g} of logits up to {largest:.3g}"
            )
        length = logits[0, 0].numel()
        for _ in range(pixels):
            at = int(torch.randint(0, length, (), generator=generator))
            other = image.flatten(2).clone()
            other[:, :, at] = (other[:, :, at] == 0).to(other)
            change = (_logits(model, other.view_as(image), condition) - logits).flatten(2).abs()
            early = float(change[:, :, : at + (order is None)].max()) if at or order is None else 0.0
            if not early <= bound * largest:
                raise NotPlannable(f"logits of pixels up to number {at} change by {early:.3g} with that pixel")


def _logits(model: Callable[..., Tensor], image: Tensor, condition: Any) -> Tensor:
    """[N, channels, ...] of a model."""
    output = model(image) if condition is None else model(image, condition)
    return output.flatten(1, output.dim() - image.dim() + 1)
