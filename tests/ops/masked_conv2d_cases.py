"""Arguments of `masked_conv2d` for its tests on every device, what a user writes without it, and the same by loops."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._schema import MASK_TYPES
from fastgen.ops import masked_conv2d
from fastgen.reference._masked_taps import origin
from fastgen.reference.masked_conv2d import mask

from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, guarded, laid_out, randn

# Geometry -> ([N, C, H, W], K, kernel, dilation, groups): odd and 1-pixel images, kernels larger than the image, more and fewer
# channels than a panel and a block of registers, rows longer than a block of pixels.
SHAPES = {
    "small": ((2, 6, 5, 7), 4, (3, 3), (1, 1), 1),
    "wide": ((1, 40, 9, 11), 72, (3, 3), (1, 1), 1),
    "one channel": ((2, 1, 8, 300), 17, (7, 7), (1, 1), 1),
    "one pixel": ((3, 12, 1, 1), 18, (5, 5), (1, 1), 1),
    "dilated": ((2, 8, 9, 13), 24, (3, 5), (2, 3), 1),
    "far apart": ((1, 7, 4, 3), 6, (3, 3), (50, 2), 1),
    "groups": ((2, 24, 6, 9), 36, (3, 3), (1, 1), 2),
    "each channel": ((1, 6, 5, 6), 6, (3, 3), (1, 1), 6),
    "one row": ((1, 9, 1, 19), 21, (1, 5), (1, 2), 3),
    "1x1": ((1, 6, 5, 4), 12, (1, 1), (1, 1), 1),
    "few channels": ((2, 3, 6, 31), 20, (5, 5), (2, 1), 1),
    "few outputs": ((2, 20, 7, 30), 3, (3, 3), (1, 1), 1),
    "groups of few": ((1, 6, 18, 15), 34, (3, 3), (1, 1), 2),
}
# The same where the kernel need not be odd.
SHIFTED = {
    "even": ((2, 6, 5, 7), 20, (2, 2), (1, 1), 1),
    "even and odd": ((1, 18, 6, 8), 16, (2, 3), (1, 2), 2),
}
# ([N, C, H, W], K, kernel, dilation, groups, colors): as many colors as groups, more, fewer, and panels that a color cuts.
COLORS = {
    "RGB": ((2, 3, 5, 6), 6, (3, 3), (1, 1), 1, 3),
    "wide": ((1, 24, 6, 7), 60, (5, 5), (1, 1), 1, 3),
    "groups": ((1, 24, 5, 9), 36, (3, 3), (1, 2), 2, 3),
    "as many groups": ((1, 12, 4, 5), 18, (3, 3), (1, 1), 3, 3),
    "two of many": ((1, 20, 3, 5), 40, (1, 3), (1, 1), 1, 2),
    "1x1": ((2, 9, 3, 3), 18, (1, 1), (1, 1), 1, 3),
    "RGB, wide": ((2, 3, 5, 46), 27, (3, 3), (1, 1), 1, 3),
    "into RGB": ((2, 12, 5, 14), 3, (3, 3), (1, 1), 1, 3),
}
CASES = [(name, kind, *SHAPES[kind], 1) for name, kind in itertools.product(MASK_TYPES, SHAPES)]
CASES += [("down_right", kind, *case, 1) for kind, case in SHIFTED.items()]
CASES += [("down", "even and odd", *SHIFTED["even and odd"], 1)]
CASES += [
    (name, f"colors, {kind}", *case)
    for name, (kind, case) in itertools.product(("A", "B", "horizontal_A", "horizontal_B"), COLORS.items())
]


def case_name(value: Any) -> str:
    return value if isinstance(value, str) else ""


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, dilation=(1, 1), groups=1, colors=1
) -> Tensor:
    """A dense convolution of the masked weight, in the dtype of ``x``, as a user writes it."""
    kernel = weight.shape[2:]
    code = MASK_TYPES.index(mask_type)
    y, x_of = origin(code, kernel)
    w = torch.where(mask(code, weight.shape, groups, colors, weight.device), weight, 0.0).to(x.dtype)
    pad = (
        x_of * dilation[1], (kernel[1] - 1 - x_of) * dilation[1], y * dilation[0], (kernel[0] - 1 - y) * dilation[0]
    )  # fmt: skip
    return F.conv2d(F.pad(x, pad), w, None if bias is None else bias.to(x.dtype), 1, 0, dilation, groups)


def tensors(shape, k, kernel, groups, dtype, layout="contiguous") -> list[Tensor]:
    """Input, weight and bias."""
    fan_in = shape[1] // groups * kernel[0] * kernel[1]
    weight = randn(k, shape[1] // groups, *kernel, seed=1) / fan_in**0.5
    image = laid_out(randn(*shape, seed=2), layout)
    return [guarded(t.to(dtype)) for t in (image, weight, randn(k, seed=3) + 0.5)]


def example(dtype: torch.dtype) -> dict[str, Any]:
    x, weight, bias = tensors((2, 6, 5, 7), 12, (3, 3), 1, dtype)
    return {"input": x, "weight": weight, "bias": bias, "mask_type": "B", "color_channels": 3}


def forward_arguments(
    dtype=torch.float32, shape=(2, 6, 5, 7), k=12, kernel=(3, 3), dilation=(1, 1), groups=1, colors=3, mask_type="B",
    layout="contiguous",
) -> tuple:  # fmt: skip
    given = tensors(shape, k, kernel, groups, dtype, layout)
    return *given, MASK_TYPES.index(mask_type), list(dilation), groups, colors


def backward_arguments(wants=(True, True), dtype=torch.float32, shape=(2, 6, 5, 7), k=12, **geometry: Any) -> tuple:
    x, weight, _, *rest = forward_arguments(dtype, shape, k, **geometry)
    grad = laid_out(randn(shape[0], k, *shape[2:], seed=4), geometry.get("layout", "contiguous")).to(dtype)
    return grad, x, weight, *rest, *wants


def packed_arguments(transposed: bool = False, **given: Any) -> tuple:
    x, weight, bias, code, dilation, groups, colors = forward_arguments(**given)
    packed = torch.ops.fastgen.masked_conv2d_pack(weight, code, groups, colors, transposed)
    if transposed:
        n, c, k = x.shape[0], x.shape[1], weight.shape[0]
        x, bias = randn(n, k, *x.shape[2:], seed=5).to(x.dtype), randn(c, seed=6).to(x.dtype)
    return x, packed, len(bias), bias, list(weight.shape[2:]), code, dilation, groups, colors, transposed


def weight_arguments(**given: Any) -> tuple:
    grad, x, weight, *geometry, _, _ = backward_arguments(**given)
    return grad, x, list(weight.shape[2:]), *geometry


UNSEEN = {
    "masked_conv2d_fwd": forward_arguments,
    "masked_conv2d_pack": lambda: (forward_arguments()[1], 1, 1, 3, False),
    "masked_conv2d_packed": packed_arguments,
    "masked_conv2d_weight_bwd": weight_arguments,
}
_OPS = ("masked_conv2d_fwd", "masked_conv2d_bwd", "masked_conv2d_packed", "masked_conv2d_weight_bwd")
REFUSED = [
    *((op, {"mask_type": 8}, "mask_type") for op in (*_OPS, "masked_conv2d_pack")),
    *((op, {"mask_type": 3}, "color_channels must be 1") for op in (*_OPS, "masked_conv2d_pack")),
    *((op, {"color_channels": 4}, "color_channels must divide the channels") for op in (*_OPS, "masked_conv2d_pack")),
    *((op, {"dilation": [0, 1]}, "dilation must be two integers") for op in _OPS),
    *((op, {"groups": 5}, "") for op in (*_OPS, "masked_conv2d_pack")),
    *((op, {"groups": -1}, "") for op in (*_OPS, "masked_conv2d_pack")),
    *((op, {"kernel": [3, 4]}, "kernel must be odd") for op in _OPS[2:]),
    *((op, {"kernel": [0, 3]}, "kernel must be two integers") for op in _OPS[2:]),
    ("masked_conv2d_packed", {"kernel": [5, 3]}, "packed must"),
    ("masked_conv2d_packed", {"out_channels": 60}, "packed must"),
    (
        "masked_conv2d_packed",
        {"input": torch.zeros(2, 6, 5, 7).double()},
        "input must be .*float32, bfloat16 or float16",
    ),
    ("masked_conv2d_weight_bwd", {"input": torch.zeros(2, 6, 5, 7).half()}, "grad_output must be"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """A weight alone may have any number of channels that the colors divide, and so may an image beside no weight; a kernel may be
    of one row or column, and an image of any size and number."""
    if op == "masked_conv2d_pack":
        channels = how.startswith(("dimension 0 too long", "dimension 1 too long"))
        return channels or how == "the meta device" or how in ("dimension 2 of one", "dimension 3 of one")
    if op in ("masked_conv2d_fwd", "masked_conv2d_bwd") and name == "weight":
        return how in ("dimension 2 of one", "dimension 3 of one")
    if op == "masked_conv2d_fwd" and name == "input":
        return how.startswith(("dimension 0", "dimension 2", "dimension 3"))
    if op == "masked_conv2d_packed" and name == "input":
        return how.startswith(("dimension 0", "dimension 2", "dimension 3"))
    return op == "masked_conv2d_weight_bwd" and how.startswith("dimension 1 too long")


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Of which every sum is exact, in whatever order."""
    return randn(*shape, seed=seed).mul(3).round().float()


