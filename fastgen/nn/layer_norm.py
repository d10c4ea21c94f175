"""`LayerNorm`: `torch.nn.LayerNorm` with the residual add before it and the modulation after it in one pass."""

from typing import Any

from torch import Tensor, nn

from ..ops import layer_norm


class LayerNorm(nn.LayerNorm):
    r"""`torch.nn.LayerNorm`, same constructor, parameters and state dict, that fuses what stands around it in a transformer:

    .. math:: s = gate \cdot input + residual, \qquad y = \mathrm{LN}(s) \cdot (1 + scale) + shift
    """

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """``input`` and ``residual`` [N, *, *normalized_shape]; ``gate``, ``scale`` and ``shift`` [N, C]. Returns y, or with a
        residual (y, s).

        Raises what :func:`fastgen.ops.layer_norm` raises.
        """
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            residual=residual, gate=gate, scale=scale, shift=shift,
        )  # fmt: skip
