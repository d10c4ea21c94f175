"""Networks for the tests of programs: one with every kind of node, and random ones; all causal by construction."""

import random
from typing import Any

import torch
from torch import Tensor

from fastgen.autoregressive.network import (
    ACTIVATIONS,
    Attention,
    Concat,
    Constant,
    Convolution,
    Embedding,
    Input,
    LayerNorm,
    Network,
    Operand,
    Product,
    Sum,
    Tap,
)

BEFORE = [(-1, -1), (-1, 0), (-1, 1), (0, -1)]  # taps (dy, dx) that a first layer may have
UP_TO = [*BEFORE, (0, 0)]  # and any other
ABOVE = [(-2, 0), (-1, -1), (-1, 0), (-1, 1)]


class Builder:
    """Nodes one after the other; what a method takes and returns are operands of whole nodes."""

    def __init__(self, height: int, width: int, colors: int = 1, seed: int = 0) -> None:
        self.height, self.width = height, width
        self.generator = torch.Generator().manual_seed(seed)
        self.nodes: list[Any] = [Input(colors, height, width)]
        self.image = Operand(0, colors)

    def add(self, node: Any) -> Operand:
        self.nodes.append(node)
        return Operand(len(self.nodes) - 1, node.channels)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def size(self, operand: Operand) -> tuple[int, int]:
        node = self.nodes[operand.node]
        return node.height, node.width

    def part(self, operand: Operand, channels: int, start: int = 0, dy: int = 0, dx: int = 0) -> Operand:
        return Operand(operand.node, channels, operand.start + start, operand.dy + dy, operand.dx + dx)

    def conv(self, source: Operand, channels: int, taps: Any, bias: bool = True, **options: Any) -> Operand:
        taps = tuple(tap if isinstance(tap, Tap) else Tap(*tap) for tap in taps)
        height, width = options.pop("size", self.size(source))
        weight = self.normal(channels, len(taps), source.channels, scale=(len(taps) * source.channels) ** -0.5)
        given = self.normal(channels, scale=0.1) if bias else None
        return self.add(Convolution(channels, height, width, source, taps, weight, given, **options))

    def sum(
        self, *terms: Operand, scales: tuple[float, ...] = (), offset: float = 0.0, activation: str = "none"
    ) -> Operand:
        height, width = self.size(terms[0])
        scales = scales or (1.0,) * len(terms)
        return self.add(Sum(terms[0].channels, height, width, terms, scales, offset, activation))

    def product(self, a: Operand, b: Operand, activation: str = "tanh", gate: str = "sigmoid") -> Operand:
        height, width = self.size(a)
        return self.add(Product(a.channels, height, width, a, b, activation, gate))

    def gated(self, x: Operand) -> Operand:
        """tanh of the first half of the channels times sigmoid of the second."""
        half = x.channels // 2
        return self.product(self.part(x, half), self.part(x, half, half))

    def concat(self, *parts: Operand, scales: tuple[float, ...] = (), activation: str = "none") -> Operand:
        height, width = self.size(parts[0])
        channels = sum(part.channels for part in parts)
        return self.add(Concat(channels, height, width, parts, scales or (1.0,) * len(parts), activation))

    def constant(self, channels: int, *shape: int) -> Operand:
        """A value [N, channels, H, W] of ``shape`` (N, H, W), each 1 or whole."""
        n, h, w = shape
        return self.add(Constant(channels, self.height, self.width, self.normal(n, channels, h, w)))

    def norm(self, x: Operand, affine: bool = True) -> Operand:
        weight, bias = (self.normal(x.channels) if affine else None for _ in range(2))
        return self.add(LayerNorm(x.channels, *self.size(x), x, weight, bias))

    def attention(self, query: Operand, key: Operand, value: Operand, heads: int, strict: bool) -> Operand:
        height, width = self.size(query)
        return self.add(Attention(value.channels, height, width, query, key, value, heads, 0.5, strict))

    def embedding(self, x: Operand, levels: int, width: int) -> Operand:
        height, columns = self.size(x)
        return self.add(Embedding(x.channels * width, height, columns, x, self.normal(levels, width)))

    def network(self, output: Operand) -> Network:
        return Network(tuple(self.nodes), output)