MAPPED = OfTensors(
    lambda x, weight, bias: masked_conv2d(x, weight, bias, mask_type="B"),
    lambda k: [
        whole_numbers(*shape, seed=k + seed) for shape, seed in (((2, 3, 4, 5), 0), ((2, 3, 3, 3), 50), ((2,), 60))
    ],
)
_WEIGHT = randn(6, 4, 3, 3, dtype=torch.float32)
EXPORTED = {
    "masked_conv2d": OfTensors(
        lambda x: masked_conv2d(x, _WEIGHT.clone(), mask_type="A", color_channels=2),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32)],
    )
}


def calls() -> Iterator[Call]:
    """Every mask; every geometry in fp32; the other dtypes and layouts of one."""
    for name in MASK_TYPES:
        given = {"mask_type": name, "colors": 1, "shape": (2, 5, 6, 7), "k": 7}
        yield Call(f"{name} fp32", "masked_conv2d_fwd", partial(forward_arguments, **given))
        yield Call(f"{name} fp32", "masked_conv2d_bwd", partial(backward_arguments, **given))
    geometries = {
        "even": {"mask_type": "down_right", "kernel": (2, 2), "colors": 1},
        "dilated": {"mask_type": "A", "dilation": (2, 3), "shape": (1, 3, 7, 9), "kernel": (3, 5), "colors": 1},
        "groups": {"mask_type": "A", "shape": (1, 12, 5, 6), "groups": 2, "colors": 3},
        "colors A": {"mask_type": "A"},
        "several tiles": {"shape": (1, 36, 9, 10), "k": 69},
        "one pixel": {"shape": (2, 3, 1, 1), "k": 3},
        "1x1 that sees nothing": {"mask_type": "A", "kernel": (1, 1), "colors": 1},
    }
    for name, given in geometries.items():
        yield Call(f"{name} fp32", "masked_conv2d_fwd", partial(forward_arguments, **given))
        yield Call(f"{name} fp32", "masked_conv2d_bwd", partial(backward_arguments, **given))
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
        given = {"dtype": dtype, "layout": layout}
        yield Call(f"{layout} {dtype_name(dtype)}", "masked_conv2d_fwd", partial(forward_arguments, **given))
        yield Call(f"{layout} {dtype_name(dtype)}", "masked_conv2d_bwd", partial(backward_arguments, **given))
    for wants in ((True, False), (False, True)):
        yield Call(f"{wants} fp32", "masked_conv2d_bwd", partial(backward_arguments, wants))


