"""Arguments of `actnorm` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.ops import actnorm

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, guarded, laid_out, randn, strided

# Several runs of a channel, rows shorter and longer than a vector, many positions a row of a block, vectors, one of everything.
SHAPES = [
    (2, 4, 4, 6),
    (1, 13, 5, 7),
    (3, 70, 11, 12),
    (2, 3, 3, 4, 5),
    (2, 5, 9),
    (37, 17),
    (300, 6),
    (2, 3, 1, 1),
    (1, 2, 41, 53),
    (2, 600, 3, 2),
]
FORMS = [
    {"log_scale": log_scale, "order": order, "inverse": inverse}
    for log_scale in (False, True)
    for order in ("scale_shift", "shift_scale")
    for inverse in (False, True)
]


def plain(
    x: Tensor, scale: Tensor, shift: Tensor, *, log_scale=False, order="scale_shift", inverse=False
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in the dtype of ``x``."""
    s, t = (p.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2)) for p in (scale, shift))
    logs = s if log_scale else s.abs().log()
    s = s.exp() if log_scale else s
    if order == "scale_shift":
        y = (x - t) / s if inverse else x * s + t
    else:
        y = x / s - t if inverse else (x + t) * s
    log_det = logs.sum() * math.prod(x.shape[2:]) * (-1 if inverse else 1)
    return y, log_det.expand(x.shape[0])