def small(
    height: int, width: int, colors: int = 1, levels: int = 4, channels: int = 6, seed: int = 0, constant: bool = False
) -> Network:
    """Two convolutions and a relu: what takes a slow interpreter least."""
    b = Builder(height, width, colors, seed)
    more = (b.constant(channels, 1, 1, 1),) if constant else ()
    hidden = b.sum(b.conv(b.image, channels, BEFORE), *more, activation="relu")
    return b.network(b.conv(hidden, levels * colors, [(0, -1), (0, 0)]))


def whole_rows(height: int, width: int, colors: int = 1, channels: int = 5, levels: int = 4, seed: int = 0) -> Network:
    """Layers that read to the right of a pixel too, and so are computed once their row is whole, for those that read from below."""
    b = Builder(height, width, colors, seed)
    around = [(0, -1), (0, 0), (0, 1)]
    hidden = b.sum(b.conv(b.image, channels, BEFORE), activation="relu")
    across = b.gated(b.conv(b.concat(b.image, hidden), 2 * channels, around))  # of the whole row, its own pixel too
    above = b.conv(across, channels, [(-2, 0), (-1, 0)])
    twice = b.conv(b.sum(across, above, activation="elu"), channels, [(-1, -1), (0, 1)])
    joined = b.sum(hidden, above, b.conv(twice, channels, [(-1, 0)]), activation="tanh")
    return b.network(b.conv(joined, levels * colors, [(0, -1), (0, 0)]))


