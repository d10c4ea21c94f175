"""`RMSNorm` over the last dimensions, `torch.nn.RMSNorm`'s, and `ChannelRMSNorm` over channels, denoising-diffusion-pytorch's,
each with the modulation and activation after it in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._schema import ACTIVATIONS
from ..ops import rms_norm


def _check_activation(module: nn.Module, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{type(module).__name__}: activation must be one of {ACTIVATIONS}, got {activation!r}")


class RMSNorm(nn.RMSNorm):
    r"""`torch.nn.RMSNorm`, same parameters and state dict, that fuses what follows it:

    .. math:: y = act\big(\mathrm{RMS}(input) \cdot (1 + scale) + shift\big)

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in :class:`torch.nn.RMSNorm`.
        activation: None or ``"silu"``.

    Raises:
        ValueError: ``activation`` is not known.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        activation: str | None = None,
        **factory: Any,
    ) -> None:
        _check_activation(self, activation)
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, **factory)
        self.activation = activation

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """``x`` [N, *, *normalized_shape]; ``scale`` and ``shift`` [N, C]. Returns the shape of ``x``.

        Raises what :func:`fastgen.ops.rms_norm` raises.
        """
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, scale=scale, shift=shift, activation=self.activation
        )

    def extra_repr(self) -> str:
        fused = f", activation={self.activation!r}" if self.activation is not None else ""
        return super().extra_repr() + fused


class ChannelRMSNorm(nn.Module):
    r"""The `RMSNorm` of denoising-diffusion-pytorch, same state dict (``g`` [1, C, 1, 1]), and what follows it in its blocks:

    .. math:: y = act\big(\mathrm{normalize}(input) \cdot g \sqrt{C} \cdot (1 + scale) + shift\big)

    Args:
        dim: C of the input [N, C, *spatial].
        eps: the least norm of a pixel that is divided by.
        activation: None or ``"silu"``.

    Raises:
        ValueError: ``activation`` is not known.
    """

    def __init__(self, dim: int, eps: float = 1e-12, *, activation: str | None = None, **factory: Any) -> None:
        super().__init__()
        _check_activation(self, activation)
        self.dim, self.eps, self.activation = dim, eps, activation
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1, **factory))

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """``x`` [N, C, *spatial], either layout, which is kept; ``scale`` and ``shift`` [N, C]. Returns the shape of ``x``.

        Raises what :func:`fastgen.ops.rms_norm` raises.
        """
        return rms_norm(
            x, None, self.g, 0.0, min_norm=self.eps, scale=scale, shift=shift, activation=self.activation
        )  # fmt: skip

    def extra_repr(self) -> str:
        fused = f", activation={self.activation!r}" if self.activation is not None else ""
        return f"{self.dim}, eps={self.eps}{fused}"
