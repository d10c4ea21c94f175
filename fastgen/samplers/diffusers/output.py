"""What a fused step returns: diffusers' own output, or tuple, whose further values are worked out when they are asked for."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor


class Later:
    """A value that is worked out once, when somebody asks."""

    __slots__ = ("_function", "_value")

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._function: Callable[[], Tensor] | None = function
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._function is not None:
            self._value, self._function = self._function(), None
        return self._value  # type: ignore[return-value]


class LazyTuple(tuple[Any, ...]):
    """A tuple of values, some of which are `Later`."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return map(_now, super().__iter__())

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return tuple(map(_now, found)) if isinstance(index, slice) else _now(found)

    def __add__(self, other: Any) -> Any:
        return tuple(self) + other

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)


torch.utils._pytree.register_pytree_node(
    LazyTuple, lambda values: (list(values), None), lambda values, _: tuple(values)
)


def _now(value: Any) -> Any:
    return value() if isinstance(value, Later) else value


@functools.cache
def lazy(output_class: type) -> type:
    """A subclass of one of diffusers' outputs; it takes its fields by name, and a field may be `Later`."""

    class LazyOutput(output_class):  # type: ignore[misc, valid-type]
        def __init__(self, **fields: Any) -> None:
            for name, value in fields.items():
                OrderedDict.__setitem__(self, name, value)
            self.__dict__.update(fields)

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if type(value) is Later:
                value = value()
                self[name] = value
            return value

        def __getitem__(self, key: Any) -> Any:
            return getattr(self, key) if isinstance(key, str) and key in self.keys() else super().__getitem__(key)

        def values(self) -> Any:
            return [self[name] for name in self.keys()]

        def items(self) -> Any:
            return [(name, self[name]) for name in self.keys()]

        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self.keys() else default

        def __reduce__(self) -> Any:
            return _plain, (output_class, dict(self.items()))

    LazyOutput.__name__, LazyOutput.__qualname__ = output_class.__name__, output_class.__qualname__
    LazyOutput.__module__ = output_class.__module__
    return LazyOutput


def _plain(output_class: Any, fields: dict[str, Any]) -> Any:
    return output_class(**fields)
