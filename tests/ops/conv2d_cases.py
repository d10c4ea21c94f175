"""Arguments of `conv2d` for its tests, and of `upsample_conv2d`, which takes the same; what a user writes without them; and inputs
chosen to be hard for Winograd's algorithms."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import conv2d

from .families import OfTensors
from .numerics import guarded, laid_out, randn

# [N, C, H, W], K: odd and 1-pixel images, more and fewer channels than a panel, a chunk, a block of registers.
SHAPES = [
    ((2, 16, 8, 8), 32), ((1, 3, 5, 7), 5), ((3, 20, 1, 1), 17), ((1, 70, 9, 34), 48), ((2, 33, 13, 2), 40), ((1, 300, 4, 6), 16),
    ((5, 64, 16, 16), 64), ((1, 8, 1, 19), 3),
]  # fmt: skip
OPERANDS = ("bias", "input_scale", "input_shift", "embedding", "residual")


def plain(
    x: Tensor, weight: Tensor, bias=None, padding=1, input_scale=None, input_shift=None, activation=None, embedding=None,
    residual=None, output_scale=1.0, upsample=False, **geometry,
) -> Tensor:  # fmt: skip
    """The same in plain torch, in the dtype of ``x``, one call a step: what a user would write."""

    def spread(p: Tensor) -> Tensor:
        return p.to(x.dtype)[..., None, None]

    y = x if input_scale is None else x * spread(input_scale)
    y = y if input_shift is None else y + spread(input_shift)
    y = F.silu(y) if activation == "silu" else y
    y = F.interpolate(y, scale_factor=2.0, mode="nearest") if upsample else y
    y = F.conv2d(y, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=padding, **geometry)
    y = y if embedding is None else y + spread(embedding)
    y = y if residual is None else y + residual.to(x.dtype)
    return y if output_scale == 1.0 else y * output_scale


def weight_of(shape: tuple[int, ...], k: int, kernel: int, dtype: torch.dtype, seed: int = 20) -> Tensor:
    fan_in = shape[1] * kernel * kernel
    return (randn(k, shape[1], kernel, kernel, seed=seed) / fan_in**0.5).to(dtype)


def operands(shape: tuple[int, ...], k: int, dtype: torch.dtype, scale: int = 1) -> dict[str, Tensor]:
    """``scale``: rows of the output for one of the input."""
    n, c, h, w = shape
    sizes = {"bias": (k,), "input_scale": (n, c), "input_shift": (n, c), "embedding": (n, k)}
    sizes["residual"] = n, k, scale * h, scale * w
    return {name: guarded(randn(*sizes[name], seed=i + 10, dtype=dtype)) for i, name in enumerate(OPERANDS)}


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape, k = (2, 6, 5, 7), 4
    return {
        "input": randn(*shape, dtype=dtype), "weight": weight_of(shape, k, 3, dtype), "padding": 1, **operands(shape, k, dtype),
        "activation": "silu", "output_scale": 0.5,
    }  # fmt: skip


def packed_arguments(
    shape=(2, 6, 5, 7), k=4, outputs=4, dtype=torch.float32, activation=1, scale=0.5, weight=None, family="conv2d", seam=None
) -> tuple:  # fmt: skip
    """Arguments of `conv2d_packed`, or of the other family's, all of them given; with a ``seam`` two inputs."""
    given = operands(shape, k, dtype, 2 if family == "upsample_conv2d" else 1)
    bias, input_scale, input_shift, embedding, residual = (given[name] for name in OPERANDS)
    if weight is None:
        weight = weight_of(shape, k, 1 if outputs == 1 else 3, dtype)
    packed = getattr(torch.ops.fastgen, f"{family}_pack")(weight, outputs)
    x, skip = halves(randn(*shape, dtype=dtype), seam)
    return x, packed, k, bias, input_scale, input_shift, activation, embedding, residual, scale, skip


def halves(x: Tensor, seam: int | None, layout: str = "contiguous") -> tuple[Tensor, Tensor | None]:
    """``x``, or its channels before ``seam`` and those from there on, each over memory of its own."""
    parts = (x, None) if seam is None else (x[:, :seam].clone(), x[:, seam:].clone())
    return tuple(None if part is None else laid_out(part, layout) for part in parts)


def forward_arguments() -> tuple:
    """Arguments of `conv2d_fwd`, which the public op calls only where a kernel is loaded."""
    given = example(torch.float32)
    bias, scale, shift, embedding, residual = (given[name] for name in OPERANDS)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x, skip = halves(given["input"], 4)
    return x, given["weight"], *geometry, bias, scale, shift, 1, embedding, residual, 0.5, skip


def direct_arguments(
    shape=(2, 6, 5, 7), k=4, kernel=3, activation=1, scale=0.5, weight=None, family="conv2d", seam=None
) -> tuple:
    """Arguments of `conv2d_direct`, or of the other family's, all of them given."""
    given = operands(shape, k, torch.bfloat16, 2 if family == "upsample_conv2d" else 1)
    bias, input_scale, input_shift, embedding, residual = (given[name] for name in OPERANDS)
    weight = weight_of(shape, k, kernel, torch.bfloat16) if weight is None else weight
    packed = getattr(torch.ops.fastgen, f"{family}_direct_pack")(weight)
    x, skip = halves(randn(*shape, dtype=torch.bfloat16), seam)
    return x, packed, k, bias, input_scale, input_shift, activation, embedding, residual, scale, skip


