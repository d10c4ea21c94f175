"""Arguments of `upsample_conv2d` for its tests."""

import functools
from typing import Any

import torch

from fastgen.ops import upsample_conv2d

from . import conv2d_cases
from .conv2d_cases import OPERANDS, halves, operands, weight_of, whole_numbers
from .families import OfTensors
from .numerics import randn

# [N, C, H, W], K: odd and 1-pixel images, more and fewer channels than a panel, a chunk, a block of registers; the last two are
# large enough for a transposed convolution.
SHAPES = [
    ((2, 16, 8, 8), 32), ((1, 3, 5, 7), 5), ((3, 20, 1, 1), 17), ((1, 33, 13, 2), 40), ((1, 70, 9, 34), 48), ((1, 8, 1, 259), 3),
]  # fmt: skip

plain = functools.partial(conv2d_cases.plain, upsample=True)
packed_arguments = functools.partial(conv2d_cases.packed_arguments, family="upsample_conv2d")
direct_arguments = functools.partial(conv2d_cases.direct_arguments, family="upsample_conv2d")


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape, k = (2, 6, 5, 7), 4
    return {
        "input": randn(*shape, dtype=dtype), "weight": weight_of(shape, k, 3, dtype), **operands(shape, k, dtype, 2),
        "activation": "silu", "output_scale": 0.5,
    }  # fmt: skip


def forward_arguments() -> tuple:
    """Arguments of `upsample_conv2d_fwd`, which the public op calls only where a kernel is loaded."""
    given = example(torch.float32)
    bias, scale, shift, embedding, residual = (given[name] for name in OPERANDS)
    x, skip = halves(given["input"], 4)
    return x, given["weight"], bias, scale, shift, 1, embedding, residual, 0.5, skip


UNSEEN = {
    "upsample_conv2d_direct_pack": lambda: (weight_of((1, 6), 4, 3, torch.float32),),
    "upsample_conv2d_direct": functools.partial(direct_arguments, seam=4),
    "upsample_conv2d_direct_moments": functools.partial(direct_arguments, seam=4),
    "upsample_conv2d_fwd": forward_arguments,
    "upsample_conv2d_pack": lambda: (weight_of((1, 6), 4, 3, torch.float32), 4),
    "upsample_conv2d_packed": functools.partial(packed_arguments, seam=4),
    "upsample_conv2d_packed_moments": functools.partial(packed_arguments, seam=4),
}
REFUSED = [
    ("upsample_conv2d_fwd", {"activation": 2}, "activation"),
    ("upsample_conv2d_fwd", {"weight": torch.zeros(4, 6, 1, 1)}, r"weight must be \[K, C, 3, 3\]"),
    ("upsample_conv2d_pack", {"outputs": 1}, "outputs must be 2 or 4, got 1"),
    ("upsample_conv2d_packed", {"out_channels": 17}, "packed must be for 6 channels and out_channels=17"),
    ("upsample_conv2d_packed", {"packed": torch.zeros(16, 1, 6, 16)}, "packed must be what"),
    ("upsample_conv2d_packed", {"activation": -1}, "activation"),
    ("upsample_conv2d_packed", {"input": torch.zeros(2, 6, 5, 7, dtype=torch.float64)}, "input must be float32"),
    ("upsample_conv2d_packed", {"residual": torch.zeros(2, 4, 5, 7)}, "residual must have"),
    ("upsample_conv2d_direct_pack", {"weight": torch.zeros(4, 6, 1, 1)}, r"weight must be \[K, C, 3, 3\]"),
    ("upsample_conv2d_direct", {"residual": torch.zeros(2, 4, 5, 7).bfloat16()}, "residual must have"),
]  # fmt: skip


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """A weight may have any number of channels and be packed on any device."""
    return op in ("upsample_conv2d_pack", "upsample_conv2d_direct_pack") and (
        how == "the meta device" or (how.startswith(("dimension 0", "dimension 1")) and "empty" not in how)
    )


MAPPED = OfTensors(
    lambda x, weight, scale, residual: upsample_conv2d(x, weight, input_scale=scale, residual=residual),
    lambda k: [
        whole_numbers(*shape, seed=k + seed)
        for shape, seed in (((2, 3, 4, 5), 0), ((2, 3, 3, 3), 50), ((2, 3), 60), ((2, 2, 8, 10), 70))
    ],
)
TWICE = True
_WEIGHT = weight_of((1, 4), 6, 3, torch.float32)
EXPORTED = {
    "upsample_conv2d": OfTensors(
        lambda x, embedding: upsample_conv2d(x, _WEIGHT.clone(), embedding=embedding, activation="silu"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 6, dtype=torch.float32)],
    )
}
