"""Two images that a forward makes one of, `torch.cat([h, skip], dim=1)`, handed to the block behind it as they lie.

The forward of a stage on the way up stays the project's own code; where it says `torch.cat` it gets a :class:`Pair`, of which the
residual block behind it, a stand-in, reads both. Whatever else is done to a pair is done to the one image that it stands for.
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn.conv2d import reads_both
from ..ops._watchers import watched
from .fusing import is_norm
from .stand_in import StandIn, bare

OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul", "neg", "getitem", "setitem", "len", "iter",
)  # fmt: skip


class Pair:
    """``input`` [N, C, H, W] and ``skip`` [N, C', H, W], whose channels come after those; as good as the tensor of both."""

    def __init__(self, input: Tensor, skip: Tensor) -> None:
        self.input, self.skip = input, skip

    @functools.cached_property
    def together(self) -> Tensor:
        return torch.cat([self.input, self.skip], dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.together, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Pair, lambda pair: pair.together, (args, kwargs or {}))
        return function(*args, **kwargs)


def _of_tensor(name: str) -> Callable[..., Any]:
    return lambda pair, *args: getattr(pair.together, name)(*args)


for _name in (f"__{name}__" for name in OPERATORS):
    setattr(Pair, _name, _of_tensor(_name))


class _Torch(types.ModuleType):
    """torch, as it is now, whose `cat` makes pairs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def cat(tensors: Any, dim: int = 0, **others: Any) -> Any:
        found = tensors if isinstance(tensors, (list, tuple)) and dim == 1 and not others else ()
        return Pair(*found) if len(found) == 2 and alike(*found) else torch.cat(tensors, dim, **others)


def alike(input: Any, skip: Any) -> bool:
    """Whether these are two images that differ in their channels at most."""
    return (
        type(input) is type(skip) is Tensor
        and input.dim() == skip.dim() == 4
        and input.shape[0] == skip.shape[0]
        and input.shape[2:] == skip.shape[2:]
        and input.dtype is skip.dtype
        and input.device == skip.device
    )


def cats(function: Any) -> bool:
    """Whether a function is one without decorators that says `torch.cat`, torch under whatever name."""
    known = type(function) is types.FunctionType and not hasattr(function, "__wrapped__")
    return known and "cat" in function.__code__.co_names and bool(_names_of_torch(function))


@functools.cache
def with_pairs(function: Any) -> Any:
    """A project's own ``function``, of which :func:`cats` is true, with pairs where it says `torch.cat`."""
    names = dict.fromkeys(_names_of_torch(function), _Torch("torch", "torch, whose cat makes pairs"))
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    made = types.FunctionType(code, {**function.__globals__, **names}, function.__name__, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _names_of_torch(function: Any) -> list[str]:
    return [name for name in function.__code__.co_names if function.__globals__.get(name) is torch]


def take_pairs(blocks: Iterable[Any], mixin: type[StandIn]) -> bool:
    """Whether all ``blocks`` stand in by ``mixin``, which knows pairs, and nobody looks at their calls, compiles or may ask for
    gradients."""
    if torch.is_grad_enabled() or watched():
        return False
    blocks = tuple(blocks)
    return all(isinstance(block, mixin) for block in blocks) and bare(blocks)


def parted(input: Any, norm: Any, shortcut: Any) -> tuple[Tensor, Tensor | None]:
    """What a residual block was given: both of a pair where its ``norm`` and its ``shortcut`` read them as they lie, else one."""
    if type(input) is not Pair:
        return input, None
    if (
        is_norm(norm)
        and isinstance(shortcut, nn.Module)
        and bare((shortcut,))
        and reads_both(shortcut, input.input, input.skip)
    ):
        return input.input, input.skip
    return input.together, None


def whole(input: Any) -> Any:
    """The one image of a pair, for code that knows none."""
    return input.together if type(input) is Pair else input