def check_masked_weights(kernels):
    """NaN at masked taps has no part in outputs and gradients, whose masked taps are exactly 0."""
    for name, colors in (("A", 3), ("B", 3), ("horizontal_A", 1), ("vertical_A", 1)):
        grad, x, weight, code, *rest = backward_arguments(mask_type=name, colors=colors)
        live = mask(code, weight.shape, 1, colors)
        spoiled = torch.where(live, weight, float("nan"))
        y, clean = (kernels.masked_conv2d_fwd(x, w, None, code, *rest[:3]) for w in (spoiled, weight))
        assert torch.equal(y, clean) and y.isfinite().all()
        for by, expected in zip(
            kernels.masked_conv2d_bwd(grad, x, spoiled, code, *rest),
            kernels.masked_conv2d_bwd(grad, x, weight, code, *rest),
            strict=True,
        ):
            assert torch.equal(by, expected) and by.isfinite().all()
        assert (by[~live] == 0).all() and (by[live] != 0).all()


def check_masked_pixels(kernels):
    """A pixel that is infinite or not a number changes no output before it, in raster order and color."""
    x, weight, bias, code, *rest = forward_arguments(mask_type="A")
    clean = kernels.masked_conv2d_fwd(x, weight, bias, code, *rest)
    x[0, 3, 2, 4] = float("nan")  # of the second color
    x[0, 5, 3, 1] = float("inf")
    y = kernels.masked_conv2d_fwd(x, weight, bias, code, *rest)
    seen = torch.zeros(5, 7, dtype=torch.bool)
    seen[:2] = True
    seen[2, :4] = True
    assert torch.equal(y[0][:, seen], clean[0][:, seen]) and torch.equal(y[1], clean[1])
    assert torch.equal(y[0, :8, 2, 4], clean[0, :8, 2, 4]) and y[0, 8:, 2, 4].isnan().all()


