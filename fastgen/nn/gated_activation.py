"""`GatedActivation`: the gated unit of PixelCNN and WaveNet on the fused op."""

from torch import Tensor, nn

from .._schema import GATED_ACTIVATIONS
from ..ops import gated_activation


class GatedActivation(nn.Module):
    r"""[N, 2 C, *spatial] -> [N, C, *spatial]: :math:`act(a + c_a) \cdot \sigma(b + c_b)` of the halves of the channels.

    Args:
        activation: ``"tanh"`` or ``"identity"``, as :func:`fastgen.ops.gated_activation` has it.

    Raises:
        ValueError: ``activation`` is not known.
    """

    def __init__(self, activation: str = "tanh") -> None:
        super().__init__()
        if activation not in GATED_ACTIVATIONS:
            raise ValueError(f"GatedActivation: activation must be one of {GATED_ACTIVATIONS}, got {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        """``condition`` [N, 2 C], or [N, 2 C, *spatial] with sizes of the input or 1."""
        return gated_activation(input, condition, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
