"""`ConcatELU`: the nonlinearity of PixelCNN++ on the fused op."""

from torch import Tensor, nn

from ..ops import concat_elu


class ConcatELU(nn.Module):
    """ELU of the input and of its negative, side by side along ``dim``, which is doubled."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return concat_elu(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