def everything(
    height: int, width: int, colors: int = 1, channels: int = 20, levels: int = 5, seed: int = 0, images: int = 1
) -> Network:
    """Every kind of node: Gated PixelCNN's two stacks, a level down and up, layer norm, attention, an embedding, constants."""
    b = Builder(height, width, colors, seed)
    cat = b.concat(b.image, b.constant(1, 1, 1, 1), scales=(2.0, 1.0))
    reach = [(dy, dx) for dy in (-2, -1) for dx in (-2, -1, 0, 1, 2)] + [(0, -2), (0, -1)]
    vertical = b.gated(b.conv(cat, 2 * channels, ABOVE))
    table = b.embedding(b.image, levels, 3)
    first = b.sum(b.conv(cat, channels, reach), b.conv(table, channels, BEFORE, bias=False))
    hidden = b.sum(first, vertical, scales=(1.0, 0.5), activation="elu")
    for shape in ((images, 1, 1), (1, height, width)):
        below = b.conv(vertical, 2 * channels, [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1)])
        link = b.conv(below, 2 * channels, [(0, 0)])
        vertical = b.gated(below)
        across = b.conv(hidden, 2 * channels, [(-1, -2), (-1, 0), (0, -2), (0, -1), (0, 0)])
        gate = b.gated(b.sum(link, across, b.constant(2 * channels, *shape), offset=0.25))
        hidden = b.sum(b.conv(gate, channels, [(0, 0)]), hidden)
    half = ((height + 1) // 2, (width + 1) // 2)
    down = b.conv(hidden, channels, UP_TO[:2] + UP_TO[3:], size=half, stride=2)
    normed = b.norm(b.sum(down, activation="relu"))
    phases = [Tap(0, 0, (y, x)) for y in (0, 1) for x in (0, 1)]
    up = b.conv(
        normed, channels, [*phases, Tap(0, -1), Tap(-1, 0, (0, 1))], size=(height, width), bias=False, upscale=2
    )
    whole = [b.part(hidden, channels, dy=-1), b.part(hidden, channels, dx=-1)]
    hidden = b.sum(hidden, up, *whole, scales=(1.0, 1.0, 1.0, 0.5))
    query, key, value = (b.conv(hidden, size, [(0, 0)]) for size in (8, 8, 12))
    attended = b.attention(query, key, value, heads=2, strict=True)
    both = b.concat(attended, attended, scales=(1.0, -1.0), activation="elu")
    return b.network(b.conv(both, levels * colors, [(0, 0)]))


def random_network(height: int, width: int, colors: int, levels: int, seed: int, per_color: bool = False) -> Network:
    """A dozen nodes chosen at random among those that may come next."""
    choose = random.Random(seed)
    b = Builder(height, width, colors, seed)
    first = b.conv(b.image, choose.randint(1, 9), choose.sample(BEFORE, choose.randint(1, 4)))
    there = [b.sum(first, activation=choose.choice(list(ACTIVATIONS)))]
    if per_color:  # the colors of a pixel before the one at hand; what comes of them is added to its logits alone
        there.append(b.conv(b.image, 4, [(-1, 0), (0, -1)]))
    for _ in range(choose.randint(4, 10)):
        there.append(_next(b, choose, there))
    output = b.conv(there[-1], levels * colors, choose.sample(UP_TO, 2))
    if per_color:
        output = b.sum(output, _of_earlier_colors(b, colors, levels))
    return b.network(output)


def _of_earlier_colors(b: Builder, colors: int, levels: int) -> Operand:
    """Logits of color c, channels [c levels, (c + 1) levels), by the colors before it."""
    weight = b.normal(levels * colors, 1, colors)
    for c in range(colors):
        weight[c * levels : (c + 1) * levels, :, c:] = 0
    return b.add(Convolution(levels * colors, b.height, b.width, b.image, (Tap(0, 0),), weight))


def _next(b: Builder, choose: random.Random, there: list[Operand]) -> Operand:
    x = choose.choice(there)
    activation = choose.choice([name for name in ACTIVATIONS if name != "exp"])
    kind = choose.randrange(9)
    if kind == 0:
        return b.conv(x, choose.randint(1, 24), choose.sample(UP_TO, choose.randint(1, 5)), bias=choose.random() < 0.5)
    if kind == 1:
        same = [other for other in there if other.channels == x.channels]
        terms = [x, *choose.choices(same, k=choose.randint(0, 2)), b.conv(x, x.channels, choose.sample(UP_TO, 3))]
        scales = tuple(choose.choice([1.0, 0.5, -2.0]) for _ in terms)
        return b.sum(*terms, scales=scales, offset=choose.choice([0.0, 0.5]), activation=activation)
    if kind == 2:
        shift = choose.choice([(0, 0), (-1, 0), (0, -1), (-1, 1), (-2, -1)])
        return b.product(b.part(x, x.channels, 0, *shift), x, activation, choose.choice(list(ACTIVATIONS)[:6]))
    if kind == 3:
        other = choose.choice(there)
        return b.concat(
            b.part(x, x.channels, dy=choose.choice([0, -1])), other, scales=(1.0, -0.5), activation=activation
        )
    if kind == 4:
        return b.norm(x, affine=choose.random() < 0.5)
    if kind == 5:
        start = choose.randrange(x.channels)
        return b.sum(b.part(x, x.channels - start, start), activation=activation)
    if kind == 6:
        constant = b.constant(x.channels, 1, choose.choice([1, b.height]), choose.choice([1, b.width]))
        return b.sum(x, b.part(constant, x.channels, dy=choose.choice([0, -1])))
    if kind == 7:
        query, key, value = (b.conv(x, size, [(0, 0)]) for size in (4, 4, 6))
        return b.attention(query, key, value, heads=choose.choice([1, 2]), strict=choose.random() < 0.5)
    size = ((b.height + 1) // 2, (b.width + 1) // 2)
    down = b.sum(
        b.conv(x, 5, choose.sample([(-1, -1), (-1, 0), (0, -1), (0, 0)], 3), size=size, stride=2), activation=activation
    )
    phases = [Tap(0, 0, (y, x)) for y in (0, 1) for x in (0, 1)]
    return b.conv(down, 7, [*phases, Tap(-1, 0, (1, 0))], size=(b.height, b.width), upscale=2)
