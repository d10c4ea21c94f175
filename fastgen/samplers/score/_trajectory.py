"""What the samplers of this package share: the start, the noise of a row of the table, and memory to write over."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import sampler_step
from ..arguments import check_device, check_dtype, check_shape, check_start
from ..engine.memory import nobody_else_holds
from ..engine.noise import Generators, NoiseSource

Callback = Callable[[int, float, Tensor], None]


class Trajectory:
    """One batch on its way through a table: where it is, in which dtype, and where its noise comes from.

    Args:
        model: whose device the samples are on where ``device`` is None.
        shape: [N, *].
        seeds, generator: as :func:`fastgen.samplers.sample` takes them.

    Raises:
        TypeError: ``dtype`` is not floating-point, or seeds are no integers.
        ValueError: ``shape`` is empty, or seeds and generator do not fit it.
    """

    def __init__(
        self,
        model: Any,
        shape: Sequence[int],
        seeds: Tensor | Sequence[int] | None = None,
        generator: Generators = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.shape = check_shape(shape, "[N, *]", least=1)
        self.dtype, self.device = check_dtype(dtype), check_device(device, model)
        self.source = NoiseSource(self.shape, self.device, dtype, seeds, generator)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def start(self, noise: Tensor | None, scale: float = 1.0) -> Tensor:
        """``noise`` where it is given (ValueError where it has another shape), and else normals times ``scale``."""
        if noise is None:
            x = self.source.initial()
            return x if scale == 1 else x.mul_(scale)
        return check_start(noise, self.shape, self.device, self.dtype)

    def table(self, table: Tensor) -> Tensor:
        """A float64 table, where the samples are and in the precision of their arithmetic."""
        return table.to(self.device, self.wide)

    def times(self, times: Sequence[float]) -> Tensor:
        """[len(times)], on the device: what models are called with, one entry spread over the batch."""
        return torch.tensor(times, dtype=torch.float64).to(self.device, self.wide)

    def normal(self, row: int) -> Tensor:
        """The noise of ``row``, as a tensor: for the rows that need more of it than its sum with the sample."""
        return self.source._draw(row)


def call_model(model: Callable[..., Tensor], x: Tensor, t: Tensor, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """The output of the model at one time for the whole batch, and where the next x may go.

    That is x itself, or None (fresh memory) where the model holds on to x or the caller wants to ``keep`` it.
    """
    output = model(x.detach(), t.expand(x.shape[0]))
    if not isinstance(output, Tensor) or output.shape != x.shape:
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model must return the shape {tuple(x.shape)} of its input, got {came}")
    return output, x if not keep and nobody_else_holds(x) else None


def step(x: Tensor, output: Tensor, table: Tensor, row: int, **kwargs: Any) -> Tensor:
    """One row, one kernel, one tensor."""
    return sampler_step(x, output, table, row, **kwargs)  # type: ignore[return-value]
