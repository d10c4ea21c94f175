"""Every pass leaves the values as they are, on networks of any nodes, and makes of what people write what it says."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.autoregressive import simplify as passes
from fastgen.autoregressive._cropping import cropped
from fastgen.autoregressive.capture import capture
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

from . import models

SIZE = (4, 5)
KINDS = ("sum", "sum", "copy", "scaled", "active", "product", "concat", "conv", "conv", "constant", "norm", "attention")
ALL = {**{one.__name__: one for one in passes.PASSES}, "cropped": cropped, "simplify": passes.simplify}


class Maker:
    """Random networks: nodes of every kind and of several sizes, read with any shift."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.nodes = [Input(2, *SIZE)]

    def numbers(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def pick(self, channels=None, shifts=(0, 0, 0, -1, 1, 2)):
        r = self.random
        fitting = [i for i, node in enumerate(self.nodes) if channels is None or node.channels >= channels]
        i = r.choice(fitting[-5:])
        count = channels or r.randint(1, self.nodes[i].channels)
        start = r.choice([0, self.nodes[i].channels - count])
        return Operand(i, count, start, r.choice(shifts), r.choice(shifts))

    def size(self):
        return (SIZE[0] + self.random.choice((0, 0, 0, 1, -1)), SIZE[1] + self.random.choice((0, 0, 0, 2)))

    def add(self):
        r, size = self.random, self.size()
        kind = r.choice(KINDS)
        name = r.choice(list(ACTIVATIONS)[:6])
        if kind == "constant":
            shape = (1, 2, *r.choice([(1, 1), size, (1, size[1])]))
            return Constant(2, *size, value=self.numbers(*shape))
        if kind == "conv":
            operand = self.pick(shifts=(0,))
            u, s = r.choice([(1, 1), (1, 1), (2, 1), (1, 2)])
            taps = {Tap(r.randint(-2, 2), r.randint(-2, 2), (r.randrange(u), r.randrange(u))) for _ in range(3)}
            weight = self.numbers(2, len(taps), operand.channels)
            return Convolution(
                2, *size, operand=operand, taps=tuple(taps), weight=weight, bias=self.numbers(2), stride=s, upscale=u
            )
        if kind == "concat":
            parts = [self.pick() for _ in range(r.randint(1, 3))]
            return Concat(
                sum(part.channels for part in parts), *size, parts=tuple(parts), activation=r.choice(["none", "none", name]),
                scales=tuple(r.choice([1.0, 1.0, -1.0]) for _ in parts),
            )  # fmt: skip
        first = self.pick()
        if kind == "norm":
            return LayerNorm(first.channels, *size, operand=first, weight=None, bias=self.numbers(first.channels))
        if kind == "attention":
            others = [self.pick(first.channels) for _ in range(2)]
            return Attention(first.channels, *SIZE, query=first, key=others[0], value=others[1], scale=0.5, strict=True)
        if kind == "product":
            gate, other = r.choice(["none", "sigmoid"]), self.pick(first.channels)
            return Product(first.channels, *size, a=first, b=other, activation=r.choice(["none", "tanh"]), gate=gate)
        if kind == "sum":
            terms = (first, *(self.pick(first.channels) for _ in range(r.randint(0, 2))))
            scales = tuple(r.choice([1.0, 1.0, -0.5, 0.0]) for _ in terms)
            return Sum(
                first.channels,
                *size,
                terms=terms,
                scales=scales,
                offset=r.choice([0.0, 0.7]),
                activation=r.choice(["none", name]),
            )
        activation, scale = name if kind == "active" else "none", 2.0 if kind == "scaled" else 1.0
        return Sum(first.channels, *size, terms=(first,), scales=(scale,), activation=activation)

    def network(self, count):
        for _ in range(count):
            self.nodes.append(self.add())
        last = len(self.nodes) - 1
        return Network(
            tuple(self.nodes), Operand(last, self.nodes[last].channels, 0, self.random.choice((0, 0, -1, 1)))
        )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(sorted(ALL)))
def test_a_pass_leaves_the_values_as_they_are(seed, count, name):
    network = Maker(seed).network(count)
    image = torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected, result = network.evaluate(image), ALL[name](network).evaluate(image)
    scale = float(expected.abs().max().clamp_min(1e-3))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11 * scale, equal_nan=True)


def chain(*nodes):
    """A network of nodes that read the one before, over an image of two channels."""
    made = [Input(2, *SIZE)]
    for make in nodes:
        made.append(make(Operand(len(made) - 1, made[-1].channels)))
    return Network(tuple(made), Operand(len(made) - 1, made[-1].channels))


def total(scale=1.0, offset=0.0, activation="none", **read):
    return lambda x: Sum(
        x.channels, *SIZE, terms=(Operand(x.node, x.channels, **read),), scales=(scale,), offset=offset, activation=activation
    )  # fmt: skip


