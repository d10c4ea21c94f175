"""How a foreign module comes to be a stand-in: it is given a subclass of its own class, and its own class back.

A stand-in is a mixin that says which class it goes before and what must be true of a module of that class. The subclass of both
keeps all that it does not fuse: parameters, buffers, hooks, `isinstance`, the state dict, copies and pickles are the module's own.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import nn


class StandIn:
    """The part of a stand-in that is fastgen's, a mixin before the class it stands in for.

    Attributes:
        of: the name of that class.
        project: whose it is, for people.
        does: what is fused, for people.
        method: what is overridden.
        relies_on: other methods that must be the class's own too: they are overridden with it, or what is fused is what they do.
        takes: the names of the arguments that `method` must begin with.
        has: the attributes that a module must have.
        parent_class: the class itself, of a subclass made of both.
        parent_method: there, `method`.

    What a module has under one of these names, but for the last two, it keeps: see `Kept`.
    """

    of: ClassVar[str]
    project: ClassVar[str]
    does: ClassVar[str]
    method: ClassVar[str] = "forward"
    relies_on: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    has: ClassVar[tuple[str, ...]] = ()
    parent_class: ClassVar[type]
    parent_method: ClassVar[str]

    @classmethod
    def concerns(cls, module: Any) -> bool:
        """Whether a module of the right class is worth a word at all."""
        return True

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        """Why this module of the right class, with the right attributes, is nothing for the stand-in."""
        yield from ()

    @classmethod
    def says(cls, module: Any) -> str:
        """What is fused in this module, for people."""
        return cls.does

    @classmethod
    def members(cls, parent: type) -> dict[str, Any]:
        """What a subclass of ``parent`` has besides what the mixin has."""
        return {}

    def theirs(self, *args: Any, **kwargs: Any) -> Any:
        """The method that is overridden, as their class has it."""
        return getattr(self.parent_class, self.parent_method)(self, *args, **kwargs)

    def of_theirs(self, name: str) -> Any:
        """Another of their methods that is overridden, as their class has it."""
        return getattr(self.parent_class, name).__get__(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the mixin and the parent: the subclass of both lies in no module."""
        found: Any = super().__reduce_ex__(max(protocol, 2))  # copyreg.__newobj__, its class and arguments, the state
        _, (_, *args), *state = found
        return _anew, (_mixin(type(self)), self.parent_class, *args), *state


class Kept:
    """A name of the mixin's in the subclass: of a module it is a child, parameter or buffer, as if there were no mixin."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, cls: type) -> Any:
        if module is None:
            return getattr(_mixin(cls), self.name)
        for found in (module._modules, module._parameters, module._buffers):
            if self.name in found:
                return found[self.name]
        return module.__getattr__(self.name)


OURS = (
    "of",
    "project",
    "does",
    "method",
    "relies_on",
    "takes",
    "has",
    "concerns",
    "reasons",
    "says",
    "members",
    "either",
    "affine",
    "fused",
)
_MADE: dict[tuple[type, type], Any] = {}


def subclass(mixin: type[StandIn], parent: type) -> Any:
    """The class of modules of class ``parent`` with what ``mixin`` does otherwise, one for all; it calls itself as its parent."""
    if (mixin, parent) in _MADE:
        return _MADE[mixin, parent]
    names = {name: getattr(parent, name) for name in ("__module__", "__qualname__", "__doc__")}
    kept = {name: inspect.getattr_static(parent, name, Kept(name)) for name in OURS}
    of_parent = {"parent_class": parent, "parent_method": mixin.method}
    made = type(parent.__name__, (mixin, parent), {**names, **kept, **mixin.members(parent), **of_parent})
    return _MADE.setdefault((mixin, parent), made)


def base_of(cls: type, mixin: type[StandIn]) -> type | None:
    """The class that ``mixin`` stands in for, among those that ``cls`` derives from."""
    return next((base for base in cls.__mro__ if base.__name__ == mixin.of and issubclass(base, nn.Module)), None)


def refusals(mixin: type[StandIn], module: nn.Module) -> list[str]:
    """Why ``mixin`` cannot stand in for the class of ``module``; empty where it can. `base_of` has found the class."""
    cls, name = type(module), mixin.method
    base = base_of(cls, mixin)
    for each in (name, *mixin.relies_on):
        if getattr(cls, each, None) is not getattr(base, each, None):
            return [f"{each} overridden by {cls.__qualname__}"]
        if each in vars(module):
            return [f"{each} overridden on the module"]
        if not hasattr(base, each):
            return [f"this {mixin.of} has no {each}"]
    arguments = arguments_of(base, name)
    if arguments[: len(mixin.takes)] != mixin.takes:
        return [f"{name} takes ({', '.join(arguments)}) where ({', '.join(mixin.takes)}) is known"]
    if missing := [attribute for attribute in mixin.has if not hasattr(module, attribute)]:
        return [f"it has no {' and no '.join(missing)}"]
    return unfit(mixin, module)


def resembles(mixin: type[StandIn], module: nn.Module) -> bool:
    """Whether a module may be of the class that ``mixin`` means, in some version, and not of another one of that name."""
    arguments = arguments_of(base_of(type(module), mixin), mixin.method)
    return arguments[: len(mixin.takes)] == mixin.takes or all(hasattr(module, name) for name in mixin.has)


def arguments_of(cls: type | None, method: str) -> tuple[str, ...]:
    """The names of what a method takes after ``self``; none where there is no such method."""
    return tuple(inspect.signature(getattr(cls, method)).parameters)[1:] if hasattr(cls, method) else ()


def unfit(mixin: type[StandIn], module: nn.Module) -> list[str]:
    """Why this module cannot be a stand-in, whatever its class is."""
    cls = type(module)
    if "forward" in vars(module):
        return ["forward overridden on the module"]
    if laid_out_after(cls) is not laid_out_after(mixin):
        return ["its class derives from another than nn.Module first"]
    if any(parameter.is_meta for parameter in module.parameters()):
        return ["its parameters are on the meta device"]
    return list(mixin.reasons(module))


def laid_out_after(cls: type) -> type:
    """The last base of ``cls`` in memory whose objects have no ``__dict__``: an object changes its class among those of one."""
    base = cls.__base__
    while base is not None and base.__dictoffset__:
        base = base.__base__
    return base or object


def put(mixin: type[StandIn], module: Any) -> None:
    """Make ``module`` a stand-in."""
    module.__class__ = subclass(mixin, type(module))


def take_back(module: Any) -> None:
    """Give a stand-in its own class back."""
    module.__class__ = module.parent_class


def mixin_of(module: Any) -> type[StandIn] | None:
    """What ``module`` stands in by; None where it is no stand-in."""
    return _mixin(type(module)) if isinstance(module, StandIn) else None


def bare(modules: Iterable[Any]) -> bool:
    """Whether nobody looks at the calls of these modules, which may then be left out: no hooks, no forward of a module's own."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )


def _mixin(cls: type) -> type[StandIn]:
    return cls.__bases__[0]


def _anew(mixin: type[StandIn], parent: type, *args: Any) -> Any:
    cls = subclass(mixin, parent)
    return cls.__new__(cls, *args)
