"""What `geglu` means, in plain torch: Shazeer, "GLU Variants Improve Transformer", 2020, with GELU (Hendrycks and Gimpel 2016).

And what its packed weights are: panels of PANEL rows of the weight in turn, of the values and of their gates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import GELU_APPROXIMATIONS
from ._check import check_floats, check_main, require
from ._layout import opmath_dtype

PANEL = 16  # features side by side in packed weights
BLOCK = 32  # channels of a tile


def geglu_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    wide = input.to(opmath_dtype(input.dtype))
    y = F.linear(wide, weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype))
    return _gate(y, approximate).to(input.dtype)


geglu_chunked = geglu_fwd


def geglu_pack(weight: Tensor) -> Tensor:
    """[2 D, C] -> [2 panels, C, PANEL] in fp32, with zeros beyond the last feature."""
    halves = weight.float().unflatten(0, (2, -1))  # [2, D, C]
    panels = F.pad(halves, (0, 0, 0, -halves.shape[1] % PANEL)).unflatten(1, (-1, PANEL))  # [2, panels, PANEL, C]
    return panels.permute(1, 0, 3, 2).flatten(0, 1).contiguous()


def geglu_packed(input: Tensor, packed: Tensor, features: int, bias: Tensor | None, approximate: int) -> Tensor:
    panels = packed.unflatten(0, (-1, 2)).permute(1, 0, 3, 2)  # [2, panels, PANEL, C]
    return geglu_fwd(input, panels.flatten(1, 2)[:, :features].flatten(0, 1), bias, approximate)


def geglu_direct_pack(weight: Tensor) -> Tensor:
    """[2 D, C] -> [2 panels, blocks, BLOCK / 2 pairs of channels, PANEL x 2] in bfloat16, with zeros beyond the last."""
    halves = F.pad(weight.to(torch.bfloat16), (0, -weight.shape[1] % BLOCK)).unflatten(0, (2, -1))
    panels = (
        F.pad(halves, (0, 0, 0, -halves.shape[1] % PANEL)).unflatten(1, (-1, PANEL)).unflatten(3, (-1, BLOCK // 2, 2))
    )
    return panels.permute(1, 0, 3, 4, 2, 5).flatten(4).flatten(0, 1).contiguous()


def geglu_direct(input: Tensor, packed: Tensor, features: int, bias: Tensor | None, approximate: int) -> Tensor:
    panels = packed.unflatten(0, (-1, 2)).unflatten(4, (PANEL, 2))  # [panels, 2, blocks, pairs, PANEL, 2]
    weight = panels.permute(1, 0, 4, 2, 3, 5).flatten(3).flatten(1, 2)[:, :features, : input.shape[1]]
    return geglu_fwd(input, weight.flatten(0, 1), bias, approximate)


def geglu_gate(projected: Tensor, approximate: int) -> Tensor:
    return _gate(projected.to(opmath_dtype(projected.dtype)), approximate).to(projected.dtype)


def geglu_gate_bwd(grad_output: Tensor, projected: Tensor, approximate: int) -> Tensor:
    """With (h, g) = projected: (gelu(g), h gelu'(g)) grad."""
    wide = projected.to(opmath_dtype(projected.dtype))
    grad, (value, gate) = grad_output.to(wide.dtype), wide.chunk(2, -1)
    name = GELU_APPROXIMATIONS[approximate]
    by_gate = torch.ops.aten.gelu_backward(grad * value, gate, approximate=name)
    return torch.cat([grad * F.gelu(gate, approximate=name), by_gate], -1).to(projected.dtype)


def _gate(y: Tensor, approximate: int) -> Tensor:
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate, approximate=GELU_APPROXIMATIONS[approximate])


def _check(op: str, input: Tensor, outputs: int, bias: Tensor | None, approximate: int) -> None:
    check_main(op, "input", input)
    require(op, input.dim() == 2, f"input must be [M, C], got shape {tuple(input.shape)}")
    check_floats(op, input, (outputs,), bias=bias)
    _check_approximate(op, approximate)


def _check_approximate(op: str, approximate: int) -> None:
    known = 0 <= approximate < len(GELU_APPROXIMATIONS)
    require(op, known, f"approximate must be an index of GELU_APPROXIMATIONS, got {approximate}")


def _check_weight(op: str, weight: Tensor) -> None:
    fits = weight.dim() == 2 and weight.shape[0] % 2 == 0 and min(weight.shape) >= 1
    require(op, fits, f"weight must be [2 D, C] and not empty, got shape {tuple(weight.shape)}")


