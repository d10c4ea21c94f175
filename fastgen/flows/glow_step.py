"""The layers of Glow: `ActNorm`, `ActNormConv1x1`, its two linear layers as one, and `GlowStep`.

Kingma & Dhariwal 2018 (Glow: generative flow with invertible 1x1 convolutions).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.actnorm import _of_all_ranks
from ..ops.invertible_conv1x1 import inverse_of
from .coupling import Coupling
from .gradients import Gradients
from .transform import Compose, Context, Transform

EPS = 1e-6  # of a channel that is constant in the first batch


class ActNorm(Transform):
    """y = x exp(log_scale) + shift, channel by channel of [N, C, *].

    The first batch in training (that of all ranks together, where `torch.distributed` is initialised) gives each channel mean 0 and
    deviation 1, on the device, without waiting for it. Weights that are loaded count as initialised, so that nothing but parameters
    is in the state dict, unlike that of :class:`fastgen.nn.ActNorm`.

    Args:
        channels: C.
        initialize: whether the first batch does so.
    """

    def __init__(self, channels: int, *, initialize: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.initialized = not initialize

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        self._initialize(input)
        return ops.actnorm(input, self.log_scale, self.shift, log_scale=True)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(input, self.log_scale, self.shift, log_scale=True, inverse=True)

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

    @torch.no_grad()
    def _initialize(self, input: Tensor) -> None:
        if self.initialized or not self.training or input.is_meta:
            return
        if input.dim() < 2 or input.shape[1] != len(self.shift):
            name = type(self).__name__
            raise ValueError(f"{name}: input must be [N, {len(self.shift)}, *], got shape {tuple(input.shape)}")
        mean, deviation = _of_all_ranks(input, *ops.actnorm_statistics(input))
        deviation = deviation.nan_to_num()  # of a single element
        self.log_scale.copy_(-torch.log(deviation + EPS))
        self.shift.copy_(-mean / (deviation + EPS))
        self.initialized = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.initialized = True

    def extra_repr(self) -> str:
        return f"{len(self.shift)}"


class ActNormConv1x1(ActNorm):
    """An actnorm and a 1x1 convolution with a square matrix, in one pass over [N, C, *]: y = W (x exp(log_scale) + shift).

    W begins as a rotation.

    Args:
        channels: C.
        initialize: of the actnorm, as in :class:`ActNorm`.
    """

    def __init__(self, channels: int, *, initialize: bool = True) -> None:
        super().__init__(channels, initialize=initialize)
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0].contiguous())

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        self._initialize(input)
        scale = self.log_scale.exp()
        log_det = ops.invertible_conv1x1_log_det(input, self.weight, scale)
        return ops.invertible_conv1x1(input, self.weight, scale, self.shift), log_det

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Raises ValueError on a CPU where the matrix is singular; the message names the layer."""
        scale = self.log_scale.exp()
        log_det = ops.invertible_conv1x1_log_det(input, self.weight, scale, inverse=True)
        try:
            return ops.invertible_conv1x1(input, self.weight, scale, self.shift, inverse=True), log_det
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}({self.extra_repr()}): {error}") from None

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Transform`: W is inverted once, for the input and for the gradient of log |det W|, which is W^-T."""
        weight, scale, shift = self.weight.detach(), self.log_scale.detach().exp(), self.shift.detach()
        inverse = inverse_of(weight)
        input = ops.invertible_conv1x1(output, inverse / scale[:, None], bias=-shift / scale)
        grad_input, grad_weight, grad_scale, grad_shift, _ = torch.ops.fastgen.invertible_conv1x1_bwd.default(
            grad_output, input, weight, scale, shift, False
        )
        grad_total = grad_log_det.sum() * math.prod(output.shape[2:])
        _add(
            gradients,
            (self.weight, grad_weight + grad_total * inverse.T),
            (self.log_scale, grad_scale * scale + grad_total),
            (self.shift, grad_shift),
        )
        return input, grad_input


class GlowStep(Compose):
    """Actnorm, 1x1 convolution and coupling: the first two in one pass, the third in another.

    Args:
        channels: C of [N, C, H, W].
        coupling: an affine or an additive one.
        injector: a transform between the two, SRFlow's :class:`~fastgen.flows.AffineInjector`, say.
    """

    def __init__(self, channels: int, coupling: Coupling, injector: Transform | None = None) -> None:
        super().__init__([ActNormConv1x1(channels), *([] if injector is None else [injector]), coupling])


def _add(gradients: Gradients, *pairs: tuple[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in pairs:
        if parameter.requires_grad:
            gradients.add(parameter, gradient)
