"""What every tensor of a running module stands for: nothing where it does not depend on the image, a value, or why there is none.

Operations in place and views are followed: what is written to a tensor is in what it is a view of, and in the other views of that.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _arithmetic, _attention, _convolution, _layout, _own_ops  # noqa: F401  (their rules are entered)
from ._attention import TAKES_SCORES, Scores
from ._builder import Builder
from ._rules import RULES
from ._values import NotPlannable, Value


class Refusal(NamedTuple):
    """Instead of a value; whoever computes with it is refused for the same reason."""

    reason: str


class View(NamedTuple):
    """``tensor`` is the output of that number of the operation ``name``, a view of the first of ``args``."""

    tensor: Tensor
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


# What is made in the image's likeness and holds none of its numbers.
OF_SHAPE_ALONE = frozenset(
    f"aten.{name}"
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)

# What takes long: nobody asks for its numbers, its shape is the value's.
NOT_COMPUTED = frozenset(
    (*(f"aten.{name}" for name in ("convolution", "mm", "addmm", "bmm", "baddbmm", "_softmax")),
     *(f"fastgen.{name}_fwd" for name in ("masked_conv2d", "gated_activation", "concat_elu")))
)  # fmt: skip


def depends(x: Any) -> bool:
    return isinstance(x, Value | Scores | Refusal) or (isinstance(x, list) and any(map(depends, x)))


def flat(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list):
            yield from flat(item)
        else:
            yield item


class Recorder(TorchDispatchMode):
    """Runs every operation as it is, and has the rules of lowering make nodes of those on the image."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.builder = builder
        self.known: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no id is given twice
        self.origins: dict[int, View] = {}
        self.views: dict[int, list[View]] = {}
        self.ranges: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: a module that is compiled is captured uncompiled, and importing torch._dynamo takes seconds."""
        return False

    def enter(self, tensor: Tensor, value: Any) -> None:
        self.kept.append(tensor)
        if value is None:
            self.known.pop(id(tensor), None)
        else:
            self.known[id(tensor)] = value

    def stands_for(self, x: Any) -> Any:
        """A value or a refusal for a tensor that depends on the image, in lists too; else ``x`` itself."""
        if isinstance(x, list | tuple):
            return [self.stands_for(item) for item in x]
        return self.known.get(id(x), x) if isinstance(x, Tensor) else x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._overloadpacket._qualified_op_name.replace("::", ".")
        written = written_by(func, args, kwargs)
        given, named = (
            [self.stands_for(arg) for arg in args],
            {key: self.stands_for(arg) for key, arg in kwargs.items()},
        )
        random = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name
        of_image = name not in OF_SHAPE_ALONE and any(map(depends, (*given, *named.values()))) and not random
        if of_image and written is not None and args and written is args[0] and not depends(given[0]):
            given[0] = written.clone()  # as it was before
        if of_image and written is None and name in NOT_COMPUTED:
            (value,) = self.lower(name, given, named, None)
            if not isinstance(value, Refusal):
                like = next(arg for arg in args if isinstance(arg, Tensor))
                result = like.new_zeros(value.shape)
                self.enter(result, value)
                return result
        results = func(*args, **kwargs)
        outputs = list(results) if isinstance(results, list | tuple) else [results]
        if of_image:
            named.pop("out", None)
            values = self.lower(name.rstrip("_") if written is not None else name, given, named, outputs)
            self.forbid_numbers(name, args, outputs)
        elif random:
            values = [self.refusal("draws random numbers")] * len(outputs)
        else:
            values = [None] * len(outputs)
        if written is not None:
            self.write(written, values[0])
            return results
        for output, value in zip(outputs, values, strict=False):
            if isinstance(output, Tensor):
                self.enter(output, value)
        if args and isinstance(args[0], Tensor) and is_view(func):
            for i, output in enumerate(outputs):
                view = View(output, name, args, kwargs, i)
                self.origins[id(output)] = view
                self.views.setdefault(id(args[0]), []).append(view)
                self.kept.append(output)
        return results

    def forbid_numbers(self, name: str, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuses what leaves the image's numbers to Python, but for the check of a range that one_hot makes."""
        if name == "aten.aminmax":
            self.ranges |= set(map(id, outputs))
        elif not any(isinstance(output, Tensor) for output in outputs) and id(args[0]) not in self.ranges:
            reason = "reads numbers of the image in Python, and what it computes may depend on them"
            raise NotPlannable(self.refusal(reason).reason)

    def lower(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Any] | None) -> list[Any]:
        """What stands for the results of an operation, the one of an operation that was not computed."""
        outputs = [None] if outputs is None else outputs
        if all(isinstance(output, Tensor) and output.numel() == 0 for output in outputs):
            return [None] * len(outputs)  # of the image's numbers there are none in it
        for argument in flat((*args, *kwargs.values())):
            if isinstance(argument, Refusal):
                return [argument] * len(outputs)
        try:
            if name in ("aten.copy", "aten.fill", "aten.zero"):
                return [overwritten(args[0], args[1] if len(args) > 1 else 0.0)]
            if name not in TAKES_SCORES and any(isinstance(arg, Scores) for arg in args):
                raise NotPlannable(f"the scores or weights of an attention go into {name}")
            if name not in RULES:
                raise NotPlannable(f"{name} is no operation that is known here")
            made = RULES[name](self.builder, *args, **kwargs)
        except NotPlannable as error:
            return [self.refusal(str(error))] * len(outputs)
        values = list(made) if isinstance(made, list | tuple) else [made]
        for output, value in zip(outputs, values, strict=False):
            if value is not None and output is not None and value.shape != tuple(output.shape):
                return [self.refusal(f"{name} makes {list(output.shape)}, understood as {list(value.shape)}")] * len(
                    outputs
                )
        return values

    def refusal(self, reason: str) -> Refusal:
        return Refusal(f"{self.builder.layer}: {reason}" if self.builder.layer else reason)

    def write(self, tensor: Tensor, value: Any) -> None:
        """Another value in the place of a tensor's."""
        self.enter(tensor, value)
        while id(tensor) in self.origins:
            origin = self.origins[id(tensor)]
            tensor, part = origin.args[0], self.stands_for(tensor)
            old = self.stands_for(tensor)
            if depends(old) or depends(part):
                self.enter(tensor, self.replaced(old, part, origin))
        self.refresh(tensor)

    def refresh(self, base: Tensor) -> None:
        """The views of a tensor that was written to, seen again."""
        value = self.stands_for(base)
        for view in self.views.get(id(base), []):
            if depends(value):
                outputs = [view.tensor] * (view.output + 1)
                self.enter(
                    view.tensor, self.lower(view.name, [value, *view.args[1:]], view.kwargs, outputs)[view.output]
                )
            else:
                self.enter(view.tensor, None)
            self.refresh(view.tensor)

    def replaced(self, old: Any, part: Any, view: View) -> Any:
        """``old`` with ``part`` in the place of a view of it."""
        for x in (old, part):
            if isinstance(x, Refusal):
                return x
        try:
            return put(self.builder, old, part, view)
        except NotPlannable as error:
            return self.refusal(str(error))


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an operation writes to."""
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    if first is not None and first.is_write and args:
        return args[0]
    return kwargs.get("out")


def is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def overwritten(target: Any, source: Any) -> Any:
    """What a tensor is that ``source`` was written over."""
    if not isinstance(source, Value):
        return None  # no longer of the image
    return source if source.shape == tuple(target.shape) else source.expand(target.shape)


def put(b: Builder, old: Any, part: Any, view: View) -> Any:
    """:meth:`Recorder.replaced`: the inverse of a view, or what lies before and behind it put together with it."""
    name = view.name.removeprefix("aten.")
    rank, shape, rest = view.args[0].dim(), tuple(view.args[0].shape), view.args[1:]

    def call(rule: str, x: Any, *args: Any) -> Any:
        return RULES[f"aten.{rule}"](b, x, *args) if isinstance(x, Value) else getattr(x, rule)(*args)

    if name in ("detach", "alias", "lift_fresh"):
        return part if isinstance(part, Value) else None
    if name in ("view", "unsqueeze", "squeeze"):
        return call("view", part, shape) if isinstance(part, Value) else None
    if name in ("transpose", "t", "permute"):
        order = list(range(rank))
        if name == "permute":
            order = [d % rank for d in rest[0]]
        else:
            first, second = rest if rest else (0, 1)
            order[first], order[second] = order[second], order[first]
        return call("permute", part, [order.index(d) for d in range(rank)]) if isinstance(part, Value) else None
    dim = {"slice": 0, "select": 0, "unbind": 0, "split": 1, "split_with_sizes": 1}.get(name)
    if dim is None or (name == "slice" and len(rest) > 3 and rest[3] != 1):
        raise NotPlannable(f"writes to {name} of a tensor that depends on the image")
    axis = (rest[dim] if len(rest) > dim else view.kwargs.get("dim", 0)) % rank
    start = {
        "slice": lambda: slice(*rest[1:3]).indices(shape[axis])[0],
        "select": lambda: rest[1] % shape[axis],
        "unbind": lambda: view.output,
        "split": lambda: view.output * rest[0],
        "split_with_sizes": lambda: sum(rest[0][: view.output]),
    }[name]()
    if name in ("select", "unbind"):
        part = call("unsqueeze", part, axis)
    stop = start + part.shape[axis]
    parts = [(old, 0, start), (part, 0, part.shape[axis]), (old, stop, shape[axis])]
    kept = [slice_of(b, x, axis, i, j) for x, i, j in parts if i < j]
    return RULES["aten.cat"](b, kept, axis) if any(isinstance(x, Value) for x in kept) else None


def slice_of(b: Builder, x: Any, dim: int, start: int, stop: int) -> Any:
    return RULES["aten.slice"](b, x, dim, start, stop) if isinstance(x, Value) else x.narrow(dim, start, stop - start)