def geglu_fwd_check(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> None:
    _check_weight("geglu_fwd", weight)
    _check("geglu_fwd", input, weight.shape[0], bias, approximate)
    check_floats("geglu_fwd", input, (weight.shape[0], input.shape[1]), weight=weight)


def geglu_chunked_check(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> None:
    geglu_fwd_check(input, weight, bias, approximate)
    for name, t in (("weight", weight), ("bias", bias)):
        require("geglu_chunked", t is None or t.dtype == input.dtype, f"{name} must have the dtype of input")


def geglu_pack_check(weight: Tensor) -> None:
    check_main("geglu_pack", "weight", weight)
    _check_weight("geglu_pack", weight)


def geglu_packed_check(input: Tensor, packed: Tensor, features: int, bias: Tensor | None, approximate: int) -> None:
    _check("geglu_packed", input, 2 * features, None, approximate)
    require("geglu_packed", input.dtype != torch.float64, "input must be float32, bfloat16 or float16")
    shape = (2 * -(-features // PANEL), input.shape[1], PANEL)
    fits = features >= 1 and packed.dtype == torch.float32 and packed.is_contiguous() and packed.shape == shape
    require("geglu_packed", fits, f"packed must be what geglu_pack returns, for features={features}")
    check_floats("geglu_packed", input, shape, packed=packed)
    check_floats("geglu_packed", input, (2 * features,), bias=bias)


geglu_direct_pack_check = geglu_pack_check


def geglu_direct_check(input: Tensor, packed: Tensor, features: int, bias: Tensor | None, approximate: int) -> None:
    _check("geglu_direct", input, 2 * features, None, approximate)
    require("geglu_direct", input.dtype == torch.bfloat16, "input must be bfloat16")
    shape = (2 * -(-features // PANEL), -(-input.shape[1] // BLOCK), BLOCK // 2, 2 * PANEL)
    fits = features >= 1 and packed.dtype == torch.bfloat16 and packed.is_contiguous() and packed.shape == shape
    require("geglu_direct", fits, f"packed must be what geglu_direct_pack returns, for features={features}")
    check_floats("geglu_direct", input, shape, packed=packed)
    check_floats("geglu_direct", input, (2 * features,), bias=bias)


def geglu_gate_check(projected: Tensor, approximate: int) -> None:
    _check_projected("geglu_gate", projected, approximate)


def geglu_gate_bwd_check(grad_output: Tensor, projected: Tensor, approximate: int) -> None:
    _check_projected("geglu_gate_bwd", projected, approximate)
    check_floats("geglu_gate_bwd", projected, (projected.shape[0], projected.shape[1] // 2), grad_output=grad_output)
    same = grad_output.dtype == projected.dtype
    require("geglu_gate_bwd", same, f"grad_output must be {projected.dtype}, got {grad_output.dtype}")


def _check_projected(op: str, projected: Tensor, approximate: int) -> None:
    check_main(op, "projected", projected)
    fits = projected.dim() == 2 and projected.shape[1] % 2 == 0 and projected.shape[1] >= 2
    require(op, fits, f"projected must be [M, 2 D] with D >= 1, got shape {tuple(projected.shape)}")
    _check_approximate(op, approximate)


def geglu_fwd_fake(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0] // 2))


geglu_chunked_fake = geglu_fwd_fake


def geglu_pack_fake(weight: Tensor) -> Tensor:
    panels = 2 * -(-weight.shape[0] // (2 * PANEL))
    return weight.new_empty((panels, weight.shape[1], PANEL), dtype=torch.float32)


def geglu_packed_fake(input: Tensor, packed: Tensor, features: int, bias: Tensor | None, approximate: int) -> Tensor:
    return input.new_empty((input.shape[0], features))


def geglu_direct_pack_fake(weight: Tensor) -> Tensor:
    panels, blocks = 2 * -(-weight.shape[0] // (2 * PANEL)), -(-weight.shape[1] // BLOCK)
    return weight.new_empty((panels, blocks, BLOCK // 2, 2 * PANEL), dtype=torch.bfloat16)


geglu_direct_fake = geglu_packed_fake


def geglu_gate_fake(projected: Tensor, approximate: int) -> Tensor:
    return projected.new_empty((projected.shape[0], projected.shape[1] // 2))


def geglu_gate_bwd_fake(grad_output: Tensor, projected: Tensor, approximate: int) -> Tensor:
    return projected.new_empty(projected.shape)
