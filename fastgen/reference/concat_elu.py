"""What `concat_elu` means, in plain torch: Salimans et al., "PixelCNN++", 2017, after concatenated ReLUs (Shang et al. 2016), with
ELU (Clevert et al. 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_floats, check_main, require
from ._layout import copy_like, empty_like_layout, empty_with_channels, opmath_dtype


def concat_elu_fwd(input: Tensor) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    x = input.to(opmath_dtype(input.dtype))
    return copy_like(F.elu(torch.cat([x, -x], 1)), input)


def concat_elu_bwd(grad_output: Tensor, input: Tensor) -> Tensor:
    """With e = exp(-abs(x)), and 1 where the argument of an ELU is positive: grad_1 elu'(x) - grad_2 elu'(-x)."""
    x = input.to(opmath_dtype(input.dtype))
    first, second = grad_output.to(x.dtype).chunk(2, 1) if x.shape[1] else (x, x)
    e = torch.exp(-x.abs())
    return copy_like(first * torch.where(x > 0, 1, e) - second * torch.where(x < 0, 1, e), input)


def concat_elu_fwd_check(input: Tensor) -> None:
    check_main("concat_elu", "input", input, dims=2)


def concat_elu_bwd_check(grad_output: Tensor, input: Tensor) -> None:
    concat_elu_fwd_check(input)
    shape = (input.shape[0], 2 * input.shape[1], *input.shape[2:])
    check_floats("concat_elu", input, shape, grad_output=grad_output)
    require(
        "concat_elu", grad_output.dtype == input.dtype, f"grad_output must be {input.dtype}, got {grad_output.dtype}"
    )


def concat_elu_fwd_fake(input: Tensor) -> Tensor:
    return empty_with_channels(input, 2 * input.shape[1])


def concat_elu_bwd_fake(grad_output: Tensor, input: Tensor) -> Tensor:
    return empty_like_layout(input)