def parameters(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = 0.5 + randn(shape[1], seed=1).abs()
    return tuple(guarded(p.to(dtype)) for p in (scale, randn(shape[1], seed=2)))  # type: ignore[return-value]


def gradients(function, tensors: list[Tensor], grads: tuple[Tensor, Tensor], **form) -> list[Tensor]:
    """[output, log_det, gradients of input, scale and shift]."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves, **form)
    found = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [o.detach() for o in outputs] + list(found)


def example(dtype: torch.dtype) -> dict[str, Any]:
    scale, shift = parameters((2, 6), dtype)
    return {"input": randn(2, 6, 5, 7, dtype=dtype), "scale": scale, "shift": shift}


def examples() -> list[dict[str, Any]]:
    return [example(torch.float32) | form for form in (FORMS[1], FORMS[4], FORMS[7])]


OWN_DTYPE = (1,)
UNSEEN = {"actnorm_statistics": lambda: (randn(2, 6, 5, 7, dtype=torch.float32), 1)}
REFUSED = [
    ("actnorm_statistics", {"correction": 2}, "correction must be 0 or 1"),
    ("actnorm_bwd", {"grad_output": torch.zeros(2, 6, 5, 7).double()}, "grad_output must"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """The statistics are those of any tensor of two dimensions or more; the forward takes any positions of any samples."""
    if op == "actnorm_statistics":
        return how not in ("a scalar", "integers", "complex")
    return op == "actnorm_fwd" and name == "input" and how.startswith(("dimension 0", "dimension 2", "dimension 3"))


MAPPED = OfTensors(
    lambda x, scale, shift: actnorm(x, scale, shift, log_scale=True),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32) for shape, seed in (((2, 4, 5, 7), 0), ((4,), 50), ((4,), 60))
    ],
)
EXPORTED = {
    "actnorm": OfTensors(
        lambda x: actnorm(x, torch.arange(1.0, 5.0), torch.arange(4.0)), lambda n: [randn(n, 4, 5, 7, dtype=torch.float32)]
    )
}  # fmt: skip

# Of the Triton kernels: rows and planes shorter and longer than a block.
KERNEL_SHAPES = [(2, 8, 4, 4), (1, 6, 50, 55), (2, 24, 5), (1, 4, 2, 3, 5), (33, 16), (1, 1300, 2, 2)]


def forward(shape, dtype, form=0, layout="contiguous", kind=None) -> tuple[Any, ...]:
    """Arguments of `actnorm_fwd`; the small tensors in float32, or float64 for float64 input."""
    x = randn(*shape, dtype=dtype)
    x = strided(x, kind) if kind is not None else laid_out(x, layout)
    given = FORMS[form]
    codes = (given["log_scale"], given["order"] == "shift_scale", given["inverse"])
    return (x, *parameters(shape, torch.promote_types(dtype, torch.float32)), *codes)


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    kind, grad = options.get("kind"), randn(*shape, seed=3, dtype=dtype)
    x, *rest = forward(shape, dtype, *args, **options)
    of_log_det = randn(shape[0], seed=4, dtype=torch.promote_types(dtype, torch.float32))
    return (grad if kind is None else strided(grad, kind), of_log_det, x, *rest)


def statistics(shape, dtype, *args, **options) -> tuple[Any, ...]:
    return (forward(shape, dtype, *args, **options)[0] * 3 + 1, 1)


OPS = {"actnorm_fwd": forward, "actnorm_bwd": backward, "actnorm_statistics": statistics}


def calls() -> Iterator[Call]:
    for (op, make), shape, layout in itertools.product(OPS.items(), KERNEL_SHAPES, LAYOUTS):
        yield Call(f"{shape} {layout} fp32", op, partial(make, shape, torch.float32, layout=layout))
    for (op, make), form in itertools.product(list(OPS.items())[:2], range(1, len(FORMS))):
        yield Call(f"form {form} fp32", op, partial(make, (2, 8, 4, 4), torch.float32, form))
    for (op, make), dtype in itertools.product(OPS.items(), DTYPES):
        if dtype != torch.float32:
            yield Call(dtype_name(dtype), op, partial(make, KERNEL_SHAPES[0], dtype))
    for (op, make), kind in itertools.product(OPS.items(), STRIDES):
        if op != "actnorm_statistics" or kind != "expanded":  # whose deviation is what rounding left
            yield Call(kind, op, partial(make, (2, 8, 5, 6), torch.float32, kind=kind))


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        x, small = torch.zeros(shape), torch.ones(shape[1])
        y, log_det = kernels.actnorm_fwd(x, small, small, False, False, False)
        assert y.shape == shape and log_det.shape == shape[:1] and not log_det.any()
        grads = kernels.actnorm_bwd(x, None, x, small, small, False, False, False)
        assert grads[0].shape == shape and not any(g.any() for g in grads)
        assert kernels.actnorm_statistics(x, 1)[0].isnan().all()


def check_large_means(kernels):
    """A mean of 1e4 beside a deviation of 1."""
    x = (1e4 + randn(8, 5, 40, 40)).float()
    mean, deviation = kernels.actnorm_statistics(x, 1)
    wide = x.double().movedim(1, 0).flatten(1)
    assert (mean - wide.mean(1)).abs().max() <= 1e-3 and (deviation - wide.std(1)).abs().max() <= 1e-6


def gates(arch: int) -> Iterator[Call]:
    """An image of Glow in every dtype and a channels-last one; for sm_90 also vectors and next to nothing."""
    for op, make in OPS.items():
        for dtype in DTYPES:
            yield Call(f"contiguous image {dtype_name(dtype)}", op, partial(make, (16, 48, 32, 32), dtype))
        yield Call("channels-last bf16", op, partial(make, (16, 48, 32, 32), torch.bfloat16, layout="channels_last"))
        if arch == 90:
            yield Call("vectors bf16", op, partial(make, (4096, 63), torch.bfloat16, 3))
            yield Call("one of everything", op, partial(make, (1, 1), torch.float32, 7))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout):
    x = laid_out(randn(*shape, dtype=dtype), layout).cuda()
    tensors = [x, *(p.cuda() for p in parameters(shape, dtype))]
    grads = randn(*shape, seed=3, dtype=dtype).cuda(), randn(shape[0], seed=4, dtype=dtype).cuda()
    actual, beside = (gradients(f, tensors, grads) for f in (actnorm, plain))
    exact = gradients(plain, [t.double() for t in tensors], tuple(g.double() for g in grads))
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms=math.sqrt(x.numel()))
