"""`FusedScheduler`: a scheduler of diffusers whose steps are one kernel each.

A call of a scheduler, with certain arguments and certain values of the attributes that it reads, is a `Move`: worked out the first
time in a process by diffusers' own code, and then repeated by every scheduler. What is no move is diffusers' own call.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import KERNEL_DTYPES, needs_grad
from ...ops._watchers import transforms_active
from ...ops.philox_normal import check_seeds
from .content import fresh, key_of
from .follow import follow
from .move import Move, Unfit
from .session import HIDDEN, MEMORY, Session
from .symbolic import NotLinear
from .twin import Twin

_is_compiling = torch.compiler.is_compiling


class FusedScheduler:
    """Mixed into a scheduler class of diffusers by :func:`fastgen.samplers.diffusers.stand_in`.

    ``set_timesteps``, ``scale_model_input`` and ``step`` do and return what the parent's do; all else is the parent's own. ``step``
    takes ``seeds`` too, [N] integers, one a sample: then the kernel draws the noise, and an image depends on its seed alone.

    A call goes to the parent where gradients are wanted, under ``torch.compile``, for tensors of several shapes, and where the
    parent does to its tensors what a row of a coefficient table does not hold. :attr:`fallbacks` counts these calls.
    """

    parent: type

    @property
    def fallbacks(self) -> dict[str, int]:
        """How many calls went to diffusers' own code, by reason."""
        return dict(Session.of(self).fallbacks)

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != HIDDEN}
        if type(self) is not stand_in(self.parent):
            return _empty, (type(self),), state
        return _made_again, (self.parent,), state


def _empty(cls: Any) -> Any:
    return cls.__new__(cls)


def _made_again(parent: type) -> Any:
    return _empty(stand_in(parent))


@functools.cache
def stand_in(parent: type) -> Any:
    """The stand-in for a scheduler class of diffusers: a subclass that calls itself as its parent, so that what is saved with it
    needs no fastgen to be loaded.

    Raises:
        TypeError: its ``step`` does not begin with the arguments (model_output, timestep, sample).
    """
    theirs: Any = parent
    arguments = list(inspect.signature(theirs.step).parameters) if hasattr(theirs, "step") else []
    if arguments[1:4] != ["model_output", "timestep", "sample"]:
        raise TypeError(f"no stand-in for {parent.__name__}: its step takes {arguments[1:]}")
    doc = f"diffusers' class of this name with fused steps, see `FusedScheduler`.\n\n{parent.__doc__ or ''}"
    members = {"parent": parent, "step": _stepping(theirs.step), "__module__": parent.__module__, "__doc__": doc}
    if hasattr(theirs, "set_timesteps"):
        members["set_timesteps"] = _setting(theirs.set_timesteps)
    scale = getattr(theirs, "scale_model_input", None)
    if scale is not None and scale.__code__.co_names:  # else it can only return its argument
        members["scale_model_input"] = _scaling(scale)
    return type(parent.__name__, (FusedScheduler, parent), members)


# ---- the calls ----------------------------------------------------------------------------------------------------------------


