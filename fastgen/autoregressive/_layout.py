"""Rules of what moves numbers about: views, permutations, slices, concatenation and padding. Most of them make no node."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._builder import Builder, kinds_of
from ._rules import rule
from ._values import NotPlannable, Value, axis, is_channels, joined, merged
from .network import Tap


@rule(
    "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.dropout", "aten.lift",
    "aten.positive", "aten.native_dropout",
)  # fmt: skip
def _same(b: Builder, x: Any, *_: Any, **__: Any) -> Any:
    return x


@rule("aten._to_copy", "aten.to")
def _to_copy(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if dtype is None or not isinstance(x, Value):
        return x
    if dtype == torch.bool:
        raise NotPlannable("a comparison with the image is not computed pixel by pixel")
    return x  # to whole numbers too: an image that is embedded holds whole numbers


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.view_copy")
def _view(b: Builder, x: Any, shape: Sequence[int]) -> Any:
    if isinstance(shape, torch.dtype):
        raise NotPlannable("the bits of the image are read as another dtype")
    known = -math.prod(shape)
    return x.view([math.prod(x.shape) // known if size == -1 else size for size in shape])


@rule("aten.permute")
def _permute(b: Builder, x: Any, order: Sequence[int]) -> Any:
    return x.permute([d % len(x.axes) for d in order])


@rule("aten.transpose")
def _transpose(b: Builder, x: Any, first: int, second: int) -> Any:
    order = list(range(len(x.axes)))
    order[first], order[second] = order[second], order[first]
    return x.permute(order)


@rule("aten.t")
def _t(b: Builder, x: Any) -> Any:
    return x.permute([1, 0]) if len(x.axes) == 2 else x


@rule("aten.unsqueeze")
def _unsqueeze(b: Builder, x: Any, dim: int) -> Any:
    axes = list(x.axes)
    axes.insert(dim % (len(axes) + 1), ())
    return replace(x, axes=tuple(axes))


def dims_of(x: Value, dims: Any) -> list[int]:
    rank = len(x.axes)
    return list(range(rank)) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


@rule("aten.squeeze")
def squeeze(b: Builder, x: Any, dims: int | Sequence[int] | None = None) -> Any:
    chosen = dims_of(x, dims)
    return replace(x, axes=tuple(d for i, d in enumerate(x.axes) if d or i not in chosen))


@rule("aten.expand")
def _expand(b: Builder, x: Any, shape: Sequence[int], **_: Any) -> Any:
    return x.expand(shape)


@rule("aten.repeat")
def _repeat(b: Builder, x: Value, times: Sequence[int]) -> Value:
    x = replace(x, axes=((),) * (len(times) - len(x.axes)) + x.axes)
    for dim, count in enumerate(times):
        if count != 1:
            x = _cat(b, [x] * count, dim)
    return x


@rule("aten.slice")
def _slice(
    b: Builder, x: Value, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Value:
    dim %= len(x.axes)
    kinds = [kind for kind, _ in x.axes[dim]]
    if step == 1 or kinds not in (["H"], ["W"]):
        return x.narrow(dim, slice(start, stop, step))
    cut = x.narrow(dim, slice(start, stop))
    count = -(-cut.shape[dim] // step)
    if cut.height > 1 and cut.width > 1:
        raise NotPlannable("every second row or column alone is taken; a network that is coarser is so in both")
    axes = list(cut.axes)
    axes[dim] = axis(kinds[0], count)
    size = (count, cut.width) if kinds == ["H"] else (cut.height, count)
    made = b.convolution(cut, {Tap(0, 0): torch.eye(len(cut.channels))}, None, size, step, 1)
    return b.value(made, tuple(axes))


@rule("aten.index_select")
def _index_select(b: Builder, x: Value, dim: int, index: Any) -> Value:
    dim %= len(x.axes)
    if isinstance(index, Value) or not is_channels(x.axes[dim]):
        raise NotPlannable("positions are put into another order")
    axes = list(x.axes)
    axes[dim] = axis("C", len(index))
    return x.gather(x.index().index_select(dim, index.cpu()), tuple(axes))


@rule("aten.index")
def _index(b: Builder, x: Value, indices: Sequence[Any]) -> Value:
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or isinstance(given[0][1], Value) or given[0][1].dim() != 1 or given[0][1].dtype == torch.bool:
        raise NotPlannable("an index that is not one list of numbers")
    return _index_select(b, x, *given[0])


@rule("aten.select")
def _select(b: Builder, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    index %= x.shape[dim]
    return squeeze(b, x.narrow(dim, slice(index, index + 1)), dim)


@rule("aten.unbind")
def _unbind(b: Builder, x: Value, dim: int = 0) -> list[Value]:
    return [_select(b, x, dim, i) for i in range(x.shape[dim])]


@rule("aten.split", "aten.split_with_sizes", "aten.unsafe_split")
def split(b: Builder, x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Value]:
    dim %= len(x.axes)
    whole = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


@rule("aten.cat", "aten.concat")
def _cat(b: Builder, parts: Sequence[Any], dim: int = 0) -> Value:
    values = [part for part in parts if isinstance(part, Value)]
    dim %= len(values[0].axes)
    kinds = {kind for value in values for kind, _ in value.axes[dim]} or set(kinds_of(values[0], dim))
    if kinds <= {"C"}:
        return joined(
            [part if isinstance(part, Value) else _constant_part(b, part, values[0], dim) for part in parts], dim
        )
    if kinds - {"H"} and kinds - {"W"}:
        raise NotPlannable("tensors are concatenated along a dimension that is neither channels, rows nor columns")
    before, total, sizes = 0, sum(part.shape[dim] for part in parts), []
    placed, constants = [], []
    for part in parts:
        sizes.append((before, total - before - part.shape[dim]))
        if isinstance(part, Value):
            placed.append(b.pad(part, dim, *sizes[-1]))
        elif bool((part != 0).any()):
            pad = [0, 0] * (part.dim() - 1 - dim) + list(sizes[-1])
            constants.append(F.pad(part.expand(part.shape), pad))
        before += part.shape[dim]
    if any(tuple(map(merged, value.axes)) != tuple(map(merged, placed[0].axes)) for value in placed):
        raise NotPlannable("tensors are concatenated whose positions lie in different orders")
    if len(placed) == 1 and not constants:
        return placed[0]
    placed += [b.constant(constant, placed[0]) for constant in constants]
    return b.sum(placed[0], [(value, 1.0) for value in placed])


def _constant_part(b: Builder, part: Tensor, like: Value, dim: int) -> Value:
    axes = list(like.axes)
    axes[dim] = axis("C", part.shape[dim])
    return b.constant(part, replace(like, axes=tuple(axes)))


@rule("aten.stack")
def _stack(b: Builder, parts: Sequence[Any], dim: int = 0) -> Value:
    dim %= parts[0].dim() + 1 if isinstance(parts[0], Tensor) else len(parts[0].axes) + 1
    return _cat(b, [p.unsqueeze(dim) if isinstance(p, Tensor) else _unsqueeze(b, p, dim) for p in parts], dim)


@rule("aten.constant_pad_nd")
def _pad(b: Builder, x: Value, pad: Sequence[int], value: float = 0.0) -> Value:
    original = x
    for i in range(len(pad) // 2):
        dim, (before, after) = len(x.axes) - 1 - i, pad[2 * i : 2 * i + 2]
        if set(kinds_of(x, dim)) <= {"C"} and (before > 0 or after > 0):
            shape = [1] * len(x.axes)
            zeros = [torch.zeros(*shape[:dim], max(n, 0), *shape[dim + 1 :]) for n in (before, after)]
            x = _cat(b, [zeros[0], b.pad(x, dim, min(before, 0), min(after, 0)), zeros[1]], dim)
        else:
            x = b.pad(x, dim, before, after)
    if value:
        outside = F.pad(torch.zeros(original.shape), list(pad), value=value)
        x = b.sum(x, [(x, 1.0), (b.constant(outside, x), 1.0)])
    return x
