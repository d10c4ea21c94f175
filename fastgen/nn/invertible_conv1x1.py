"""`InvertibleConv1x1`: a square matrix over the channels with its log-determinant and its inverse, direct or as P L U (Glow)."""

import math
from typing import Any

import torch
from torch import Tensor

from ..ops import invertible_conv1x1, invertible_conv1x1_log_det
from ._square_matrix import SquareMatrix, singular
from .actnorm import ActNorm


class InvertibleConv1x1(SquareMatrix):
    r"""y = W x over the channels of each position; W begins as a random rotation.

    ``"direct"`` has the parameter ``weight``; its log-determinant costs a decomposition, in float64, of the small matrix.
    ``"plu"`` has

    .. math:: W = P L (U + \mathrm{diag}(sign \odot e^{s}))

    with the unit lower triangle of ``lower``, the strict upper triangle of ``upper``, s = ``log_diagonal``, and P and the signs
    fixed: never singular, its log-determinant is the sum of s, and its inverse is had by triangular solves.

    The inverse matrix is found in float64, and kept for as long as the parameters stay where no gradient is wanted. An actnorm
    before it is taken in the same pass: ``conv(x, actnorm=norm)`` is ``conv(norm(x))`` with both log-determinants.

    Args:
        channels: C of the input [N, C, *].
        parametrization: ``"direct"`` or ``"plu"``.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``parametrization`` is not known. From :meth:`set_weight`, and from :meth:`inverse` on a CPU, where the matrix
            is singular; on a GPU, where to look would be to wait, what comes of it is not finite. A state dict with a singular
            matrix on the CPU is refused by ``load_state_dict``, which names the layer.
    """

    def __init__(self, channels: int, *, parametrization: str = "direct", **factory: Any) -> None:
        super().__init__()
        self._make_matrix(channels, parametrization, **factory)

    def forward(
        self, input: Tensor, context: Tensor | None = None, *, actnorm: ActNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """``input`` [N, C, *]. Returns (output, log_det [N]), after ``actnorm`` where one is given; ``context`` is not used. Raises
        what :func:`fastgen.ops.invertible_conv1x1` raises."""
        weight = self.matrix()
        if actnorm is None:
            return invertible_conv1x1(input, weight), self._log_det(input, None)
        actnorm.prepare(input)
        output = invertible_conv1x1(input, weight, actnorm.log_scale, actnorm.shift, log_scale=True)
        return output, self._log_det(input, actnorm)

    def inverse(
        self, input: Tensor, context: Tensor | None = None, *, actnorm: ActNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """The way back, through ``actnorm`` too where one is given, and the log-determinant of the inverse."""
        log_det = -self._log_det(input, actnorm)
        inverse = self.inverse_matrix()
        if actnorm is None:
            return invertible_conv1x1(input, inverse), log_det
        slope = torch.exp(-actnorm.log_scale.to(inverse.dtype))
        return invertible_conv1x1(input, inverse * slope[:, None], bias=-actnorm.shift * slope), log_det

    def _log_det(self, input: Tensor, actnorm: ActNorm | None) -> Tensor:
        logs = None if actnorm is None else actnorm.log_scale
        if self.parametrization == "plu":
            return log_det_of(input, self.log_diagonal, logs)
        return invertible_conv1x1_log_det(input, self.weight, logs, log_scale=True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight, errors = state_dict.get(f"{prefix}weight"), args[-1]
        on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu"
        if on_cpu and weight.shape == (self.channels,) * 2 and singular(weight):
            errors.append(f"{self._name()}: {prefix}weight is singular")


def log_det_of(input: Tensor, *logs: Tensor | None) -> Tensor:
    """[N], of ``input`` [N, C, *]: the sum of ``logs``, each a logarithm a channel, at each position; summed in float64."""
    total = sum(each.double().sum() for each in logs if each is not None)
    assert isinstance(total, Tensor)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (math.prod(input.shape[2:]) * total).to(dtype).expand(input.shape[0])