def _stepping(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`step` of a stand-in, given the parent's."""
    signature = inspect.signature(theirs)
    names = list(signature.parameters)[4:]

    @functools.wraps(theirs)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            if len(args) > len(names) or kwargs.keys() & names[: len(args)]:
                return theirs(self, model_output, timestep, sample, *args, **kwargs)  # a TypeError
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return _call(self, theirs, sample, model_output, timestep, kwargs, kwargs.pop("seeds", None))

    seeds = inspect.Parameter("seeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    step.__signature__ = signature.replace(parameters=[*parameters, seeds, *rest])  # type: ignore[attr-defined]
    return step


def _scaling(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`scale_model_input` of a stand-in, given the parent's."""

    @functools.wraps(theirs)
    def scale_model_input(self: Any, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return theirs(self, sample, timestep, *args, **kwargs)
        return _call(self, theirs, sample, None, timestep, {}, None)

    return scale_model_input


def _call(
    self: Any,
    theirs: Callable[..., Any],
    sample: Tensor,
    model: Tensor | None,
    timestep: Any,
    options: dict[str, Any],
    seeds: Any,
) -> Any:
    """The move of a call; the parent's call where it is none."""
    arguments = (sample, timestep) if model is None else (model, timestep, sample)
    if _is_compiling():
        return _by_parent(self, theirs, arguments, options, seeds, "torch.compile")
    attributes = self.__dict__
    session = attributes.get(HIDDEN) or Session.of(self)
    try:
        state = session.state_of(self)
        call = theirs, _time(self, timestep), _kinds(sample, model), _given(options, sample)
        edge = state.moves.get(call)
        if edge is None:
            edge = state.remember(call, _move(self, session, call, sample, model, timestep, options))
        move, target = edge
        if type(move) is str:
            raise NotLinear(move)
        if seeds is not None:
            seeds = _checked(seeds, sample)
        result = move.run(attributes, session.pool, sample, model, options, options.get("generator"), seeds)
    except (NotLinear, Unfit) as reason:
        session.fallbacks[str(reason)] += 1
        return _by_parent(self, theirs, arguments, options, seeds, str(reason))
    if move.sets:
        session.leave(attributes, target, schedule=False)
        if target is None:
            edge[1] = session.state_of(self)
    return result


def _by_parent(
    self: Any, theirs: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], seeds: Any, reason: str
) -> Any:
    if seeds is not None:
        raise ValueError(f"seeds= is for fused steps, and this one is diffusers' own: {reason}")
    return theirs(self, *arguments, **options)


def _move(
    self: Any, session: Session, call: Any, sample: Tensor, model: Tensor | None, timestep: Any, options: dict[str, Any]
) -> Move | str:
    """What a call does, from memory or worked out now; or why it is no move."""
    theirs, time, kinds, given = call
    key = type(self), theirs, time, _of_any_size(*kinds), given
    made: Move | str | None = MEMORY.find(key, self, session)
    if made is not None:
        return made

    drawn = torch.get_rng_state()  # from which the parent's own call will draw, where this comes to nothing
    try:
        if (generator := options.get("generator")) is not None:
            first = generator[0] if isinstance(generator, Sequence) else generator
            options = {**options, "generator": first.clone_state()}
        made, names = follow(self, theirs, HIDDEN, sample, model, timestep, options)
    except Exception as error:  # whatever it is, the parent's own call will say it again, or do without
        return str(error) if isinstance(error, NotLinear) else f"{type(error).__name__}: {error}"
    finally:
        torch.set_rng_state(drawn)
    MEMORY.keep(key, names, session.key(self, names), made)
    return made


def _time(self: Any, timestep: Any) -> Any:
    """A timestep as a key; that of a view into the schedule of another device is its place, so that nobody waits for the value."""
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, Hashable):
            raise NotLinear(f"a timestep that is a {type(timestep).__name__}")
        return type(timestep), timestep
    if timestep.dim() != 0:
        raise NotLinear("a timestep for each sample")
    if timestep.is_cpu:
        return timestep.dtype, timestep.item()
    mine = self.timesteps
    if timestep.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr():
        return "place", timestep.storage_offset() - mine.storage_offset()
    return timestep.dtype, timestep.device, timestep.item()


def _kinds(sample: Tensor, model: Tensor | None) -> tuple[Any, ...]:
    """What the tensors of a call are, as a key; `_of_any_size` says what a move depends on of it.

    Raises:
        NotLinear: gradients or a transform are to see the call.
    """
    if type(sample) is not Tensor or (model is not None and type(model) is not Tensor):
        raise NotLinear("a subclass of Tensor, or no tensor")
    if (sample.requires_grad or (model is not None and model.requires_grad)) and torch.is_grad_enabled():
        raise NotLinear("gradients")
    if transforms_active():
        raise NotLinear("a transform of torch.func")
    if model is None:
        return sample.shape, sample.dtype, sample.device
    return sample.shape, sample.dtype, sample.device, model.shape, model.dtype, model.device


def _of_any_size(shape: torch.Size, *others: Any) -> tuple[Any, ...]:
    """`_kinds` without the number of samples and their size.

    Raises:
        NotLinear: the kernel does not take the tensors.
    """
    if len(shape) < 2 or 0 in shape or others[0] not in KERNEL_DTYPES:
        raise NotLinear(f"a sample of shape {tuple(shape)} and {others[0]}")
    kinds = len(shape), shape[1], *others[:2]
    if len(others) == 2:
        return kinds
    model_shape, dtype, device = others[2:]
    if dtype not in KERNEL_DTYPES or device != others[1]:
        raise NotLinear(f"a model's output of {dtype} on {device}")
    if model_shape != shape and model_shape != (shape[0], 2 * shape[1], *shape[2:]):
        raise NotLinear("a model's output of another shape than the sample")
    return *kinds, dtype, model_shape == shape


def _given(options: dict[str, Any], sample: Tensor) -> Any:
    """The further arguments of a step as a key; tensors among them are operands, generators are not part of it."""
    if not options:
        return ()
    key: list[Any] = []
    for name, value in options.items():
        if name == "return_dict":
            key.append(value)
        elif name == "generator":
            key.append((name, value is not None))
        elif isinstance(value, Tensor):
            if value.shape != sample.shape or value.device != sample.device or needs_grad(value):
                raise NotLinear(f"{name} of another shape or device than the sample, or with gradients")
            key.append((name, value.dtype))
        elif isinstance(value, Hashable):
            key.append((name, type(value), value))
        else:
            raise NotLinear(f"{name} is a {type(value).__name__}")
    return tuple(key)


def _checked(seeds: Tensor | Sequence[int], sample: Tensor) -> Tensor:
    seeds = check_seeds("step", seeds, sample.device).to(sample.device)
    if len(seeds) != len(sample):
        raise ValueError(f"seeds must be one a sample ({len(sample)}), got {len(seeds)}")
    return seeds


def _setting(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`set_timesteps` of a stand-in, given the parent's: the same schedule is worked out once."""

    @functools.wraps(theirs)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if _is_compiling():
            return theirs(self, *args, **kwargs)
        session = Session.of(self)
        try:
            state = session.state_of(self)
            call = theirs, key_of("argument", args), key_of("argument", kwargs)
            edge = state.moves.get(call)
            if edge is None:
                edge = state.remember(call, _schedule(self, session, call, args, kwargs))
        except (NotLinear, TypeError):
            return theirs(self, *args, **kwargs)
        changes, target = edge
        attributes = vars(self)
        for name, value in changes.items():
            attributes[name] = fresh(value)
        session.leave(attributes, target)
        if target is None:
            edge[1] = session.state_of(self)
        return None

    return set_timesteps


def _schedule(self: Any, session: Session, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `set_timesteps` changes."""
    made: dict[str, Any] | None = MEMORY.find((type(self), call), self, session)
    if made is None:
        twin = Twin(self, HIDDEN, lambda value, name: list(value) if type(value) is list else value)
        call[0](twin.self, *args, **kwargs)
        if twin.loses():
            raise NotLinear("an attribute is gone")
        names = twin.reads()
        made = {name: fresh(value) for name, value, _ in twin.changes()}
        key_of("an attribute", made)
        MEMORY.keep((type(self), call), names, session.key(self, names), made)
    return made
