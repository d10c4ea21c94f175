"""Arguments of `concat_elu` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import concat_elu

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, laid_out, randn, strided

# Of the input: several runs of a sample, rows longer and shorter than a vector, one channel, one position.
SHAPES = [
    (2, 4, 4, 6),
    (1, 13, 5, 7),
    (3, 65, 11, 12),
    (2, 3, 3, 4, 5),
    (2, 5, 9),
    (4, 17),
    (2, 3, 1, 1),
    (1, 1, 97, 51),
]


def plain(x: Tensor, dim: int = 1) -> Tensor:
    """The same in plain torch, as PixelCNN++ in PyTorch has it."""
    return F.elu(torch.cat([x, -x], dim))


def gradients(function, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, grad.to(y.dtype))]


def doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], *shape[2:])


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"input": randn(2, 3, 5, 7, dtype=dtype)}


REFUSED = [("concat_elu_bwd", {"grad_output": torch.zeros(2, 6, 5, 7).double()}, "grad_output must be")]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """A tensor alone may be of any shape of two dimensions or more, and on any device."""
    return op == "concat_elu_fwd" and how not in ("a scalar", "integers", "complex")


MAPPED = OfTensors(lambda x: concat_elu(x), lambda k: [randn(2, 4, 5, 7, seed=k).float()])
EXPORTED = {"concat_elu": OfTensors(lambda x: concat_elu(x), lambda n: [randn(n, 4, 5, 7, dtype=torch.float32)])}

# Of the Triton kernels: within a sample and across several, rows shorter and longer than a block.
KERNEL_SHAPES = [(2, 8, 4, 4), (3, 4, 50, 55), (2, 24, 5), (1, 4, 2, 3, 5), (3, 16), (1, 1300, 2, 2), (2, 9000, 1, 2)]


def forward(shape, dtype, layout="contiguous", kind=None) -> tuple[Any, ...]:
    """Arguments of `concat_elu_fwd`."""
    x = (2 * randn(*shape)).to(dtype)
    return (strided(x, kind) if kind is not None else laid_out(x, layout),)


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    """Arguments of `concat_elu_bwd`."""
    kind, grad = options.get("kind"), randn(*doubled(shape), seed=3, dtype=dtype)
    return (grad if kind is None else strided(grad, kind), *forward(shape, dtype, *args, **options))


def calls() -> Iterator[Call]:
    ops = {"concat_elu_fwd": forward, "concat_elu_bwd": backward}
    for (op, make), shape, layout in itertools.product(ops.items(), KERNEL_SHAPES, LAYOUTS):
        yield Call(f"{shape} {layout} fp32", op, partial(make, shape, torch.float32, layout))
    for (op, make), dtype in itertools.product(ops.items(), DTYPES):
        if dtype != torch.float32:
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], dtype))
    for (op, make), kind in itertools.product(ops.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), torch.float32, kind=kind))


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        x = torch.zeros(shape)
        assert kernels.concat_elu_fwd(x).shape == doubled(shape)
        assert kernels.concat_elu_bwd(torch.zeros(doubled(shape)), x).shape == shape


ENDS = (0.0, 1e-40, 1e-30, 1e-4, 0.3, 0.36, 1.0, 3.0, 30.0, 100.0, 1e20, math.inf, math.nan)


def check_ends(kernels):
    """Values far out, infinite and not a number; relative to each value, near 0 too."""
    x = torch.tensor(ENDS)
    x = torch.cat([x, -x])[:, None]
    torch.testing.assert_close(
        kernels.concat_elu_fwd(x), plain(x.double()).float(), rtol=1e-6, atol=0.0, equal_nan=True
    )


def gates(arch: int) -> Iterator[Call]:
    """PixelCNN++'s widest layer in every dtype and a channels-last one; for sm_90 also samples short enough to go across."""
    for op, make in (("concat_elu_fwd", forward), ("concat_elu_bwd", backward)):
        for dtype in DTYPES:
            yield Call(f"contiguous image {dtype_name(dtype)}", op, partial(make, (4, 160, 32, 32), dtype))
        yield Call("channels-last bf16", op, partial(make, (4, 160, 32, 32), torch.bfloat16, "channels_last"))
        if arch == 90:
            yield Call("short bf16", op, partial(make, (4, 33, 7), torch.bfloat16))
            yield Call("one of everything", op, partial(make, (1, 1), torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout):
    x = laid_out((3 * randn(*shape)).to(dtype), layout).cuda()
    grad = randn(*doubled(shape), seed=3, dtype=dtype).cuda()
    actual, beside = (gradients(f, x, grad) for f in (concat_elu, plain))
    exact = gradients(plain, x.double(), grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6)
