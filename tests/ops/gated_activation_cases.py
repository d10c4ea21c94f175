"""Arguments of `gated_activation` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen._schema import GATED_ACTIVATIONS
from fastgen.ops import gated_activation

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, laid_out, randn, strided

# Of the input: several pieces of a plane, rows longer and shorter than a vector, one channel, one position.
SHAPES = [
    (2, 8, 4, 6),
    (1, 26, 5, 7),
    (3, 130, 11, 12),
    (2, 6, 3, 4, 5),
    (2, 10, 9),
    (4, 34),
    (2, 6, 1, 1),
    (1, 2, 47, 51),
]
CONDITIONS = ("none", "channel", "position", "column")


def plain(x: Tensor, condition: Tensor | None = None, activation: str = "tanh") -> Tensor:
    """The same in plain torch, in the dtype of ``x``."""
    if condition is not None:
        c = condition.to(x.dtype)
        x = x + (c.reshape(*c.shape, *[1] * (x.dim() - 2)) if c.dim() == 2 else c)
    a, b = x.chunk(2, 1)
    return (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)


def make_condition(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """None, one a channel, one a position, or one a column of the last dimension."""
    if kind == "none":
        return None
    sizes = {"channel": shape[:2], "position": shape, "column": (*shape[:2], *[1] * (len(shape) - 3), *shape[2:][-1:])}
    return randn(*sizes[kind], seed=7, dtype=dtype)


def gradients(function, x: Tensor, condition: Tensor | None, activation: str, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, condition) if t is not None]
    y = function(*leaves, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[1] // 2, *shape[2:])


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "input": randn(2, 6, 5, 7, dtype=dtype),
        "condition": randn(2, 6, seed=1, dtype=dtype),
        "activation": "tanh",
    }


def examples() -> Iterator[dict[str, Any]]:
    yield {"input": randn(2, 6, 5, 7).float(), "condition": randn(2, 6, 5, 7, seed=1).float(), "activation": "identity"}


REFUSED = [
    *((op, {"activation": code}, "activation") for op in ("gated_activation_fwd", "gated_activation_bwd") for code in (-1, 2)),
    ("gated_activation_fwd", {"input": torch.zeros(2, 5, 5, 7)}, r"input must be \[N, 2 C, \*\]"),
    ("gated_activation_bwd", {"grad_output": torch.zeros(2, 3, 5, 7).double()}, "grad_output must be"),
    ("gated_activation_fwd", {"condition": torch.zeros(2, 6, 1, 7)}, "condition must"),
]  # fmt: skip


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """With a condition a channel an image may be of any size."""
    small = arguments["condition"].dim() == 2
    return op == "gated_activation_fwd" and small and name == "input" and how.startswith(("dimension 2", "dimension 3"))


MAPPED = OfTensors(
    lambda x, condition: gated_activation(x, condition),
    lambda k: [randn(2, 4, 5, 7, seed=k).float(), randn(2, 4, seed=50 + k).float()],
)
EXPORTED = {
    "gated_activation": OfTensors(
        lambda x, condition: gated_activation(x, condition, activation="identity"),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 4, dtype=torch.float32)],
    )
}

# Of the Triton kernels: several tiles of channels and of positions, and parts of one.
KERNEL_SHAPES = [(2, 8, 4, 4), (1, 6, 20, 55), (2, 48, 5), (1, 4, 2, 3, 5), (3, 16), (1, 2600, 2, 2)]
STORES_IN_A_LOOP = {"gated_activation.gated_activation_bwd_kernel"}  # over a block's tiles; sums stay in registers


def forward(shape, dtype, condition="channel", activation=0, layout="contiguous", kind=None) -> tuple[Any, ...]:
    """Arguments of `gated_activation_fwd`, with a condition in float32, or float64 for float64 input."""
    x = (2 * randn(*shape)).to(dtype)
    x = strided(x, kind) if kind is not None else laid_out(x, layout)
    return x, make_condition(condition, shape, torch.promote_types(dtype, torch.float32)), activation


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    """Arguments of `gated_activation_bwd` after that forward."""
    kind, grad = options.get("kind"), randn(*halved(shape), seed=3, dtype=dtype)
    return (grad if kind is None else strided(grad, kind), *forward(shape, dtype, *args, **options))


def calls() -> Iterator[Call]:
    ops = {"gated_activation_fwd": forward, "gated_activation_bwd": backward}
    for (op, make), shape, layout, (condition, code) in itertools.product(
        ops.items(), KERNEL_SHAPES, LAYOUTS, (("none", 1), ("channel", 0), ("position", 0))
    ):
        name = f"{shape} {layout} {condition} fp32"
        yield Call(name, op, partial(make, shape, torch.float32, condition, code, layout))
    for (op, make), dtype, code in itertools.product(ops.items(), DTYPES, range(2)):
        if dtype != torch.float32:
            yield Call(f"{code} {dtype_name(dtype)}", op, partial(make, KERNEL_SHAPES[0], dtype, "channel", code))
    for (op, make), kind in itertools.product(ops.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), torch.float32, "position", kind=kind))


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0)):
        x = torch.zeros(shape)
        assert kernels.gated_activation_fwd(x, None, 0).shape == halved(shape)
        dx, in_condition = kernels.gated_activation_bwd(torch.zeros(halved(shape)), x, torch.zeros(shape[:2]), 0)
        assert dx.shape == shape and in_condition.shape == shape[:2] and not in_condition.any()


ENDS = (0.0, 1e-30, 1e-4, -0.3, 0.4, 1.0, -3.0, 12.0, -30.0, 100.0, -100.0, 1e20, -1e20, math.inf, -math.inf, math.nan)


def ends(activation: str) -> Tensor:
    """All pairs of ENDS, but for a large number times the sigmoid of -100: that is 0 or denormal, as the hardware has it."""
    a, b = torch.cartesian_prod(*[torch.tensor(ENDS, dtype=torch.float64)] * 2).unbind(1)
    kept = (a.abs() < 1e19) | (b != -100) if activation == "identity" else torch.ones(len(a), dtype=torch.bool)
    return torch.stack([a, b], 1)[kept]


@pytest.mark.parametrize("activation", range(len(GATED_ACTIVATIONS)))
def check_ends(kernels, activation):
    """Values far out, infinite and not a number, of both halves; relative to each value, near 0 too."""
    x = ends(GATED_ACTIVATIONS[activation]).float()
    y = kernels.gated_activation_fwd(x, None, activation)
    expected = plain(x.double(), activation=GATED_ACTIVATIONS[activation]).float()
    torch.testing.assert_close(y, expected, rtol=3e-6, atol=1e-37, equal_nan=True)


def gates(arch: int) -> Iterator[Call]:
    """PixelCNN's widest layer in every dtype and a channels-last one; for sm_90 also a waveform, and next to nothing."""
    for op, make in (("gated_activation_fwd", forward), ("gated_activation_bwd", backward)):
        for dtype in DTYPES:
            yield Call(f"contiguous image {dtype_name(dtype)}", op, partial(make, (4, 320, 32, 32), dtype))
        yield Call(
            "channels-last bf16", op, partial(make, (4, 320, 32, 32), torch.bfloat16, "position", 1, "channels_last")
        )
        if arch == 90:
            yield Call("waveform bf16", op, partial(make, (2, 128, 16000), torch.bfloat16, "position"))
            yield Call("one of everything", op, partial(make, (1, 2), torch.float32, "none"))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout, condition):
    x = laid_out((3 * randn(*shape)).to(dtype), layout).cuda()
    given = make_condition(condition, shape, dtype)
    given = None if given is None else given.cuda()
    grad = randn(*halved(shape), seed=3, dtype=dtype).cuda()
    actual, beside = (gradients(f, x, given, "tanh", grad) for f in (gated_activation, plain))
    exact = gradients(plain, x.double(), None if given is None else given.double(), "tanh", grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms=math.sqrt(math.prod(shape[2:])))
    again = gradients(gated_activation, x, given, "tanh", grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
