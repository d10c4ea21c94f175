"""`ActNorm`: a scale and a shift a channel that begin where the first batch gets mean 0 and deviation 1 (Glow)."""

from typing import Any

import torch
from torch import Tensor, nn

from .._uncompiled import uncompiled
from ..ops import actnorm, actnorm_statistics

EPS = 1e-6  # a deviation of at most so much is a constant channel's


class ChannelNorm(nn.Module):
    """What actnorms are: :math:`y = x e^{s} + t` a channel, set by the first batch in training mode.

    Whether that has happened is known to Python, ``_ready``; a subclass says what a state dict tells of it.
    """

    _ready: bool | None  # None: :meth:`_asked` knows

    def __init__(self, channels: int, *, eps: float = EPS, data_dependent: bool = True, **factory: Any) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.log_scale = nn.Parameter(torch.zeros(channels, **factory))
        self.shift = nn.Parameter(torch.zeros(channels, **factory))
        self._ready = not data_dependent

    def forward(self, input: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """``input`` [N, C, *]. Returns (output, log_det [N]); ``context`` is not used. Raises what :func:`fastgen.ops.actnorm`
        raises."""
        self.prepare(input)
        return actnorm(input, self.log_scale, self.shift, log_scale=True)

    def inverse(self, input: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The way back, and the log-determinant of the inverse."""
        return actnorm(input, self.log_scale, self.shift, log_scale=True, inverse=True)

    def prepare(self, input: Tensor) -> None:
        """Set the parameters from ``input`` where this is the first batch in training mode; a meta tensor teaches nothing."""
        if self.training and not self._is_ready() and not input.is_meta:
            self.initialize(input)

    @uncompiled
    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set the parameters from ``input`` [N, C, *], whatever they were.

        Raises:
            ValueError: ``input`` is of another shape.
        """
        if input.dim() < 2 or input.shape[1] != self.channels:
            name = type(self).__name__
            raise ValueError(f"{name}: input must be [N, {self.channels}, *], got shape {tuple(input.shape)}")
        mean, deviation = _of_all_ranks(input, *actnorm_statistics(input))
        scale = torch.where(deviation > self.eps, 1 / deviation, 1.0)  # of a NaN, of one element, too
        self.log_scale.copy_(scale.log())
        self.shift.copy_(-mean * scale)
        self._ready = True

    def _is_ready(self) -> bool:
        if self._ready is None:
            self._ready = self._asked()
        return self._ready

    def _asked(self) -> bool:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.channels}"


class ActNorm(ChannelNorm):
    r"""Activation normalization with data-dependent initialisation: :math:`y = x e^{s} + t` a channel.

    The first batch in training mode sets s and t so that each channel of its output has mean 0 and deviation 1 (a channel that
    is constant keeps scale 1). Whether that has happened is in the state dict, ``initialized``, and known to Python as well, so
    that no later call waits for the device; only the first one after a state dict was loaded asks the buffer once. In evaluation
    mode the parameters are used as they are. Under ``torch.compile`` the first batch breaks the graph once.

    With `torch.distributed` initialised, the statistics are those of the first batches of all ranks together, so that ranks agree:
    every rank must make that first call. A batch that several ranks hold alike counts once for each.

    Args:
        channels: C of the input [N, C, *].
        eps: a deviation of at most so much is a constant channel's.
        data_dependent: False begins with the identity instead.
        device, dtype: of the parameters.

    The parameters are those of `nflows.transforms.ActNorm`, ``log_scale`` and ``shift`` [C], as is ``initialized``.
    """

    initialized: Tensor

    def __init__(self, channels: int, *, eps: float = EPS, data_dependent: bool = True, **factory: Any) -> None:
        super().__init__(channels, eps=eps, data_dependent=data_dependent, **factory)
        self.register_buffer("initialized", torch.tensor(not data_dependent, device=self.shift.device))

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        super().initialize(input)
        self.initialized.fill_(True)

    def _asked(self) -> bool:
        return bool(self.initialized)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None


def _of_all_ranks(input: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the batches of all ranks together, in float64 on the way.

    Every element of every rank counts once, which is right for shards of a batch, of whatever sizes. It assumes that ranks hold
    different data: what R ranks hold alike (replicas, ranks of tensor parallelism) counts R times. The mean is as it was then; the
    deviation divides by n R - 1 copies where one rank alone has n - 1, nearer to that of the population.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mean, deviation
    count = input.numel() // max(input.shape[1], 1)
    m, squares = mean.double(), deviation.double().square() * max(count - 1, 0)
    if count < 2:  # no element has no mean, one no deviation
        m, squares = torch.nan_to_num(m), torch.zeros_like(squares)
    sums = torch.stack([torch.full_like(m, count), count * m, squares + count * m.square()])
    torch.distributed.all_reduce(sums)
    total, of_mean, of_squares = sums
    m = of_mean / total
    return m.to(mean.dtype), ((of_squares - total * m.square()) / (total - 1)).clamp_min(0).sqrt().to(mean.dtype)
