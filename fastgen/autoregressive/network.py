"""What an image-autoregressive network is made of, whichever project wrote it: nodes over [N, C, H, W], in an order of computation.

`capture` makes a :class:`Network` of a module, `schedule` makes of a network what the kernel follows pixel by pixel. Here a node is
what it means for a whole image, and :meth:`Network.evaluate` says so in plain torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": F.relu,
    "elu": F.elu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "exp": torch.exp,
}

Values = Sequence[Tensor] | Mapping[int, Tensor]  # of nodes, by their number


@dataclass(frozen=True)
class Operand:
    """What a node reads of another: value[n, c, y, x] = source[n, start + c, y + dy, x + dx], 0 outside of the source."""

    node: int
    channels: int
    start: int = 0
    dy: int = 0
    dx: int = 0

    def of(self, values: Values, height: int, width: int) -> Tensor:
        """What a node of ``height`` x ``width`` reads."""
        source = values[self.node][:, self.start : self.start + self.channels]
        same = (self.dy, self.dx, height, width) == (0, 0, source.shape[2], source.shape[3])
        return source if same else shifted(source, self.dy, self.dx, height, width)


@dataclass(frozen=True)
class Node:
    """A value [N, channels, height, width], computed by the module of the name ``layer``."""

    channels: int
    height: int
    width: int
    layer: str = field(default="", compare=False, kw_only=True)

    @property
    def operands(self) -> tuple[Operand, ...]:
        return ()


@dataclass(frozen=True)
class Input(Node):
    """The image, one number a color channel, as :func:`fastgen.autoregressive.sample` writes it."""


@dataclass(frozen=True)
class Constant(Node):
    """What does not depend on the image: ``value`` [1 or N, C, 1 or H, 1 or W], broadcast."""

    value: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]


@dataclass(frozen=True)
class Tap:
    """A weight of a convolution: it reads ``dy`` rows below and ``dx`` columns right of where the output lies in the source.

    Of a convolution that makes the image larger (``upscale`` u), a tap is there for the outputs alone with (y % u, x % u) =
    ``phase``, and the output lies at (y // u, x // u) of the source; of one with a stride s at (s y, s x).
    """

    dy: int
    dx: int
    phase: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Convolution(Node):
    """bias[o] + sum over taps t and channels i of weight[o, t, i] source[n, i, stride y + dy_t, stride x + dx_t].

    Only taps with a weight that is not zero throughout are there; groups are zeros in ``weight``.
    """

    operand: Operand = None  # type: ignore[assignment]
    taps: tuple[Tap, ...] = ()
    weight: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # [O, taps, I]
    bias: Tensor | None = field(default=None, repr=False, compare=False)  # [O]
    stride: int = 1
    upscale: int = 1

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class Sum(Node):
    """activation(sum_k scale_k operand_k + offset)."""

    terms: tuple[Operand, ...] = ()
    scales: tuple[float, ...] = ()
    offset: float = 0.0
    activation: str = "none"

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.terms


@dataclass(frozen=True)
class Product(Node):
    """activation(a) * gate(b): `activation` tanh and `gate` sigmoid make the gated activation of Gated PixelCNN."""

    a: Operand = None  # type: ignore[assignment]
    b: Operand = None  # type: ignore[assignment]
    activation: str = "none"
    gate: str = "none"

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Concat(Node):
    """Operands one after the other along the channels, scaled, then through ``activation``: elu of (x, -x) is concat_elu."""

    parts: tuple[Operand, ...] = ()
    scales: tuple[float, ...] = ()
    activation: str = "none"

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.parts


@dataclass(frozen=True)
class LayerNorm(Node):
    """torch.nn.functional.layer_norm over the channels of a position."""

    operand: Operand = None  # type: ignore[assignment]
    weight: Tensor | None = field(default=None, repr=False, compare=False)
    bias: Tensor | None = field(default=None, repr=False, compare=False)
    eps: float = 1e-5

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class Attention(Node):
    """softmax(scale q k^T) v over the positions before (``strict``) or up to the query's own in raster order, head by head.

    Channels of q, k and v are heads x E, those of one head together; 0 where there is no position to attend to.
    """

    query: Operand = None  # type: ignore[assignment]
    key: Operand = None  # type: ignore[assignment]
    value: Operand = None  # type: ignore[assignment]
    heads: int = 1
    scale: float = 1.0
    strict: bool = False

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.query, self.key, self.value)


@dataclass(frozen=True)
class Embedding(Node):
    """table[k] for the number k that the operand holds (rounded to the nearest level), channel after channel: [N, C E, H, W]."""

    operand: Operand = None  # type: ignore[assignment]
    table: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # [K, E]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class Network:
    """Nodes in an order of computation: each reads those before it. ``nodes[0]`` is the :class:`Input`; ``output`` the logits."""

    nodes: tuple[Node, ...]
    output: Operand

    def evaluate(self, image: Tensor) -> Tensor:
        """The logits [N, channels, H, W] of an image [N, C, H, W], in its dtype."""
        return self.output.of(self.values(image), image.shape[2], image.shape[3])

    def values(self, image: Tensor) -> list[Tensor]:
        """The value of every node."""
        values: list[Tensor] = []
        for node in self.nodes:
            value = value_of(node, image, values)
            values.append(value.expand(len(image), node.channels, node.height, node.width))
        return values


def shifted(source: Tensor, dy: int, dx: int, height: int, width: int, stride: int = 1) -> Tensor:
    """result[..., y, x] = source[..., stride y + dy, stride x + dx] for ``height`` x ``width`` of them, 0 outside of the source."""
    after_y = max(stride * (height - 1) + dy + 1 - source.shape[2], 0)
    after_x = max(stride * (width - 1) + dx + 1 - source.shape[3], 0)
    padded = F.pad(source, (max(-dx, 0), after_x, max(-dy, 0), after_y))[:, :, max(dy, 0) :, max(dx, 0) :]
    return padded[:, :, ::stride, ::stride][:, :, :height, :width]


def value_of(node: Node, image: Tensor, values: Values) -> Tensor:
    """A node's value given those it reads."""

    def cast(parameter: Tensor | None) -> Any:
        return None if parameter is None else parameter.to(image)

    def read(operand: Operand) -> Tensor:
        return operand.of(values, node.height, node.width)

    if isinstance(node, Input):
        return image
    if isinstance(node, Constant):
        return cast(node.value)
    if isinstance(node, Convolution):
        return _convolution(node, _source(node.operand, values), cast(node.weight), cast(node.bias))
    if isinstance(node, Sum):
        total = sum((scale * read(term) for term, scale in zip(node.terms, node.scales, strict=True)), node.offset)
        return ACTIVATIONS[node.activation](total)
    if isinstance(node, Product):
        return ACTIVATIONS[node.activation](read(node.a)) * ACTIVATIONS[node.gate](read(node.b))
    if isinstance(node, Concat):
        parts = [scale * read(part) for part, scale in zip(node.parts, node.scales, strict=True)]
        return ACTIVATIONS[node.activation](torch.cat(parts, 1))
    if isinstance(node, LayerNorm):
        last = read(node.operand).movedim(1, -1)
        return F.layer_norm(last, last.shape[-1:], cast(node.weight), cast(node.bias), node.eps).movedim(-1, 1)
    if isinstance(node, Attention):
        return _attention(node, *(read(operand) for operand in node.operands))
    assert isinstance(node, Embedding), type(node)
    levels = read(node.operand).round().clamp(0, len(node.table) - 1).long()
    return cast(node.table)[levels].movedim(-1, 2).flatten(1, 2)


def _source(operand: Operand, values: Values) -> Tensor:
    """All of what a convolution reads from, as large as its source."""
    return operand.of(values, *values[operand.node].shape[2:])


def _convolution(node: Convolution, source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    u = node.upscale
    total = source.new_zeros(len(source), node.channels, node.height, node.width)
    for t, tap in enumerate(node.taps):
        (py, px), product = tap.phase, weight[:, t]
        part = total[:, :, py::u, px::u]
        read = shifted(source, tap.dy, tap.dx, part.shape[2], part.shape[3], node.stride)
        part += torch.einsum("oi,nihw->nohw", product, read)
    return total if bias is None else total + bias[:, None, None]


def _attention(node: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    split = (t.unflatten(1, (node.heads, -1)).flatten(3) for t in (query, key, value))
    q, k, v = (t.transpose(2, 3) for t in split)  # [N, heads, L, E]
    length = q.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril(-1 if node.strict else 0)
    weights = (node.scale * q @ k.transpose(2, 3)).masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(2, 3).reshape(len(query), node.channels, node.height, node.width)
