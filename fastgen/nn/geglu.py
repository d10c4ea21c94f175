"""`GEGLU`: the GELU-gated linear unit of diffusers' transformer blocks on the fused op."""

from torch import Tensor, nn

from ..ops import geglu


class GEGLU(nn.Module):
    r"""[*, dim_in] -> [*, dim_out]: :math:`h \cdot \mathrm{gelu}(gate)` with (h, gate) = proj(input), as diffusers' ``GEGLU``, with
    its state dict (``proj.weight``, ``proj.bias``).

    Args:
        dim_in: C.
        dim_out: D.
        bias: whether the linear has one.
        approximate: ``"none"`` or ``"tanh"``, as :func:`fastgen.ops.geglu` has it.
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, approximate: str = "none") -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input, self.proj.weight, self.proj.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"