REGISTERS = {"masked_conv2d.taps_kernel": 168}


def gates(arch: int) -> Iterator[Call]:
    """A middle layer, the first one with ordered colors, a vertical stack."""
    half = torch.bfloat16
    cases = [("3x3 B", (dtype, (2, 128, 32, 32), 128, (3, 3), (1, 1), 1, 1, "B")) for dtype in DTYPES]
    if arch == 90:
        cases += [
            ("7x7 A colors", (half, (2, 3, 32, 32), 96, (7, 7), (1, 1), 1, 3, "A")),
            ("dilated groups", (half, (2, 96, 28, 28), 96, (3, 3), (2, 2), 3, 1, "vertical_B")),
        ]
    for name, given in cases:
        dtype, shape, k, *_ = given

        def forward(given=given) -> tuple:
            return zeros(forward_arguments(*given))

        def backward(given=given, dtype=dtype, shape=shape, k=k) -> tuple:
            x, weight, _, *rest = forward(given)
            return torch.zeros(shape[0], k, *shape[2:], dtype=dtype), x, weight, *rest, True, True

        yield Call(f"{name} {dtype_name(dtype)}", "masked_conv2d_fwd", forward)
        yield Call(f"{name} {dtype_name(dtype)}", "masked_conv2d_bwd", backward)


def zeros(arguments: tuple) -> tuple:
    """At addresses that are multiples of 16."""
    return tuple(torch.zeros_like(a) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize(("name", "kind", "shape", "k", "kernel", "dilation", "groups", "colors"), CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values(dtype, name, kind, shape, k, kernel, dilation, groups, colors):
    given = [t.cuda() for t in tensors(shape, k, kernel, groups, dtype)]
    exact = plain(*(t.double() for t in given), name, dilation, groups, colors)
    beside = plain(*given, name, dilation, groups, colors)
    slack = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-3)
    actual = masked_conv2d(*given, mask_type=name, dilation=dilation, groups=groups, color_channels=colors)
    assert_bar(actual, beside, exact, slack)


def gpu_gradcheck():
    given = [t.cuda().requires_grad_() for t in tensors((1, 3, 3, 4), 3, (3, 3), 1, torch.float64)]
    for name in ("A", "B"):
        assert torch.autograd.gradcheck(
            lambda *t, kind=name: masked_conv2d(*t, mask_type=kind, color_channels=3), given
        )
