"""Arguments of `invertible_conv1x1` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import invertible_conv1x1

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, guarded, laid_out, randn, strided

# Of every width of a tile; several tiles and blocks of a sample; channels that fill vectors and do not; vectors; one of everything.
SHAPES = [
    (2, 4, 4, 6),
    (1, 13, 5, 7),
    (3, 12, 16, 16),
    (2, 48, 9, 9),
    (2, 70, 3, 5),
    (2, 3, 3, 4, 5),
    (2, 5, 9),
    (37, 17),
    (300, 6),
    (2, 3, 1, 1),
    (1, 1, 1, 1),
    (1, 6, 41, 53),
    (1, 130, 2, 9),
]
NAMES = ("scale", "shift", "bias")
ORDERS = ("scale_shift", "shift_scale")


def plain(
    x: Tensor, weight: Tensor, scale=None, shift=None, bias=None, *, order="scale_shift", inverse=False
) -> Tensor:
    """The same in plain torch, in the dtype of ``x``, as Glow's ports have it."""

    def spread(p: Tensor | None) -> Tensor | float:
        return 0.0 if p is None else p.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))

    s, t, b = spread(scale) if scale is not None else 1.0, spread(shift), spread(bias)
    if inverse:
        x, weight = x - b, torch.linalg.inv(weight.double())
    elif order == "scale_shift":
        x = x * s + t
    else:
        x = (x + t) * s
    y = torch.einsum("oc,nc...->no...", weight.to(x.dtype), x)
    if not inverse:
        return y + b
    return (y - t) / s if order == "scale_shift" else y / s - t


def parameters(c: int, dtype: torch.dtype, given: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The matrix, well conditioned, and those of the small tensors that are ``given``."""
    rotation = torch.linalg.qr(randn(c, c, seed=1))[0] if c else randn(0, 0)
    weight = rotation * (0.5 + randn(c, seed=2).abs()).clamp_max(2.0)
    small = {
        "scale": 0.5 + randn(c, seed=3).abs(),
        "shift": randn(c, seed=4),
        "bias": randn(c, seed=5),
    }
    return {"weight": guarded(weight.to(dtype)), **{name: guarded(small[name].to(dtype)) for name in given}}


def gradients(function, x: Tensor, params: dict[str, Tensor], grad: Tensor, **form) -> list[Tensor]:
    """[output, gradients of input and of the small tensors in their order]."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params.values())]
    y = function(leaves[0], **dict(zip(params, leaves[1:], strict=True)), **form)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"input": randn(2, 6, 5, 7, dtype=dtype), **parameters(6, dtype)}


def examples() -> list[dict[str, Any]]:
    return [example(torch.float32) | {"order": "shift_scale"}]


UNSEEN = {
    "invertible_conv1x1_log_det": lambda: (*list(parameters(6, torch.float32).values())[:2], True, 3, 12, False, True)
}
REFUSED = [
    ("invertible_conv1x1_bwd", {"grad_output": torch.zeros(2, 6, 5, 7).double()}, "grad_output must"),
    ("invertible_conv1x1_log_det", {"n": -1}, "n must not be negative"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """The forward takes any positions of any samples."""
    dimensions = ("dimension 0", "dimension 2", "dimension 3")
    return op == "invertible_conv1x1_fwd" and name == "input" and how.startswith(dimensions)


MAPPED = OfTensors(
    lambda x, weight, scale, shift: invertible_conv1x1(x, weight, scale, shift),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32)
        for shape, seed in (((2, 4, 5, 7), 0), ((4, 4), 40), ((4,), 50), ((4,), 60))
    ],
)
EXPORTED = {
    "invertible_conv1x1": OfTensors(
        lambda x: invertible_conv1x1(x, torch.eye(4), torch.arange(1.0, 5.0)),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32)],
    )
}

# Of the Triton kernels: tiles that channels and positions fill and do not, several blocks.
KERNEL_SHAPES = [(2, 8, 4, 4), (1, 6, 50, 55), (2, 24, 5), (1, 4, 2, 3, 5), (33, 16), (2, 48, 9, 9), (1, 100, 2, 2)]


def forward(shape, dtype, order=0, given=NAMES, layout="contiguous", kind=None) -> tuple[Any, ...]:
    """Arguments of `invertible_conv1x1_fwd`; the small tensors in float32, or float64 for float64 input."""
    x = randn(*shape, dtype=dtype)
    x = strided(x, kind) if kind is not None else laid_out(x, layout)
    params = parameters(shape[1], torch.promote_types(dtype, torch.float32), given)
    return (x, params["weight"], *(params.get(name) for name in NAMES), bool(order))


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    kind, grad = options.get("kind"), randn(*shape, seed=6, dtype=dtype)
    x, weight, scale, shift, _, order = forward(shape, dtype, *args, **options)
    return (grad if kind is None else strided(grad, kind), x, weight, scale, shift, order)


OPS = {"invertible_conv1x1_fwd": forward, "invertible_conv1x1_bwd": backward}


def calls() -> Iterator[Call]:
    for (op, make), shape, layout in itertools.product(OPS.items(), KERNEL_SHAPES, LAYOUTS):
        yield Call(f"{shape} {layout} fp32", op, partial(make, shape, torch.float32, layout=layout))
    for (op, make), order, given in itertools.product(OPS.items(), (0, 1), ((), ("scale",), ("shift",))):
        yield Call(f"{given} {order} fp32", op, partial(make, (2, 8, 4, 4), torch.float32, order, given))
    for (op, make), dtype in itertools.product(OPS.items(), DTYPES):
        if dtype != torch.float32:
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], dtype, 1))
    for (op, make), kind in itertools.product(OPS.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), torch.float32, kind=kind))


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, weight = torch.zeros(shape), torch.eye(4)
        assert kernels.invertible_conv1x1_fwd(x, weight, None, None, None, False).shape == shape
        grads = kernels.invertible_conv1x1_bwd(x, x, weight, None, None, False)
        assert grads[0].shape == shape and not any(g.any() for g in grads)


def check_reasons(kernels):
    wide = torch.zeros(1, 129, 2)
    assert _dispatch.Triton.reasons("invertible_conv1x1_fwd", wide, torch.eye(129), None, None, None, False) == [
        "at most 128 channels fit a program, got 129: the library's product is faster there"
    ]


def gates(arch: int) -> Iterator[Call]:
    """Levels of Glow in every dtype and a channels-last one; for sm_90 also vectors and next to nothing."""
    for op, make in OPS.items():
        for dtype in DTYPES:
            yield Call(f"image {dtype_name(dtype)}", op, partial(make, (16, 48, 16, 16), dtype))
        yield Call("channels-last bf16", op, partial(make, (16, 24, 32, 32), torch.bfloat16, layout="channels_last"))
        if arch == 90:
            yield Call("vectors bf16", op, partial(make, (4096, 63), torch.bfloat16, 1))
            yield Call("widest bf16", op, partial(make, (16, 128, 16, 16), torch.bfloat16))
            yield Call("one of everything", op, partial(make, (1, 1), torch.float32, 0, ()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout):
    x = laid_out(randn(*shape, dtype=dtype), layout).cuda()
    params = {name: p.cuda() for name, p in parameters(shape[1], dtype).items()}
    grad = randn(*shape, seed=3, dtype=dtype).cuda()
    actual, beside = (gradients(f, x, params, grad) for f in (invertible_conv1x1, plain))
    exact = gradients(plain, x.double(), {name: p.double() for name, p in params.items()}, grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms=math.sqrt(x.numel()))
