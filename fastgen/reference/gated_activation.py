"""What `gated_activation` means, in plain torch: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016,
equation 4, and WaveNet, 2016, equation 2, with tanh; Salimans et al., "PixelCNN++", 2017, with the identity."""

import torch
from torch import Tensor

from .._schema import GATED_ACTIVATIONS
from ._check import check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, empty_with_channels, opmath_dtype


def gated_activation_fwd(input: Tensor, condition: Tensor | None, activation: int) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    a, b = _halves(input, condition)
    return copy_like((torch.tanh(a) if _is_tanh(activation) else a) * torch.sigmoid(b), input)


def gated_activation_bwd(
    grad_output: Tensor, input: Tensor, condition: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    """With t = act(a) and s = sigmoid(b): (act'(a) s, t s (1 - s)) grad, and its sum over space for a condition [N, 2 C]."""
    a, b = _halves(input, condition)
    grad, s = grad_output.to(a.dtype), torch.sigmoid(b)
    if _is_tanh(activation):
        t = torch.tanh(a)
        by_a = (1 - t * t) * s
    else:
        t, by_a = a, s
    both = torch.cat([grad * by_a, grad * t * s * (1 - s)], 1)
    per_channel = condition is not None and condition.dim() == 2
    in_condition = both.flatten(2).sum(2) if per_channel and both.dim() > 2 else both.clone()
    return copy_like(both, input), in_condition if per_channel else both.new_empty(0)


def _is_tanh(activation: int) -> bool:
    return GATED_ACTIVATIONS[activation] == "tanh"


def _halves(input: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
    """(a + c_a, b + c_b) in the dtype of the arithmetic."""
    x = input.to(opmath_dtype(input.dtype))
    if condition is not None:
        c = condition.to(x.dtype)
        x = x + (c.reshape(*c.shape, *[1] * (x.dim() - 2)) if c.dim() == 2 else c)
    return x.chunk(2, 1)


def gated_activation_fwd_check(input: Tensor, condition: Tensor | None, activation: int) -> None:
    op = "gated_activation"
    check_main(op, "input", input, dims=2)
    fits = input.shape[1] % 2 == 0 and input.shape[1] >= 2
    require(op, fits, f"input must be [N, 2 C, *] with C >= 1, got shape {tuple(input.shape)}")
    per_channel = condition is not None and condition.dim() == 2
    check_floats(op, input, tuple(input.shape[:2] if per_channel else input.shape), condition=condition)
    known = 0 <= activation < len(GATED_ACTIVATIONS)
    require(op, known, f"activation must be an index of GATED_ACTIVATIONS, got {activation}")


def gated_activation_bwd_check(grad_output: Tensor, input: Tensor, condition: Tensor | None, activation: int) -> None:
    gated_activation_fwd_check(input, condition, activation)
    shape = (input.shape[0], input.shape[1] // 2, *input.shape[2:])
    check_floats("gated_activation", input, shape, grad_output=grad_output)
    same = grad_output.dtype == input.dtype
    require("gated_activation", same, f"grad_output must be {input.dtype}, got {grad_output.dtype}")


def gated_activation_fwd_fake(input: Tensor, condition: Tensor | None, activation: int) -> Tensor:
    return empty_with_channels(input, input.shape[1] // 2)


def gated_activation_bwd_fake(
    grad_output: Tensor, input: Tensor, condition: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    shape = input.shape[:2] if condition is not None and condition.dim() == 2 else (0,)
    return empty_like_layout(input), input.new_empty(shape, dtype=opmath_dtype(input.dtype))
