"""The layers of Glow: `ActNorm`, `ActNormConv1x1`, its two linear layers as one, and `GlowStep`.

Kingma & Dhariwal 2018 (Glow: generative flow with invertible 1x1 convolutions).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn._square_matrix import SquareMatrix
from ..nn.actnorm import ChannelNorm
from ..nn.invertible_conv1x1 import log_det_of
from .coupling import Coupling
from .gradients import Gradients
from .transform import Compose, Context, Transform


class ActNorm(ChannelNorm, Transform):
    """y = x exp(log_scale) + shift, channel by channel of [N, C, *].

    The first batch in training (that of all ranks together, where `torch.distributed` is initialised) gives each channel mean 0 and
    deviation 1, on the device, without waiting for it; a channel that is constant keeps scale 1. It is :class:`fastgen.nn.ActNorm`
    but for one thing: weights that are loaded count as initialised, so that nothing but parameters is in the state dict.

    Args:
        channels: C.
        initialize: whether the first batch does so.
    """

    def __init__(self, channels: int, *, initialize: bool = True) -> None:
        super().__init__(channels, data_dependent=initialize)

    @property
    def initialized(self) -> bool:
        """Whether the parameters are no longer for a first batch to set."""
        return self._is_ready()

    @initialized.setter
    def initialized(self, value: bool) -> None:
        self._ready = value

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        scale, shift = self.log_scale.detach(), self.shift.detach()
        input, _ = ops.actnorm(output, scale, shift, log_scale=True, inverse=True)
        grad_input, grad_scale, grad_shift = torch.ops.fastgen.actnorm_bwd.default(
            grad_output, grad_log_det, input, scale, shift, True, False, False
        )
        _add(gradients, (self.log_scale, grad_scale), (self.shift, grad_shift))
        return input, grad_input

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = True


class ActNormConv1x1(ActNorm, SquareMatrix):
    """An actnorm and a 1x1 convolution with a square matrix, in one pass over [N, C, *]: y = W (x exp(log_scale) + shift).

    W begins as a rotation. As three factors, ``"plu"``, it is never singular, its log-determinant is a sum of parameters, and its
    inverse is had by triangular solves; :class:`fastgen.nn.InvertibleConv1x1` says which parameters there are.

    Args:
        channels: C.
        initialize: of the actnorm, as in :class:`ActNorm`.
        parametrization: of W, ``"direct"`` or ``"plu"``.

    Raises:
        ValueError: ``parametrization`` is not known. From :meth:`inverse` on a CPU, where the matrix is singular; the message names
            the layer.
    """

    def __init__(self, channels: int, *, initialize: bool = True, parametrization: str = "direct") -> None:
        super().__init__(channels, initialize=initialize)
        self._make_matrix(channels, parametrization)

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        self.prepare(input)
        scale, log_det = self.log_scale.exp(), self._log_det(input)
        return ops.invertible_conv1x1(input, self.matrix(), scale, self.shift), log_det

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        log_det = -self._log_det(input)
        # On a GPU the inverse is not kept: a change of `.data` would not be seen.
        inverse = self.inverse_matrix() if input.is_cpu else self._inverted()
        slope = torch.exp(-self.log_scale.to(inverse.dtype))
        return ops.invertible_conv1x1(input, inverse * slope[:, None], bias=-self.shift * slope), log_det

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Transform`: W is inverted once, for the input and for the gradient of log |det W|, which is W^-T."""
        with torch.no_grad():
            weight, inverse = self.matrix(), self._inverted()
        scale, shift = self.log_scale.detach().exp(), self.shift.detach()
        input = ops.invertible_conv1x1(output, inverse / scale[:, None], bias=-shift / scale)
        grad_input, grad_weight, grad_scale, grad_shift, _ = torch.ops.fastgen.invertible_conv1x1_bwd.default(
            grad_output, input, weight, scale, shift, False
        )
        grad_total = grad_log_det.sum() * math.prod(output.shape[2:])
        pairs = self.matrix_gradients(grad_weight, grad_total, inverse)
        _add(gradients, *pairs, (self.log_scale, grad_scale * scale + grad_total), (self.shift, grad_shift))
        return input, grad_input

    def _log_det(self, input: Tensor) -> Tensor:
        if self.parametrization == "plu":
            return log_det_of(input, self.log_diagonal, self.log_scale)
        return ops.invertible_conv1x1_log_det(input, self.weight, self.log_scale, log_scale=True)

    def extra_repr(self) -> str:
        return SquareMatrix.extra_repr(self)


class GlowStep(Compose):
    """Actnorm, 1x1 convolution and coupling: the first two in one pass, the third in another.

    Args:
        channels: C of [N, C, H, W].
        coupling: an affine or an additive one.
        injector: a transform between the two, SRFlow's :class:`~fastgen.flows.AffineInjector`, say.
        parametrization: of the convolution's matrix, as in :class:`ActNormConv1x1`.
    """

    def __init__(
        self,
        channels: int,
        coupling: Coupling,
        injector: Transform | None = None,
        *,
        parametrization: str = "direct",
    ) -> None:
        linear = ActNormConv1x1(channels, parametrization=parametrization)
        super().__init__([linear, *([] if injector is None else [injector]), coupling])


def _add(gradients: Gradients, *pairs: tuple[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in pairs:
        if parameter.requires_grad:
            gradients.add(parameter, gradient)
