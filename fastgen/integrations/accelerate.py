"""`accelerate` and `restore`: stand-ins put in the place of a model's modules, and taken back."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from .generic import Conv2d
from .scheduler import accelerate_scheduler, restore_scheduler
from .stand_in import mixin_of, put, take_back
from .walk import modules, parts, stand_in_for

Model = TypeVar("Model")
Chosen = str | type | Sequence[str | type] | None


def accelerate(model: Model, *, exact: bool = False, include: Chosen = None, exclude: Chosen = None) -> Model:
    """Make a model or a pipeline faster in place, with the same results.

    Modules that fastgen knows get a subclass of their own class: `isinstance`, parameters, hooks, state dict, copies and pickles
    stay what they were, and what a fused call does not cover is the module's own code. A pipeline's scheduler gets fused steps in
    the same way. Calling it again changes nothing; modules that were added since are taken too.

    >>> fastgen.accelerate(pipe)
    >>> print(fastgen.report(pipe))
    >>> fastgen.restore(pipe)

    Args:
        model: a `torch.nn.Module`, or a pipeline with ``components`` such as those of diffusers.
        exact: leave convolutions to torch where fastgen's algorithms (Winograd's) round more than it does; see
            :func:`fastgen.ops.conv2d` for the bound. What is fused around them rounds no more than torch.
        include: names of modules, with ``*`` and ``?`` as in file names, or classes: these alone and what is in them.
        exclude: the same: these not, nor what is in them.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is neither; ``include`` or ``exclude`` holds something else.
    """
    wanted, unwanted = _choice("include", include), _choice("exclude", exclude)
    found = {name: module for name, module in modules(model)}
    for name, module in found.items():
        above = [name[:end] for end, letter in enumerate(name) if letter == "."]
        line = [(n, found[n]) for n in ("", *above, name) if n in found]
        if (wanted and not any(_matches(*of, wanted) for of in line)) or any(_matches(*of, unwanted) for of in line):
            continue
        mixin, _ = stand_in_for(module)
        if exact and mixin is Conv2d:
            if mixin_of(module) is Conv2d:
                take_back(module)
        elif mixin is not None and mixin_of(module) is None:
            put(mixin, module)
    for name, part in parts(model):
        if (not wanted or _matches(name, part, wanted)) and not _matches(name, part, unwanted):
            accelerate_scheduler(part)
    return model


def restore(model: Model) -> Model:
    """Take back what :func:`accelerate` did: every module and scheduler has its own class again, and gives the bits it gave before.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline with ``components``.
    """
    for _, module in modules(model):
        if mixin_of(module) is not None:
            take_back(module)
    for _, part in parts(model):
        restore_scheduler(part)
    return model


def _choice(name: str, chosen: Chosen) -> tuple[str | type, ...]:
    found = (chosen,) if isinstance(chosen, (str, type)) else tuple(chosen or ())
    for one in found:
        if not isinstance(one, (str, type)):
            raise TypeError(f"{name} must hold names of modules and classes, got {one!r}")
    return found


def _matches(name: str, part: Any, chosen: tuple[str | type, ...]) -> bool:
    return any(fnmatchcase(name, one) if isinstance(one, str) else isinstance(part, one) for one in chosen)
