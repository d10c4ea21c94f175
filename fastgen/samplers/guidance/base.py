"""What all guidance is: an object that calls the model, and may give the kernel two outputs to combine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the model, as the host knows it.

    Attributes:
        index: 0 ... total - 1 along the trajectory.
        total: calls of the trajectory.
        alpha, sigma: x = alpha x0 + sigma eps, where x is what the model sees.
        prediction_type: what the model predicts.
    """

    index: int = 0
    total: int = 1
    alpha: float = 1.0
    sigma: float = 1.0
    prediction_type: str = "epsilon"

    @property
    def fraction(self) -> float:
        """How far the trajectory is, from 0 at the noise to 1 at the last call."""
        return self.index / max(self.total - 1, 1)


ALONE = Call()


class Guidance(ABC):
    """Called as ``guidance(x, t, call)`` once for each call of the model. None of them waits for the device."""

    def scale(self, call: Call) -> float:
        """w, folded into the coefficient table: the kernel computes uncond + w (cond - uncond)."""
        return 1.0

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        """x [N, C, *], t [N] -> (output, uncond), [N, C', *] each; without uncond the output is used as it is."""


class Pair:
    """Calls ``model(x, t, **kwargs)`` once, on the conditional and the unconditional half together.

    Args:
        model: takes x [2N, C, *], t [2N] and keyword arguments.
        cond, uncond: keyword arguments of the two halves, the same names; tensors of N rows are joined, everything else
            must be equal on both sides (a scalar tensor: the same object) and is passed as it is.

    Raises:
        ValueError: the names differ, or a value that is no tensor of N rows does.
    """

    def __init__(self, model: Model, *sides: Mapping[str, Any]) -> None:
        self.model, self.sides = model, sides
        names = ("cond", "uncond")
        if any(set(side) != set(sides[0]) for side in sides):
            raise ValueError(
                f"{names[0]} and {names[1]} must have the same names, got {[sorted(side) for side in sides]}"
            )
        self.kwargs = {name: self._joined(name) for name in sides[0]}

    def _joined(self, name: str) -> Any:
        values = [side[name] for side in self.sides]
        first = values[0]
        if isinstance(first, Tensor) and first.dim() == 0 and all(value is first for value in values):
            return first  # comparing scalars would wait for the device
        if all(isinstance(value, Tensor) for value in values):
            shapes = [tuple(value.shape) for value in values]
            if len(set(shapes)) > 1:
                raise ValueError(f"{name} must have one shape in cond and uncond, got {' and '.join(map(str, shapes))}")
            if not shapes[0]:
                raise ValueError(f"{name} must have one row a sample, or be the same scalar tensor in both")
            return torch.cat(values)
        if any(isinstance(value, Tensor) for value in values) or any(value != first for value in values):
            raise ValueError(f"{name} must be a tensor in both cond and uncond, or equal in both")
        return first

    def together(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all sides, one call of the model on a batch of as many times N."""
        n = len(self.sides)
        for name, value in self.kwargs.items():
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) != n * len(x):
                raise ValueError(f"{name} must have one row a sample ({len(x)}) on each side, got {len(value) // n}")
        return self.model(torch.cat([x] * n), torch.cat([t] * n), **self.kwargs).chunk(n)

    def first(self, x: Tensor, t: Tensor) -> Tensor:
        """The conditional output alone."""
        return self.model(x, t, **self.sides[0])


def of_means(x: Tensor, combine: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """``combine`` on the first C channels of the outputs; a learned variance beyond them is that of the first, unguided."""
    channels = x.shape[1]
    result = combine(*(output[:, :channels] for output in outputs))
    return result if outputs[0].shape[1] == channels else torch.cat([result, outputs[0][:, channels:]], dim=1)


def rows(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...], to multiply samples with."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """[N], the inner product of each sample, in float32 at least."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(wide) * b.to(wide)).flatten(1).sum(1)