def convolution(x):
    taps = (Tap(-1, 0), Tap(0, 0))
    weight = torch.arange(2.0 * 2 * x.channels).reshape(2, 2, x.channels) + 1
    return Convolution(2, *SIZE, operand=x, taps=taps, weight=weight, bias=torch.ones(2))


def kinds(network):
    return [type(node).__name__ for node in passes.simplify(network).nodes[1:]]


def test_scales_and_shifts_are_one_sum():
    network = passes.simplify(chain(total(2.0), total(1.0, -1.0), total(0.5), total(1.0, 0.0, "relu")))
    (node,) = network.nodes[1:]
    assert (node.scales, node.offset, node.activation) == ((1.0,), -0.5, "relu")


def test_what_lies_outside_is_zero_and_not_the_offset():
    """relu(x + 1) read from one row above is 0 there: the shift stays apart."""
    assert kinds(chain(total(1.0, 1.0), total(dy=-1))) == ["Sum", "Sum"]
    assert kinds(chain(total(1.0, 1.0), total(2.0, dy=-1))) == ["Sum", "Sum"]
    assert kinds(chain(total(1.0, 1.0), total(2.0))) == ["Sum"]


def test_scales_of_a_convolution_are_in_its_weights():
    def normalized(x):
        return Product(2, *SIZE, a=x, b=Operand(x.node + 1, 2))

    image, conv = Input(2, *SIZE), convolution(Operand(0, 2))
    factor = Constant(2, *SIZE, value=torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1))
    product = Product(2, *SIZE, a=Operand(1, 2), b=Operand(2, 2))
    shifted = Sum(2, *SIZE, terms=(Operand(3, 2), Operand(2, 2)), scales=(1.0, 0.5), offset=1.0)
    network = passes.simplify(Network((image, conv, factor, product, shifted), Operand(4, 2)))
    (node,) = network.nodes[1:]
    assert node.weight.tolist() == (conv.weight * torch.tensor([2.0, 3.0])[:, None, None]).tolist()
    assert node.bias.tolist() == [1 * 2 + 1 + 1, 1 * 3 + 1 + 1.5]


def test_gates_and_concat_elu():
    network = capture(models.Down(), (1, 3, 4, 4)).network
    concats = [node for node in network.nodes if isinstance(node, Concat) and node.activation == "elu"]
    assert len(concats) == 9 and all(node.scales == (1.0, -1.0) for node in concats)
    products = [node for node in network.nodes if isinstance(node, Product)]
    assert len(products) == 3 and all((node.activation, node.gate) == ("none", "sigmoid") for node in products)
    network = capture(models.Gated(), (1, 1, 4, 4)).network
    assert {(node.activation, node.gate) for node in network.nodes if isinstance(node, Product)} == {
        ("tanh", "sigmoid")
    }


def test_equal_nodes_are_one_and_unread_ones_are_none():
    nodes = (Input(2, *SIZE), *(convolution(Operand(0, 2)) for _ in range(3)))
    both = Product(2, *SIZE, a=Operand(1, 2), b=Operand(2, 2), activation="tanh")
    network = passes.simplify(Network((*nodes, both), Operand(4, 2)))
    assert [type(node).__name__ for node in network.nodes[1:]] == ["Convolution", "Product"]
    other = Convolution(2, *SIZE, operand=Operand(0, 2), taps=nodes[1].taps, weight=nodes[1].weight + 1)
    network = passes.simplify(Network((nodes[0], nodes[1], other, nodes[1], both), Operand(4, 2)))
    assert len(network.nodes) == 4


def test_what_is_computed_of_constants_is_one():
    value = torch.randn(1, 2, *SIZE)
    nodes = (
        Input(2, *SIZE),
        Constant(2, *SIZE, value=value),
        convolution(Operand(1, 2)),
        total(2.0, 0.0, "tanh")(Operand(2, 2)),
    )
    end = Sum(2, *SIZE, terms=(Operand(0, 2), Operand(3, 2)), scales=(1.0, 1.0))
    before = Network((*nodes, end), Operand(4, 2))
    assert kinds(before) == ["Constant", "Sum"]
    table = Embedding(6, *SIZE, operand=Operand(1, 2), table=torch.randn(4, 3))
    assert kinds(Network((nodes[0], nodes[1], table), Operand(2, 6))) == ["Constant"]


@pytest.mark.parametrize("model", [models.Gated(), models.PixelCNN()])
def test_nodes_are_as_large_as_what_is_read(model):
    network = capture(model, (1, 1, 6, 7)).network
    assert all(node.height in (5, 6) and node.width == 7 for node in network.nodes)


def test_layers_keep_their_names():
    network = capture(models.Gated(), (1, 1, 6, 7)).network
    names = {node.layer for node in network.nodes if isinstance(node, Convolution)}
    assert {"head", "layers.1.down", "layers.0.across"} <= names
