"""Attention over all earlier positions: products of queries with keys and what becomes of them up to the product with values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._arithmetic import contract, scalar
from ._builder import Builder
from ._rules import RULES, Rule, rule
from ._values import Axes, Axis, NotPlannable, Value, axis, channels_of, is_channels, merged, size_of, viewed
from .network import Attention

NEVER = -1e4  # what is added to a score, or put in its place, so that it has no weight


@dataclass(frozen=True)
class Scores:
    """Of every query (Q) with every key (K), head by head; weights after the softmax."""

    query: Value
    key: Value
    axes: Axes
    scale: float = 1.0
    mask: str = "none"  # or "causal", "strict"
    filled: float = -math.inf  # what stands where the mask hides a score
    weights: bool = False
    zeroed: bool = False  # the weights of what the mask hides are 0 in a row that it hides throughout, too

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(size_of, self.axes))

    def view(self, shape: Sequence[int]) -> "Scores":
        return replace(self, axes=viewed(self.axes, shape))

    def permute(self, order: Sequence[int]) -> "Scores":
        axes = tuple(self.axes[d] for d in order)
        if [a for d in axes for a in d if a[0] == "C"] != [a for d in self.axes for a in d if a[0] == "C"]:
            raise NotPlannable("the heads of an attention change places")
        return replace(self, axes=axes)

    def expand(self, shape: Sequence[int]) -> "Scores":
        if tuple(size for size in shape if size != -1) != self.shape[: len(shape)]:
            raise NotPlannable("attention that is repeated")
        return self


# What may happen to scores and weights between the two products.
TAKES_SCORES = frozenset(
    f"aten.{name}"
    for name in (
        "add", "alias", "baddbmm", "bmm", "clone", "contiguous", "detach", "div", "dropout", "expand", "masked_fill", "matmul",
        "mul", "nan_to_num", "permute", "_safe_softmax", "_softmax", "squeeze", "t", "_to_copy", "transpose", "unsqueeze",
        "_unsafe_view", "view", "where",
    )
)  # fmt: skip


def positions(dimension: Axis) -> bool:
    return [kind for kind, _ in dimension] in ([], ["H"], ["W"], ["H", "W"])


def heads_first(dimension: Axis) -> bool:
    return [kind for kind, _ in merged(dimension)] in ([], ["N"], ["C"], ["N", "C"])


@rule("aten.bmm", "aten.matmul")
def _bmm(b: Builder, x: Any, y: Any) -> Any:
    if isinstance(x, Scores) or isinstance(y, Scores):
        return _attend(b, x, y)
    if isinstance(x, Value) and isinstance(y, Value):
        return _scores(x, y)
    matrix = y if isinstance(x, Value) else x
    if not bool((matrix == matrix[:1]).all()):
        raise NotPlannable("matrices that differ along the batch of a product")
    return contract(b, x, 2, matrix[0]) if isinstance(x, Value) else contract(b, y, 1, matrix[0].t())


def _scores(query: Value, key: Value) -> Scores:
    """Of query [.., L, E] and key [.., E, L]."""
    (*batch, rows, inner), (*others, shared, columns) = query.axes, key.axes
    fit = is_channels(inner) and is_channels(shared) and positions(rows) and positions(columns)
    same = [merged(d) for d in batch] == [merged(d) for d in others] and all(map(heads_first, batch))
    if not fit or not same or (query.height, query.width) != (key.height, key.width):
        raise NotPlannable("a product of two tensors that both depend on the image is no attention that is known")
    return Scores(query, key, (*batch, axis("Q", size_of(rows)), axis("K", size_of(columns))))


def _attend(b: Builder, scores: Any, value: Any) -> Value:
    """The weights [.., Q, K] times values [.., K, E]."""
    if not isinstance(scores, Scores) or not isinstance(value, Value) or not scores.weights:
        raise NotPlannable("attention without a softmax, or its weights used for something else than a sum of values")
    (*batch, rows, columns), (*others, shared, inner) = scores.axes, value.axes
    kinds = [[kind for kind, _ in d] for d in (rows, columns)]
    same = [merged(a) for a in batch] == [merged(a) for a in others]
    fit = (is_channels(inner) and positions(shared) and kinds in (["Q"], ["K"])) or kinds in ([["Q"], ["K"]], [[], []])
    if not same or not fit or (value.height, value.width) != (scores.query.height, scores.query.width):
        raise NotPlannable("the weights of an attention are not used for a sum of values at the same positions")
    heads = channels_of(tuple(atom for d in batch for atom in d))
    return attention(b, scores, value, heads)


def attention(b: Builder, scores: Scores, value: Value, heads: int) -> Value:
    if scores.mask == "none":
        raise NotPlannable("attention without a causal mask, so a pixel's value would depend on later pixels")
    if scores.mask == "strict" and not scores.zeroed:
        raise NotPlannable("the first position attends to nothing, and what it is then is not put to 0")
    operands = [b.operand(x) for x in (scores.query, scores.key, value)]
    return b.node(
        Attention, value, query=operands[0], key=operands[1], value=operands[2], heads=heads, scale=scores.scale,
        strict=scores.mask == "strict",
    )  # fmt: skip


def mask_kind(allowed: Tensor) -> str:
    """ "causal" or "strict" of a constant [.., L, L] that is 1 where a query may attend to a key."""
    if allowed.dim() < 2 or allowed.shape[-1] != allowed.shape[-2]:
        raise NotPlannable("an attention mask that is not one of positions with positions")
    plain = allowed.reshape(-1, *allowed.shape[-2:])
    for kind, diagonal in (("causal", 0), ("strict", -1)):
        if bool((plain == torch.ones_like(plain[0]).tril(diagonal)).all()):
            return kind
    if bool(plain.all()):
        return "none"
    raise NotPlannable("an attention mask that is not the lower triangle of positions in raster order")


def hide(scores: Scores, allowed: Tensor, filled: float) -> Scores:
    """A mask over scores, or over weights, where it puts to 0 what is so already."""
    kind = mask_kind(allowed)
    if kind == "none":
        return scores
    if scores.weights:
        if filled != 0 or kind != scores.mask:
            raise NotPlannable("the weights of an attention are changed after the softmax")
        return replace(scores, zeroed=True)
    if filled > NEVER or scores.mask not in ("none", kind):
        raise NotPlannable(f"a score that the mask hides becomes {filled}, which is not small enough to have no weight")
    return replace(scores, mask=kind, filled=filled)


@rule("aten._softmax", "aten.softmax")
def _softmax(b: Builder, x: Any, dim: int, *_: Any) -> Scores:
    if not isinstance(x, Scores) or x.weights:
        raise NotPlannable("a softmax of what are no scores of an attention")
    if dim % len(x.axes) != len(x.axes) - 1 or [kind for kind, _ in x.axes[-1]] not in ([], ["K"]):
        raise NotPlannable("a softmax of attention scores over something else than the keys")
    return replace(x, weights=True, zeroed=x.mask == "causal")


@rule("aten._safe_softmax")
def _safe_softmax(b: Builder, x: Any, dim: int, *_: Any) -> Scores:
    result = _softmax(b, x, dim)
    return replace(result, zeroed=result.zeroed or x.filled == -math.inf)


def on_scores(name: str) -> Any:
    """A rule of what happens to scores; anything else goes to the rule that is there."""
    general = RULES[name]

    def enter(function: Rule) -> Rule:
        def chosen(b: Builder, *args: Any, **keywords: Any) -> Any:
            if not any(isinstance(arg, Scores) for arg in args):
                return general(b, *args, **keywords)
            if any(isinstance(arg, Value) for arg in args) or sum(isinstance(arg, Scores) for arg in args) > 1:
                raise NotPlannable("attention scores are combined with what depends on the image")
            return function(b, *args, **keywords)

        RULES[name] = chosen
        return function

    return enter


@on_scores("aten.mul")
def _mul(b: Builder, x: Any, y: Any) -> Scores:
    x, y = (x, y) if isinstance(x, Scores) else (y, x)
    factor = scalar(y)
    if factor is not None and not x.weights and x.mask == "none":
        return replace(x, scale=x.scale * factor)
    if factor is not None or not x.weights or not bool(((y == 0) | (y == 1)).all()):
        raise NotPlannable("attention scores or weights are multiplied by something else than a scale or a mask")
    if (
        x.mask == "strict"
        and y.shape[-1:] == (1,)
        and y.dim() > 1
        and all(y[..., i, 0].eq(i > 0).all() for i in range(y.shape[-2]))
    ):
        return replace(x, zeroed=True)  # the row of the first position alone
    return hide(x, y != 0, 0.0)


@on_scores("aten.div")
def _div(b: Builder, x: Any, y: Any, **_: Any) -> Scores:
    divisor = scalar(y)
    if divisor is None or not isinstance(x, Scores):
        raise NotPlannable("attention scores are divided by something else than a number")
    return _mul(b, x, 1 / divisor)


@on_scores("aten.add")
def _add(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Scores:
    x, y = (x, alpha * y) if isinstance(x, Scores) else (replace(y, scale=alpha * y.scale), x)
    hidden = y.min() if isinstance(y, Tensor) and y.dim() >= 2 else None
    if x.weights or hidden is None or not bool(((y == 0) | (y == hidden)).all()):
        raise NotPlannable("something else than a mask of zeros and minus infinities is added to attention scores")
    return hide(x, y == 0, float(hidden))


@on_scores("aten.masked_fill")
def _masked_fill(b: Builder, x: Scores, mask: Tensor, value: Any) -> Scores:
    return hide(x, mask == 0, float(value))


@on_scores("aten.where")
def _where(b: Builder, chosen: Any, x: Any, y: Any) -> Scores:
    x, mask, other = (x, chosen, y) if isinstance(x, Scores) else (y, ~chosen, x)
    if scalar(other) is None:
        raise NotPlannable("attention scores are replaced by something else than a number")
    return hide(x, mask, scalar(other) or 0.0)


@rule("aten.nan_to_num")
def _nan_to_num(b: Builder, x: Any, nan: float | None = 0.0, *_: Any) -> Scores:
    if not isinstance(x, Scores) or not x.weights or nan not in (0.0, None):
        raise NotPlannable("nan_to_num of something else than the weights of an attention")
    return replace(x, zeroed=x.zeroed or x.filled == -math.inf)


@rule("aten.baddbmm")
def _baddbmm(b: Builder, mask: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return RULES["aten.add"](b, RULES["aten.mul"](b, _bmm(b, x, y), alpha), mask, alpha=beta)


def scaled_dot_product(b: Builder, q: Value, k: Value, v: Value, mask: Any, causal: bool, scale: float | None) -> Value:
    """Of [.., L, E] each; a position that attends to nothing becomes 0."""
    if not all(isinstance(x, Value) for x in (q, k, v)):
        raise NotPlannable("attention to what does not depend on the image")
    if isinstance(mask, Value):
        raise NotPlannable("an attention mask that depends on the image")
    scores = _scores(q, k.permute([*range(len(k.axes) - 2), len(k.axes) - 1, len(k.axes) - 2]))
    scores = replace(scores, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = hide(scores, mask, -math.inf) if mask.dtype == torch.bool else RULES["aten.add"](b, scores, mask)
    if causal:
        scores = replace(scores, mask="causal")
    return _attend(b, replace(scores, weights=True, zeroed=True), v)


@rule("aten._scaled_dot_product_flash_attention_for_cpu")
def _flash_for_cpu(
    b: Builder, q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None, scale: Any = None
) -> tuple[Value, None]:  # fmt: skip
    return scaled_dot_product(b, q, k, v, attn_mask, is_causal, scale), None


@rule("aten._scaled_dot_product_flash_attention")
def _flash(
    b: Builder, q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, debug: bool = False, *, scale: Any = None
) -> list[Any]:  # fmt: skip
    return [scaled_dot_product(b, q, k, v, None, is_causal, scale)] + [None] * 8


@rule("aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention")
def _efficient(
    b: Builder, q: Any, k: Any, v: Any, bias: Any, statistics: bool, dropout: float = 0.0, is_causal: bool = False,
    *_: Any, scale: Any = None,
) -> list[Any]:  # fmt: skip
    return [scaled_dot_product(b, q, k, v, bias, is_causal, scale)] + [None] * 8


@rule("fastgen.attention", "fastgen.attention_fwd")
def _fastgen(b: Builder, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float) -> Any:
    return scaled_dot_product(b, q, k, v, mask, is_causal, scale)