UNSEEN = {
    "conv2d_direct_pack": lambda: (weight_of((1, 6), 4, 3, torch.float32),),
    "conv2d_direct": partial(direct_arguments, seam=4),
    "conv2d_direct_moments": partial(direct_arguments, seam=4),
    "conv2d_fwd": forward_arguments,
    "conv2d_pack": lambda: (weight_of((1, 6), 4, 3, torch.float32), 4),
    "conv2d_packed": partial(packed_arguments, seam=4),
    "conv2d_packed_moments": partial(packed_arguments, seam=4),
}
REFUSED = [
    ("conv2d_fwd", {"groups": 4}, "groups must divide channels"),
    ("conv2d_fwd", {"groups": 0}, "groups must divide channels"),
    ("conv2d_fwd", {"stride": [0, 1]}, "stride must be two integers"),
    ("conv2d_fwd", {"padding": [-1, 1]}, "padding must be two integers"),
    ("conv2d_fwd", {"dilation": [9, 9]}, "larger than the padded image"),
    ("conv2d_fwd", {"activation": 2}, "activation"),
    ("conv2d_pack", {"outputs": 3}, "outputs must be 1, 2 or 4, got 3"),
    ("conv2d_pack", {"outputs": 1}, r"weight must be \[K, C, 1, 1\]"),
    ("conv2d_packed", {"out_channels": 17}, "packed must be for 6 channels and out_channels=17"),
    ("conv2d_packed", {"out_channels": -4}, "packed must be for 6 channels and out_channels=-4"),
    ("conv2d_packed", {"activation": -1}, "activation"),
    ("conv2d_packed", {"input": torch.zeros(2, 6, 5, 7, dtype=torch.float64)}, "input must be float32, bfloat16 or float16"),
    ("conv2d_packed", {"residual": torch.zeros(2, 4, 5, 7, dtype=torch.float16)}, "residual must have the dtype of input"),
    ("conv2d_direct_pack", {"weight": torch.zeros(4, 6, 3, 1)}, r"weight must be \[K, C, 3, 3\] or \[K, C, 1, 1\]"),
    ("conv2d_direct", {"input": torch.zeros(2, 6, 5, 7)}, "input must be bfloat16"),
    ("conv2d_direct", {"out_channels": 17}, "packed must be for 6 channels and out_channels=17"),
    ("conv2d_direct", {"packed": torch.zeros(1, 1, 1, 4, 16, 32).bfloat16()}, "packed must be what the packing op returns"),
]  # fmt: skip


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """A weight may have any number of channels and be packed on any device; that of one point or tap is a 1x1 kernel's."""
    if op in ("conv2d_pack", "conv2d_direct_pack"):
        return how == "the meta device" or (how.startswith(("dimension 0", "dimension 1")) and "empty" not in how)
    return name == "packed" and (op.removesuffix("_moments"), how) in (
        ("conv2d_packed", "dimension 0 of one"),
        ("conv2d_direct", "dimension 3 of one"),
    )


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Of which every sum is exact, in whatever order."""
    return randn(*shape, seed=seed).mul(3).round().float()


MAPPED = OfTensors(
    lambda x, weight, scale, residual: conv2d(x, weight, padding=1, input_scale=scale, residual=residual),
    lambda k: [
        whole_numbers(*shape, seed=k + seed)
        for shape, seed in (((2, 3, 4, 5), 0), ((2, 3, 3, 3), 50), ((2, 3), 60), ((2, 2, 4, 5), 70))
    ],
)
TWICE = True
_WEIGHT = weight_of((1, 4), 6, 3, torch.float32)
EXPORTED = {
    "conv2d": OfTensors(
        lambda x, embedding: conv2d(x, _WEIGHT.clone(), padding=1, embedding=embedding, activation="silu"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 6, dtype=torch.float32)],
    )
}


def adversarial() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and weights, in float64 but float32 numbers, on which the error bound of Winograd's algorithms must hold."""
    shape, k = (2, 48, 13, 18), 32
    x, w = randn(*shape), weight_of(shape, k, 3, torch.float64)
    huge, cancelling, alternating = x.clone(), w - w.mean((2, 3), keepdim=True), w.clone()
    huge[:, 7] *= 1e4
    alternating[1::2] = -alternating[::2] * (1 + 1e-3)
    signs = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).double()
    cases = {
        "random": (x, w),
        "one huge channel": (huge, w),
        "one huge pixel": (x + 1e4 * F.one_hot(torch.tensor(5 * 18 + 6), 13 * 18).reshape(13, 18), w),
        "weights that cancel": (x, cancelling),
        "second differences": (x, signs.expand(k, 48, 3, 3) * randn(k, 48, 1, 1, seed=4)),
        "kernels that are opposites": (x, alternating),
        "a large mean": (x + 100, w),
        "large and small channels": (x * torch.logspace(-3, 3, 48)[:, None, None], w),
        "one pixel": (x[..., :1, :1], w),
        "one row": (x[..., :1, :], w),
        "odd": (x[..., :7, :5], w),
        "one channel": (x[:, :1], w[:, :1]),
    }
    return {name: (a.float().double(), b.float().double()) for name, (a, b) in cases.items()}
