"""Rules of arithmetic: element by element, per channel, and products with constant matrices along the channels."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._builder import Builder, block_diagonal
from ._layout import dims_of, split, squeeze
from ._rules import RULES, Rule, rule
from ._values import NotPlannable, Value, axis, broadcast, is_channels, joined
from .network import Embedding, LayerNorm, Product, Tap

# Elementwise -----------------------------------------------------------------------------------------------------------------


def together(b: Builder, first: Any, second: Any) -> tuple[Value, Value]:
    """Two values, of which one may be a constant, broadcast to one another."""
    axes = broadcast(*(x.axes if isinstance(x, Value) else ((),) * x.dim() for x in (first, second)))
    for x in (first, second):
        if isinstance(x, Tensor):  # a constant may have channels of its own
            shape = (1,) * (len(axes) - x.dim()) + tuple(x.shape)
            axes = tuple(d or axis("C", size) for d, size in zip(axes, shape, strict=True))
    like = next(x for x in (first, second) if isinstance(x, Value)).like(axes)
    first, second = (x.like(axes) if isinstance(x, Value) else b.constant(x, like) for x in (first, second))
    return first, second


def scalar(x: Any) -> float | None:
    """The number that a constant is throughout, if it is one."""
    if isinstance(x, Tensor):
        return float(x) if x.numel() == 1 else None
    return float(x) if isinstance(x, int | float) else None


@rule("aten.add")
def add(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Value:
    for value, other, factor, scale in ((x, y, 1.0, alpha), (y, x, alpha, 1.0)):
        number = scalar(other)
        if number is not None:
            return b.sum(value, [(value, factor)], scale * number)
    x, y = together(b, x, y)
    return b.sum(x, [(x, 1.0), (y, alpha)])


@rule("aten.sub")
def _sub(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Value:
    return add(b, x, y, alpha=-alpha)


@rule("aten.rsub")
def _rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Value:
    return add(b, y, x, alpha=-alpha)


@rule("aten.neg")
def negative(b: Builder, x: Value) -> Value:
    return b.sum(x, [(x, -1.0)])


@rule("aten.mul")
def _mul(b: Builder, x: Any, y: Any) -> Value:
    if not isinstance(x, Value):
        x, y = y, x
    factor = scalar(y)
    if factor is not None:
        return b.sum(x, [(x, factor)])
    x, y = together(b, x, y)
    return b.node(Product, x, a=b.operand(x), b=b.operand(y))


@rule("aten.div")
def _div(b: Builder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None or isinstance(y, Value):
        raise NotPlannable(
            "division by what depends on the image" if rounding_mode is None else "division with rounding"
        )
    divisor = scalar(y)
    return _mul(b, x, 1 / y if divisor is None else 1 / divisor)


@rule("aten.square")
def _square(b: Builder, x: Value) -> Value:
    return _mul(b, x, x)


@rule("aten.pow")
def _pow(b: Builder, x: Value, exponent: Any) -> Value:
    if exponent != 2:
        raise NotPlannable(f"a power of {exponent}")
    return _mul(b, x, x)


@rule("aten.where")
def _where(b: Builder, chosen: Any, x: Any, y: Any) -> Value:
    if isinstance(chosen, Value):
        raise NotPlannable("a choice that depends on the image")
    mask = chosen.to(torch.get_default_dtype())
    parts = [(x, mask), (y, 1 - mask)]
    return add(
        b, *(_mul(b, p, m) if isinstance(p, Value) else torch.where(m != 0, p, torch.zeros(())) for p, m in parts)
    )


@rule("aten.masked_fill")
def _masked_fill(b: Builder, x: Value, mask: Any, value: Any) -> Value:
    return _where(b, ~mask if isinstance(mask, Tensor) else mask, x, torch.as_tensor(value))


def _activation(name: str) -> Rule:
    return lambda b, x: b.sum(x, [(x, 1.0)], activation=name)


for _name in ("relu", "tanh", "sigmoid", "silu", "exp"):
    RULES[f"aten.{_name}"] = _activation(_name)


@rule("aten.elu")
def _elu(b: Builder, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    """scale (relu(x) + alpha elu(input_scale min(x, 0)))."""
    if (alpha, scale, input_scale) == (1, 1, 1):
        return b.sum(x, [(x, 1.0)], activation="elu")
    positive, negative = b.sum(x, [(x, 1.0)], activation="relu"), b.sum(x, [(x, -1.0)], activation="relu")
    tail = b.sum(x, [(negative, -input_scale)], activation="elu")
    return b.sum(x, [(positive, scale), (tail, scale * alpha)])


@rule("aten.celu")
def _celu(b: Builder, x: Value, alpha: float = 1) -> Value:
    return _elu(b, x, alpha, 1, 1 / alpha)


@rule("aten.abs")
def _abs(b: Builder, x: Value) -> Value:
    return b.sum(x, [(b.sum(x, [(x, sign)], activation="relu"), 1.0) for sign in (1.0, -1.0)])


@rule("aten._prelu_kernel", "aten.prelu")
def _prelu(b: Builder, x: Value, slope: Tensor) -> Value:
    return add(b, _mul(b, x, slope), _mul(b, b.sum(x, [(x, 1.0)], activation="relu"), 1 - slope))


@rule("aten.leaky_relu")
def _leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    if slope == 0.01:
        return b.sum(x, [(x, 1.0)], activation="leaky_relu")
    positive = b.sum(x, [(x, 1.0)], activation="relu")
    return b.sum(x, [(x, slope), (positive, 1 - slope)])


@rule("aten.clamp")
def _clamp(b: Builder, x: Value, min: float | None = None, max: float | None = None) -> Value:
    """min + relu(x - min), and max - relu(max - x) of that."""
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise NotPlannable("a clamp between tensors")
    if min is not None:
        x = b.sum(x, [(b.sum(x, [(x, 1.0)], -min, "relu"), 1.0)], min)
    if max is not None:
        x = b.sum(x, [(b.sum(x, [(x, -1.0)], max, "relu"), -1.0)], max)
    return x


@rule("aten.hardtanh")
def _hardtanh(b: Builder, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    return _clamp(b, x, min_val, max_val)


@rule("aten.clamp_min")
def _clamp_min(b: Builder, x: Value, min: float) -> Value:
    return _clamp(b, x, min)


@rule("aten.clamp_max")
def _clamp_max(b: Builder, x: Value, max: float) -> Value:
    return _clamp(b, x, None, max)


@rule("aten.softplus")
def _softplus(b: Builder, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    if (beta, threshold) != (1, 20):
        raise NotPlannable(f"a softplus of beta {beta} and threshold {threshold}; only 1 and 20 are known")
    return b.sum(x, [(x, 1.0)], activation="softplus")


@rule("aten.gelu")
def _gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    return b.sum(x, [(x, 1.0)], activation="gelu" if approximate == "none" else "gelu_tanh")


@rule("aten.mish")
def _mish(b: Builder, x: Value) -> Value:
    soft = b.sum(x, [(x, 1.0)], activation="softplus")
    return b.node(Product, x, a=b.operand(x), b=b.operand(soft), gate="tanh")


@rule("aten.glu")
def _glu(b: Builder, x: Value, dim: int = -1) -> Value:
    first, second = split(b, x, x.shape[dim] // 2, dim)
    return b.node(Product, first, a=b.operand(first), b=b.operand(second), gate="sigmoid")


# Normalisation and embedding -------------------------------------------------------------------------------------------------


@rule("aten.native_batch_norm", "aten.cudnn_batch_norm", "aten._native_batch_norm_legit", "aten.miopen_batch_norm")
def _batch_norm(
    b: Builder, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[Value, None, None]:
    if training or mean is None:
        raise NotPlannable(
            "its statistics are those of the whole image, so a pixel's value would depend on later pixels"
        )
    scale = (variance.double() + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (-1,) + (1,) * (len(x.axes) - 2)
    return add(b, _mul(b, x, scale.reshape(shape)), shift.reshape(shape)), None, None


@rule("aten.native_layer_norm")
def _layer_norm(
    b: Builder, x: Value, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Value, None, None]:
    last = len(x.axes) - len(shape)
    if not all(map(is_channels, x.axes[last:])):
        raise NotPlannable("LayerNorm averages over positions too, so a pixel's value would depend on later pixels")
    size = math.prod(shape)
    weight, bias = (None if t is None else t.flatten().clone() for t in (weight, bias))
    groups = []
    for start in range(0, len(x.channels), size):
        group = replace(x, channels=x.channels[start : start + size], axes=(axis("C", size),))
        groups.append(b.node(LayerNorm, group, operand=b.operand(group), weight=weight, bias=bias, eps=eps))
    return replace(joined(groups, 0), axes=x.axes), None, None


@rule("aten.embedding")
def _embedding(b: Builder, table: Any, x: Any, *_: Any) -> Value:
    if not isinstance(x, Value) or isinstance(table, Value):
        raise NotPlannable("a table that depends on the image")
    size = table.shape[1]
    made = b.add(
        Embedding, len(x.channels) * size, x.height, x.width, operand=b.operand(x), table=table.detach().clone()
    )
    return b.value(made, (*x.axes, axis("C", size)))


@rule("aten.scatter")
def _scatter(b: Builder, x: Any, dim: int, index: Any, source: Any, **_: Any) -> Value:
    """One-hot: ones written at the levels into zeros."""
    zeros = isinstance(x, Tensor) and not bool(x.any())
    if not zeros or not isinstance(index, Value) or index.shape[dim] != 1 or scalar(source) != 1:
        raise NotPlannable("writes to where the image says")
    levels = _embedding(b, torch.eye(x.shape[dim]), squeeze(b, index, dim))
    order = list(range(len(levels.axes) - 1))
    order.insert(dim % (len(order) + 1), len(order))
    return levels.permute(order)


# Products with constant matrices ---------------------------------------------------------------------------------------------


def contract(b: Builder, x: Value, dim: int, matrix: Tensor, bias: Tensor | None = None) -> Value:
    """sum_k x[..., k, ...] matrix[k, o] + bias[o] along a dimension of channels: a 1x1 convolution."""
    if not is_channels(x.axes[dim]):
        raise NotPlannable("a matrix mixes positions, so a pixel's value would depend on later pixels")
    rank = len(x.axes)
    order = [d for d in range(rank) if d != dim] + [dim]
    last = x.permute(order)
    outer = len(x.channels) // matrix.shape[0]
    made = b.convolution(
        last, {Tap(0, 0): block_diagonal(matrix.t(), outer)}, None if bias is None else bias.repeat(outer),
        (x.height, x.width), 1, 1,
    )  # fmt: skip
    result = b.value(made, (*last.axes[:-1], axis("C", matrix.shape[1])))
    return result.permute([order.index(d) for d in range(rank)])


@rule("aten.mm")
def _mm(b: Builder, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        raise NotPlannable("a product of two matrices that both depend on the image is no attention that is known")
    return contract(b, x, 1, y) if isinstance(x, Value) else contract(b, y, 0, x.t())


@rule("aten.addmm")
def _addmm(b: Builder, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    if isinstance(bias, Tensor) and bias.dim() == 1 and isinstance(x, Value) and isinstance(y, Tensor):
        return contract(b, x, 1, alpha * y, beta * bias)
    return add(b, _mul(b, _mm(b, x, y), alpha), bias, alpha=beta)


@rule("aten.sum")
def _sum(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    for dim in dims_of(x, dims):
        x = contract(b, x, dim, torch.ones(x.shape[dim], 1))
    return x if keepdim else squeeze(b, x, dims_of(x, dims))


@rule("aten.mean")
def _mean(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    for dim in dims_of(x, dims):
        x = contract(b, x, dim, torch.full((x.shape[dim], 1), 1 / x.shape[dim], dtype=torch.float64))
    return x if keepdim else squeeze(b, x, dims_of(x, dims))
