"""A twin of a scheduler, on which a call is tried: which attributes it reads, and how it leaves them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_WATCH = "_fastgen_watch"


class _Watch(NamedTuple):
    read: dict[str, None]  # in order
    written: set[str]
    of_class: frozenset[str]  # what is found on the class and not among the attributes


class Twin:
    """What comes of a call on a twin.

    Args:
        scheduler: stays as it is, and is what the twin is copied from.
        hidden: an attribute that the twin does not have.
        copied: makes the twin's value of an attribute, given its value and name; lists are to be new ones.
        forced: attributes of the twin alone.
    """

    def __init__(
        self,
        scheduler: Any,
        hidden: str,
        copied: Callable[[Any, str], Any],
        forced: dict[str, Any] | None = None,
    ) -> None:
        self.before = {name: copied(value, name) for name, value in vars(scheduler).items() if name != hidden}
        self._elements = {name: list(value) for name, value in self.before.items() if type(value) is list}
        of: Any = type(scheduler)
        cls = _watched(of)
        self._forced = forced or {}
        self._watch = _Watch({}, set(), _names_of(cls).difference(self.before))
        self.self: Any = object.__new__(cls)
        self.attributes: dict[str, Any] = object.__getattribute__(self.self, "__dict__")
        self.attributes.update(self.before, **self._forced, **{_WATCH: self._watch})

    def reads(self) -> tuple[str, ...]:
        """The attributes whose values the call has asked for, before it set them; also those that there are not."""
        return tuple(name for name in self._watch.read if name not in self._forced)

    def changes(self) -> Iterator[tuple[str, Any, bool]]:
        """(name, value, whether it is the list that was there, with other elements) of the attributes that the call has set."""
        for name, value in self.attributes.items():
            if name == _WATCH or name in self._forced:
                continue
            if name in self._watch.written or name not in self.before or value is not self.before[name]:
                yield name, value, False
            elif name in self._elements:
                old = self._elements[name]
                if len(old) != len(value) or any(a is not b for a, b in zip(old, value, strict=True)):
                    yield name, value, True

    def loses(self) -> bool:
        """Whether an attribute is gone."""
        return not self.before.keys() <= self.attributes.keys()


@functools.cache
def _watched(cls: type) -> type:
    class Watched(cls):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            attributes = object.__getattribute__(self, "__dict__")
            _, _, of_class = watch = attributes[_WATCH]
            if name not in of_class and name not in watch.written:
                watch.read[name] = None
                if name not in attributes:  # diffusers then looks in the configuration
                    watch.read["_internal_dict"] = None
            return object.__getattribute__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            object.__getattribute__(self, "__dict__")[_WATCH].written.add(name)
            super().__setattr__(name, value)

    Watched.__name__, Watched.__qualname__ = cls.__name__, cls.__qualname__
    return Watched


@functools.cache
def _names_of(cls: type) -> frozenset[str]:
    return frozenset(dir(cls))
